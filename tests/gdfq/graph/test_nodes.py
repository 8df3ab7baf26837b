"""Operators beside the layers: which sums are quantized, what an activation is, what is said of all others."""

import pytest
import torch
from small_models import Plain, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

from gdfq.calibrate import check_ranges
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture


class After(Plain):
    """`Plain` with `compute` between the features and the pooling."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.compute = compute
        self.side, self.over = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        return self.fc(self.compute(self, self.relu(self.bn(x))).mean((2, 3)))


def summary_of(model: nn.Module):
    return build_quantized(capture(randomize_batch_norm(model)), QuantizerConfig())[1]


SUMS = {
    "+": lambda m, x: x + m.side(x),
    "+=": lambda m, x: m.side(x).add_(x),
    "torch.add": lambda m, x: torch.add(input=x, other=m.side(x)),
    "and nothing": lambda m, x: (x + m.side(x)) * 1,
    "alpha": lambda m, x: torch.add(x, m.side(x), alpha=2),
    "out": lambda m, x: torch.add(x, m.side(x), out=torch.empty_like(x)),
    "sum": lambda m, x: sum([x, m.side(x)]),
}
NO_SUMS = {
    "a number": lambda m, x: m.side(x) + 1,
    "a parameter": lambda m, x: m.side(x) + m.shift,
    "computed from a parameter": lambda m, x: m.side(x) + m.shift.exp().expand(8, 8, 8),
}


@pytest.mark.parametrize("what", SUMS)
def test_both_sides_of_a_sum_of_activations_are_quantized(what):
    summary = summary_of(After(SUMS[what]))
    image, relu, beside, total, pooled = (entry.name for entry in summary.activations)
    assert (image, relu, beside, pooled) == ("x", "bn", "side", "mean")
    assert total.startswith("add")  # which the pooling reads
    assert not summary.stayed_float


@pytest.mark.parametrize("what", NO_SUMS)
def test_what_is_added_to_an_activation_is_none(what):
    summary = summary_of(After(NO_SUMS[what]))
    image, relu, total, pooled = (entry.name for entry in summary.activations)
    assert (image, relu, pooled) == ("x", "bn", "mean")
    assert total.startswith("add")  # the result, which the pooling reads, and not what is added
    assert [entry.op for entry in summary.stayed_float] == ["add"]


REASONS = {
    "transposed convolution": [lambda m, x: m.over(x), lambda m, x: F.conv_transpose2d(x, torch.ones(8, 8, 1, 1))],
    "matrix product": [
        lambda m, x: x @ x.transpose(2, 3),
        lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.fc.weight.T @ m.fc.weight),
        lambda m, x: F.scaled_dot_product_attention(x, x, x),
        lambda m, x: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)).unsqueeze(3),
        lambda m, x: torch.baddbmm(x.flatten(2), torch.eye(8).expand(x.shape[0], 8, 8), x.flatten(2)).unsqueeze(3),
    ],
    "own statistics": [
        lambda m, x: F.layer_norm(x, [8]),
        lambda m, x: F.group_norm(x, 2),
        lambda m, x: F.instance_norm(x),
        lambda m, x: F.rms_norm(x, [8]),
        lambda m, x: torch.native_layer_norm(x, [8], None, None, 1e-5)[0],
    ],
    "BatchNorm without running statistics": [lambda m, x: F.batch_norm(x, None, None, training=True)],
}


@pytest.mark.filterwarnings("ignore:an image's logits depend")
@pytest.mark.parametrize(
    ("reason", "compute"), [(reason, compute) for reason, computes in REASONS.items() for compute in computes]
)
def test_what_stays_float_has_its_reason(reason, compute):
    assert any(reason in entry.reason for entry in summary_of(After(compute)).stayed_float)


RELUS = {
    "relu": [
        F.relu, lambda x: x.clamp(min=0), lambda x: x.clip(0), lambda x: x.clamp_min(0.0), lambda x: x.relu_(),
        lambda x: F.threshold(x, 0, 0), nn.Threshold(0, 0),
    ],
    "relu6": [F.relu6, lambda x: x.clamp(0, 6), lambda x: F.hardtanh(x, 0, 6), nn.Hardtanh(0, 6)],
    "": [lambda x: x.clamp(max=0), lambda x: F.threshold(x, 1, 0), lambda x: x.clamp(0, 5), F.hardtanh, F.elu],
}  # fmt: skip


@pytest.mark.parametrize(("act", "relu"), [(act, relu) for act, relus in RELUS.items() for relu in relus])
def test_an_activation_is_known_however_it_is_written(act, relu):
    model = Plain()
    model.relu = relu if isinstance(relu, nn.Module) else None
    if model.relu is None:
        del model.relu
        model.relu = relu
    _, summary = build_quantized(capture(randomize_batch_norm(model)), QuantizerConfig(target="paper"))
    assert [entry.fused for entry in summary.activations] == ([f"batch_norm, {act}"] if act else [])


def test_the_place_of_a_broken_range_is_named():
    model = After(lambda m, x: x)
    model.activation_quantizers = nn.Identity()  # ours get another name
    student, _ = build_quantized(capture(randomize_batch_norm(model)), QuantizerConfig())
    with pytest.raises(GdfqError, match="first at 'x'"):
        check_ranges(student)
