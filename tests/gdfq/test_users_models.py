"""Models as users bring them: what surprised an earlier version, or another tool."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_models import Plain, randomize_batch_norm
from torch import nn
from torch.nn.utils import prune
from torch.utils.tensorboard import SummaryWriter

import gdfq
from gdfq.data import LabeledImages
from gdfq.errors import GdfqError

TRIAL = {
    "method": "gdfq", "model.image_size": 8, "schedule.epochs": 3, "schedule.iterations": 2, "schedule.batch_size": 4,
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
        self.bias_quantizers = nn.Conv2d(8, 8, 1)
        self.activation_quantizers = nn.Linear(8, 10)

    def forward(self, x):
        x = self.bias_quantizers(self.batch_norms[0](self.weight_quantizers(x)).relu())
        return self.activation_quantizers(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["gdfq", "dfq"])
def test_a_model_may_have_any_names(tmp_path, method):
    model = randomize_batch_norm(TakenNames())
    result = quantized(model, tmp_path / "run", method=method)
    assert len(result.report.summary.weights) == 3
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


def labeled(shape=(3, 8, 8), labels=(0, 1, 2)):
    return [(torch.randn(shape), label) for label in labels]


class Breaks(list):
    """A data set whose last item cannot be read."""

    def __getitem__(self, index):
        if index == len(self) - 1:
            raise ValueError("no such file: 7.png")
        return super().__getitem__(index)


def with_data(dataset, run_dir=None):
    config = gdfq.Config.load("cifar", TRIAL)
    return gdfq.quantize(plain(), config, run_dir=run_dir, progress=False, evaluate_on=dataset)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], "holds no images"),
        (Breaks(labeled(labels=[0])), "its first item cannot be read: ValueError: no such file: 7.png"),
        (labeled((3, 9, 9)), r"an image of shape \(3, 9, 9\), the model takes \(3, 8, 8\)"),
        (labeled(labels=[10]), r"holds the label 10, but the model knows 10 classes"),
        (labeled(labels=[-1]), r"holds the label -1"),
        ([torch.randn(3, 8, 8)], "every item must be a pair"),
        (iter(()), "must have len"),
    ],
)
def test_data_for_evaluation_are_looked_at_before_the_run(tmp_path, dataset, words):
    with pytest.raises(GdfqError, match=f"`evaluate_on`.*{words}"):
        with_data(dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_labels_of_a_data_set_that_has_them_at_hand_are_looked_at(tmp_path):
    class Images(LabeledImages):
        def pixels(self, index):
            return torch.zeros(3, 8, 8)

    images = Images(torch.tensor([0, 1, 12]), list("abcdefghijklm"), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(GdfqError, match="holds the label 12"):
        with_data(images, tmp_path / "run")


def test_data_that_break_after_training_cost_no_result(tmp_path):
    with pytest.warns(UserWarning, match=r"top-1 was not measured: no such file: 7.png; mend it, then: gdfq evaluate"):
        result = with_data(Breaks(labeled()), tmp_path / "run")
    assert result.report.top1 == {}
    assert json.loads((tmp_path / "run/report.json").read_text())["top1"] == {}
    assert {"model.safetensors", "generator.safetensors", "images.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_the_written_report_has_the_top1(tmp_path):
    result = with_data(labeled(), tmp_path / "run")
    assert json.loads((tmp_path / "run/report.json").read_text())["top1"] == result.report.top1 != {}


@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_events_that_cannot_be_written_cost_nothing(tmp_path, monkeypatch, method):
    def fail(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, method, fail)
    with pytest.warns(UserWarning, match="no TensorBoard events are written: No space left") as caught:
        quantized(plain(), tmp_path / "run", **{"run.log_every": 1})
    assert len([warning for warning in caught if "TensorBoard" in str(warning.message)]) == 1
    assert (tmp_path / "run/model.safetensors").exists()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 6


def test_a_generator_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise GdfqError("cannot write generator.safetensors: No space left on device")

    monkeypatch.setattr("gdfq.api.save_tensors", fail)
    with pytest.warns(UserWarning, match=r"generator.safetensors was not written: cannot write"):
        result = quantized(plain(), tmp_path / "run")
    assert result.generator is not None
    assert (tmp_path / "run/report.json").exists()


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


def test_what_the_pixels_are_taken_for_and_doubts_are_in_the_report(tmp_path):
    report = quantized(plain(), tmp_path / "run", **{"model.input_std": 200.0, "model.input_mean": 3.0}).report
    assert "std 200/200/200" in str(report)
    assert "WARNING      the first BN layers contradict the scale of pixels that is set" in str(report)
    stored = json.loads((tmp_path / "run/report.json").read_text())
    assert stored["pixels"]["std"] == [200.0] * 3
    assert stored["warnings"] == report.warnings
    assert any("contradict" in warning for warning in stored["warnings"])
    assert {layer["name"] for layer in stored["fit"]["layers"]} == {"1"}
    published = quantized(plain(), **{"model.input_std": 1.0, "model.input_mean": 0.0}).report
    assert published.pixels.origin == "set"


@pytest.mark.parametrize(("method", "given"), [("gdfq", {}), ("calibrated", {"calibrate_on": [torch.randn(3, 8, 8)]})])
def test_whether_q_is_judged_on_images_of_another_source_is_said(method, given):
    config = gdfq.Config.load("cifar", TRIAL | {"method": method})
    report = gdfq.quantize(plain(), config, progress=False, **given).report
    assert report.fit.same_source is (method == "gdfq")
    assert ("of another source" in str(report)) is (method != "gdfq")
    own = gdfq.quantize(plain(), config, progress=False, held_out_images=[torch.randn(4, 3, 8, 8)], **given).report
    assert not own.fit.same_source
