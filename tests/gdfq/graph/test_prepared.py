"""BatchNorms that other packages have frozen, and models that eval() does not bring into eval mode."""

import copy
import warnings

import pytest
import torch
from small_models import Residual, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture


class FrozenBatchNorm2d(nn.Module):
    """As detection packages write it."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = layer.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.as_tensor(getattr(layer, name)).detach().clone())

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


class WithRelu(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class WithoutEps(FrozenBatchNorm2d):
    """1e-5 stands in its forward pass."""

    def __init__(self, layer):
        super().__init__(layer)
        del self.eps

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, 1e-5)


def frozen(kind, names=("bn1", "bn2", "bn3")) -> tuple[nn.Module, nn.Module]:
    """A network, and the same with `names` frozen."""
    model = randomize_batch_norm(Residual())
    other = copy.deepcopy(model)
    for name in names:
        setattr(other, name, kind(getattr(model, name)))
    return model, other


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, WithoutEps])
@pytest.mark.parametrize("names", [("bn1", "bn2", "bn3"), ("bn2",)])
def test_frozen_batch_norms_are_taken_as_such(kind, names):
    model, other = frozen(kind, names)
    kept = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"{len(names)} frozen BatchNorms are taken as PyTorch's.*bn2"):
        captured = capture(other)
    assert isinstance(other.bn2, kind)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict().items())
    x = torch.randn(4, 3, 8, 8)
    plain = capture(model)
    expected, statistics = build_teacher(plain).read(x, ["statistics"])
    logits, found = build_teacher(captured).read(x, ["statistics"])
    torch.testing.assert_close(logits, expected)
    for value, same in zip(found["statistics"], statistics["statistics"], strict=True):
        torch.testing.assert_close(value, same)
    assert build_quantized(captured, QuantizerConfig())[1] == build_quantized(plain, QuantizerConfig())[1]


def test_one_under_two_names_stays_one():
    model, other = frozen(FrozenBatchNorm2d)
    other.same = other.bn1
    with pytest.warns(UserWarning, match="4 frozen BatchNorms"):
        captured = capture(other)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(build_teacher(captured)(x), model(x))


def test_what_computes_more_is_named():
    _, other = frozen(WithRelu)
    with pytest.warns(UserWarning, match=r"bn1, bn2, bn3 of WithRelu .* put nn.BatchNorm2d"):
        capture(other)
    other.bn4 = nn.Identity()
    with pytest.raises(GdfqError, match=r"no BatchNorm layer .* bn1, bn2, bn3 of WithRelu .* put nn.BatchNorm2d"):
        capture(other)


class StaysInTraining(Residual):
    def train(self, mode=True):
        return self


class KeepsItsBatchNormsFrozen(Residual):
    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def test_an_eval_without_effect_is_set_right_and_said():
    model = StaysInTraining()
    model.load_state_dict(randomize_batch_norm(Residual()).state_dict())
    with pytest.warns(UserWarning, match=r"model.eval\(\) leaves .* modules in training mode"):
        captured = capture(model)
    assert model.training
    assert model.dropout.training
    ordinary = Residual().eval()
    ordinary.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(build_teacher(captured)(x), ordinary(x))


@pytest.mark.filterwarnings("error")
def test_batch_norms_that_stay_frozen_in_training_are_ordinary():
    model = KeepsItsBatchNormsFrozen()
    model.load_state_dict(randomize_batch_norm(Residual()).state_dict())
    captured = capture(model.train())
    assert not model.bn1.training
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(build_teacher(captured)(x), model.eval()(x))


class NormalizesByTheBatch(Residual):
    """Batch statistics whatever the mode, and the running ones move."""

    def forward(self, x):
        x = F.batch_norm(x, self.mean, self.var, training=True)
        return super().forward(x)

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))


class Counts(Residual):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_batch_statistics_in_eval_mode_are_said():
    torch.manual_seed(1)
    model = randomize_batch_norm(NormalizesByTheBatch())
    model.fc.bias.data.zero_()  # what the images do to the logits is more than rounding
    with pytest.warns(UserWarning, match="logits depend on the others of its batch"):
        captured = capture(model)
    _, summary = build_quantized(captured, QuantizerConfig())
    assert ("BatchNorm without running statistics" in str(summary)) == (len(summary.stayed_float) == 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [NormalizesByTheBatch, Counts])
def test_what_is_captured_writes_no_buffer(make):
    model = randomize_batch_norm(make())
    with warnings.catch_warnings(action="ignore"):
        captured = capture(model)
    teacher = build_teacher(captured)
    student, _ = build_quantized(captured, QuantizerConfig())
    kept = {name: value.clone() for name, value in teacher.module.named_buffers()}
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(teacher(x), model(x))
    student(x)
    for module in (teacher.module, student):
        assert all(torch.equal(kept[name], value) for name, value in module.named_buffers() if name in kept)


class WritesIntoTheImage(Residual):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


@pytest.mark.filterwarnings("error")
def test_a_model_that_writes_into_its_images():
    model = randomize_batch_norm(WritesIntoTheImage())
    teacher = build_teacher(capture(model))
    x = torch.randn(4, 3, 8, 8)
    kept = x.clone()
    logits = teacher(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(logits, model(x))
