"""Models as users bring them: what surprised an earlier version, or another tool."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import Plain, randomize_batch_norm
from torch import nn
from torch.nn.utils import prune

import gdfq
from gdfq.errors import GdfqError

TRIAL = {
    "model.image_size": 8, "schedule.epochs": 3, "schedule.iterations": 2, "schedule.batch_size": 4,
    "schedule.warmup_epochs": 1, "schedule.range_epochs": 1, "schedule.range_batches": 2, "run.held_out_images": 8,
}  # fmt: skip


def quantized(model, run_dir=None, **settings):
    return gdfq.quantize(model, gdfq.Config.load("cifar", TRIAL | settings), run_dir=run_dir, progress=False)


def plain(channels=3, classes=10):
    return randomize_batch_norm(
        nn.Sequential(
            nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, classes),
        )
    )  # fmt: skip


class TakenNames(nn.Module):
    """Has the names under which quantizers are added; the result has both."""

    def __init__(self):
        super().__init__()
        self.weight_quantizers = nn.Conv2d(3, 8, 3)
        self.batch_norms = nn.ModuleList([nn.BatchNorm2d(8)])
        self.activation_quantizers = nn.Linear(8, 10)

    def forward(self, x):
        x = self.batch_norms[0](self.weight_quantizers(x)).relu()
        return self.activation_quantizers(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["gdfq", "dfq"])
def test_a_model_may_have_any_names(tmp_path, method):
    model = randomize_batch_norm(TakenNames())
    result = quantized(model, tmp_path / "run", method=method)
    assert len(result.report.summary.weights) == 2
    assert model.state_dict().keys() <= result.model.state_dict().keys()
    x = torch.randn(4, 3, 8, 8)
    loaded = gdfq.load_quantized(tmp_path / "run/model.safetensors", model)
    assert torch.equal(loaded(x), result.model(x))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_gives_a_picture(tmp_path, channels):
    quantized(plain(channels), tmp_path / "run")
    assert (tmp_path / "run/images.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("no pencil")

    monkeypatch.setattr("gdfq.api.save_picture", fail)
    with pytest.warns(UserWarning, match=r"images.png was not drawn: no pencil"):
        result = quantized(plain(), tmp_path / "run")
    assert (tmp_path / "run/report.json").exists()
    assert (tmp_path / "run/model.safetensors").exists()
    assert result.model(torch.randn(2, 3, 8, 8)).isfinite().all()


def test_a_weight_is_counted_whatever_it_is_called():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.bn, self.fc = (
                nn.Parameter(torch.randn(64, 3, 3, 3)),
                nn.BatchNorm2d(64),
                nn.Linear(64, 10),
            )

        def forward(self, x):
            return self.fc(self.bn(F.conv2d(x, self.kernel)).relu().mean((2, 3)))

    report = quantized(randomize_batch_norm(Functional())).report
    assert report.quantized_bytes == (64 * 27 + 640) // 2 + 4 * (64 * 2 + 10)


def test_one_logit_is_refused_in_words():
    with pytest.raises(GdfqError, match=r"one logit an image.*wrap it in a module that returns two"):
        quantized(plain(classes=1))


def test_what_is_set_for_the_process_neither_matters_nor_changes():
    model = plain()
    expected = quantized(model).model.state_dict()
    random = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.no_grad():
            found = quantized(model).model.state_dict()
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        quantized(model)
        assert torch.is_inference_mode_enabled()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))])
def test_wrappers_are_taken_off_and_it_is_said(wrap):
    model = randomize_batch_norm(Plain())
    with pytest.warns(UserWarning, match="is quantized, without the wrapper"):
        result = quantized(wrap(model))
    assert model.state_dict().keys() <= result.model.state_dict().keys()


class KeepsItsFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = plain(), []

    def forward(self, x):
        self.last = self.net[:3](x)
        self.seen.append({"features": self.last})
        return self.net[3:](self.last)


def test_what_a_model_has_computed_and_kept_is_no_obstacle():
    keeps = KeepsItsFeatures()
    keeps(torch.randn(1, 3, 8, 8))
    quantized(keeps)
    assert keeps.last.grad_fn is not None
    pruned = plain()
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    zeros = quantized(pruned).model
    x = torch.randn(4, 3, 8, 8)
    assert zeros(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_type_is_quantized_from_a_float32_copy(dtype):
    model = plain().to(dtype)
    with pytest.warns(UserWarning, match=f"the model is in {str(dtype).removeprefix('torch.')}"):
        result = quantized(model)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert result.model(torch.randn(2, 3, 8, 8)).dtype == torch.float32


def test_an_ordinary_model_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantized(plain())
