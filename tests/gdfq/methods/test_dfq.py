"""DFQ: equalization changes no output (float64); statistics and corrections against integrals and samples."""

import math

import pytest
import torch
from quantizer_oracle import quantize, to_numpy
from scipy import integrate, stats
from small_models import Plain, Residual, TwoHeads, capture_once, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import Config, QuantizerConfig
from gdfq.graph import build_quantized, capture
from gdfq.images.noise import gaussian_images
from gdfq.methods.dfq import (
    absorb_high_biases,
    activated,
    channel_statistics,
    correct_biases,
    dfq,
    equalizable_pairs,
    equalize,
    normal,
    replace_relu6,
    take_ranges,
)
from gdfq.nn import BatchNormAct, activation_quantizers
from gdfq.run import folder as run_folder

NOISE = list(gaussian_images((3, 8, 8), 32, 16, 0, torch.device("cpu")))


class Chain(nn.Module):
    """Everything that a pair can be: depthwise, grouped and plain convolutions, BN with and without ReLU, max pooling,
    negative gammas; channels of very different scale."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.conv4 = nn.Conv2d(12, 6, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 9, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.depthwise(x)))
        x = F.max_pool2d(self.bn3(self.grouped(x)), 2)
        return self.fc(F.relu(self.bn4(self.conv4(x))).flatten(1))


PAIRS = [("conv1", "depthwise"), ("depthwise", "grouped"), ("grouped", "conv4")]


def scattered(model: nn.Module) -> nn.Module:
    """With channels that differ by a factor of a hundred, one that nobody makes, and one that nobody reads."""
    randomize_batch_norm(model)
    with torch.no_grad():
        for module in (model.bn1, model.bn2, model.bn3):
            module.weight.mul_(10 ** torch.linspace(-1, 1, len(module.weight)))
            module.weight[1] *= -1
        model.bn3.weight[2] = 0
        model.conv4.weight[:, 5] = 0
    return model


def student_of(model: nn.Module, **quantizer):
    return build_quantized(replace_relu6(capture(model)), QuantizerConfig(**quantizer))[0]


def names(pairs) -> list[tuple[str, str]]:
    return [tuple(layer.weight.removesuffix(".weight") for layer in (pair.first, pair.second)) for pair in pairs]


def in_float64(model: nn.Module, student: nn.Module) -> nn.Module:
    """The float model with the student's parameters: what it computes before anything is quantized."""
    state = {name: value for name, value in student.state_dict().items() if name in model.state_dict()}
    changed = type(model)().double().eval()
    changed.load_state_dict(state, strict=False)
    return changed


# --- equalization


@pytest.mark.parametrize(("make", "pairs"), [(Chain, PAIRS), (Residual, [("depthwise", "grouped")]), (TwoHeads, [])])
def test_pairs_are_layers_without_a_branch_between(make, pairs):
    captured = capture_once(make)
    for target in ("onnx", "paper"):
        student = build_quantized(replace_relu6(captured), QuantizerConfig(target=target))[0]
        assert names(equalizable_pairs(student)) == pairs


def test_a_channel_cannot_be_scaled_through_a_relu6():
    student = build_quantized(capture_once(Residual), QuantizerConfig())[0]
    assert equalizable_pairs(student) == []


def test_parameters_that_are_used_twice_make_no_pair():
    class Shared(Chain):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(self.bn2(self.depthwise(F.relu(self.bn2(self.depthwise(x))))))
            x = F.max_pool2d(self.bn3(self.grouped(x)), 2)
            return self.fc(F.relu(self.bn4(self.conv4(x))).flatten(1))

    assert names(equalizable_pairs(student_of(randomize_batch_norm(Shared())))) == [("grouped", "conv4")]


@pytest.mark.parametrize("target", ["onnx", "paper"])
def test_the_equalized_network_computes_the_same(target):
    model = scattered(Chain()).double()
    student = student_of(scattered(Chain()), target=target).double()
    student.load_state_dict(model.state_dict(), strict=False)
    equalize(student, equalizable_pairs(student))
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    changed = in_float64(model, student)
    assert not torch.allclose(changed.bn1.weight, model.bn1.weight, rtol=0.1)
    torch.testing.assert_close(changed(x), model(x), rtol=1e-9, atol=1e-9)


def test_both_sides_of_every_channel_have_the_same_range():
    untouched = scattered(Chain())
    student = student_of(untouched)
    equalize(student, equalizable_pairs(student))

    def folded(layer: str, bn: str, channel: int) -> float:
        norm = getattr(student, bn)
        scale = norm.weight[channel].abs() / (norm.running_var[channel] + 1e-5).sqrt()
        return (scale * getattr(student, layer).weight[channel].abs().max()).item()

    for channel in range(8):
        read = student.depthwise.weight[channel].abs().max().item()
        assert folded("conv1", "bn1", channel) == pytest.approx(read, rel=2e-3)
        group, place = divmod(channel, 4)
        read = student.grouped.weight[6 * group : 6 * group + 6, place].abs().max().item()
        assert folded("depthwise", "bn2", channel) == pytest.approx(read, rel=2e-3)
    for channel in range(12):
        read = student.conv4.weight[:, channel].abs().max().item()
        if channel in (2, 5):
            assert torch.equal(student.conv4.weight[:, channel], untouched.conv4.weight[:, channel])
        else:
            assert folded("grouped", "bn3", channel) == pytest.approx(read, rel=2e-3)


# --- absorption


class Biased(nn.Module):
    """Channels that ReLU never cuts, read by a layer without padding."""

    in_size = (4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.next = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn2(self.next(F.relu(self.bn1(self.conv(x))))).mean((2, 3))


@pytest.mark.parametrize("into", ["bias", "running_mean"])
def test_what_a_channel_never_falls_below_moves_into_the_next_layer(into):
    model = randomize_batch_norm(Biased())
    if into == "bias":
        model.next = nn.Conv2d(4, 6, 3, groups=2)
    with torch.no_grad():
        model.bn1.bias.copy_(torch.tensor([5.0, 0.2, 3.0, -1.0]))
        model.bn1.weight.copy_(torch.tensor([0.5, 1.0, -0.8, 1.0]))
    student = student_of(model)
    absorb_high_biases(student, equalizable_pairs(student))
    assert student.bn1.bias.tolist() == pytest.approx([1.5, 0.2, 2.4, -1.0])
    assert torch.equal(student.bn2.running_mean, model.bn2.running_mean) == (into == "bias")
    changed = randomize_batch_norm(Biased()).double()
    changed.next = nn.Conv2d(4, 6, 3, groups=2, bias=into == "bias").double()
    changed.load_state_dict(student.state_dict(), strict=False)
    # Images that keep the channels within two deviations of their mean, where nothing is cut.
    x = torch.randn(64, 3, 4, 4, dtype=torch.float64)
    norm = model.double().bn1
    deviations = (norm(model.conv(x)) - norm.bias[:, None, None]) / norm.weight[:, None, None]
    x = x * 2 / deviations.abs().max()
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-5)


# --- statistics


@pytest.mark.parametrize(
    ("act", "low", "high"), [("relu", 0, math.inf), ("relu6", 0, 6), ("none", -math.inf, math.inf)]
)
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1.5, 0.7), (-2, 1), (5.5, 2), (-9, 1), (8, 0.1), (0.5, 0)])
def test_moments_behind_an_activation_are_the_integrals(act, low, high, mean, deviation):
    given = normal(*(torch.tensor([value], dtype=torch.float64) for value in (mean, deviation**2)))
    result = activated(given, act)

    def expectation(power: int) -> float:
        if deviation == 0:
            return min(max(mean, low), high) ** power
        density = stats.norm(mean, deviation).pdf
        ends = [mean - 12 * deviation, mean + 12 * deviation]
        corners = [point for point in (low, high) if ends[0] < point < ends[1]]
        return integrate.quad(lambda x: min(max(x, low), high) ** power * density(x), *ends, points=corners or None)[0]

    assert result.mean.item() == pytest.approx(expectation(1), abs=1e-6)
    assert result.variance.item() == pytest.approx(expectation(2) - expectation(1) ** 2, abs=1e-6)
    assert result.lower.item() == pytest.approx(min(max(mean - 6 * deviation, low), high))
    assert result.upper.item() == pytest.approx(min(max(mean + 6 * deviation, low), high))


class Branches(nn.Module):
    """BN outputs that are added, concatenated and pooled before they are read."""

    in_size = (4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 4, 1, bias=False)
        self.bn_left = nn.BatchNorm2d(4)
        self.right = nn.Conv2d(4, 4, 1, bias=False)
        self.bn_right = nn.BatchNorm2d(4, affine=False)
        self.next = nn.Conv2d(8, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        left, right = self.bn_left(self.left(x[:, :4])), self.bn_right(self.right(x[:, 4:]))
        both = torch.cat([F.relu(left + right), F.relu6(left)], 1)
        both = F.relu(self.bn(self.next(both)))
        return self.fc(F.avg_pool2d(both, 4).flatten(1))


def branches() -> nn.Module:
    """With independent normal channels before the first BNs, for images of N(0, 1) noise."""
    model = randomize_batch_norm(Branches())
    with torch.no_grad():
        for conv, norm in ((model.left, model.bn_left), (model.right, model.bn_right)):
            conv.weight.copy_(torch.eye(4)[:, :, None, None])
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - 1e-5)
    return model


def test_statistics_are_those_of_samples():
    model = branches()
    student = build_quantized(capture(model, channels=8), QuantizerConfig())[0]
    known = {str(node): values for node, values in channel_statistics(student).items()}
    (joined,) = (values for name, values in known.items() if name == "cat")
    images = torch.randn(50_000, 8, 4, 4)
    with torch.no_grad():
        left, right = model.bn_left(model.left(images[:, :4])), model.bn_right(model.right(images[:, 4:]))
        samples = torch.cat([F.relu(left + right), F.relu6(left)], 1)
    error = 5 * samples.std((0, 2, 3)) / math.sqrt(images[:, 0].numel())
    assert ((joined.mean - samples.mean((0, 2, 3))).abs() <= error).all()
    torch.testing.assert_close(joined.variance.float(), samples.var((0, 2, 3)), rtol=0.02, atol=0)


def test_ranges_are_six_deviations_cut_by_the_activation():
    model = randomize_batch_norm(Plain())
    student = student_of(model, target="paper")
    take_ranges(student)
    (quantizer,) = activation_quantizers(student).values()
    channels = zip(model.bn.bias.tolist(), model.bn.weight.tolist(), strict=True)
    assert quantizer.range.tolist() == pytest.approx(
        [0, max(beta + 6 * abs(gamma) for beta, gamma in channels)], rel=1e-4
    )


def test_what_batch_norm_says_nothing_of_is_calibrated():
    student = student_of(randomize_batch_norm(Residual()))
    dfq(student, NOISE)
    image, *others = activation_quantizers(student).values()
    assert image.range.tolist() == pytest.approx([NOISE[0].min().item(), NOISE[0].max().item()], rel=0.2)
    assert all(quantizer.range.isfinite().all() for quantizer in others)


# --- bias correction


def test_correction_takes_the_mean_error_away():
    model = branches()
    student = build_quantized(capture(model, channels=8), QuantizerConfig(weight_bits=2))[0]
    images = torch.randn(20_000, 8, 4, 4)
    with torch.no_grad():
        left, right = model.bn_left(model.left(images[:, :4])), model.bn_right(model.right(images[:, 4:]))
        inputs = torch.cat([F.relu(left + right), F.relu6(left)], 1)
        rows = to_numpy(model.next.weight.flatten(1))
        quantized = torch.tensor(quantize(rows, rows.min(1, keepdims=True), rows.max(1, keepdims=True), 2))
        error = F.conv2d(inputs, quantized[:, :, None, None]) - F.conv2d(inputs, model.next.weight)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    correct_biases(student)
    moved = student.bn.running_mean - before["bn.running_mean"]
    uncertainty = 5 * error.std((0, 2, 3)) / math.sqrt(inputs[:, 0].numel())
    assert (error.mean((0, 2, 3)).abs() > 10 * uncertainty).any()
    assert ((moved - error.mean((0, 2, 3))).abs() <= uncertainty + 1e-4).all()
    # The classifier has a bias of its own; the first layers read the image, of which nothing is known.
    assert not torch.equal(student.fc.bias, before["fc.bias"])
    assert torch.equal(student.bn_left.running_mean, before["bn_left.running_mean"])


# --- a network


@pytest.mark.parametrize(("make", "target"), [(Plain, "paper"), (TwoHeads, "onnx"), (Residual, "onnx")])
def test_it_is_a_method_like_any_other(make, target, tmp_path):
    changes = {"method": "dfq", "run.held_out_images": 16, "schedule.range_batches": 1, "schedule.batch_size": 8}
    config = Config.load("cifar", {**changes, "quantizer.target": target})
    model = randomize_batch_norm(make())
    result = gdfq.quantize(model, config, run_dir=tmp_path / "run", progress=False)
    x = torch.randn(4, 3, 8, 8)
    assert result.model(x).isfinite().all()
    acts = [module.act for module in result.model.modules() if isinstance(module, BatchNormAct)]
    assert "relu6" not in acts
    assert not any("relu6" in entry.fused for entry in result.report.summary.activations)
    read = gdfq.load_quantized(tmp_path / "run" / run_folder.MODEL, make().eval())
    assert torch.equal(read(x), result.model(x))


def test_equalization_brings_a_network_of_scattered_channels_nearer_to_float():
    model = scattered(Chain())
    x = torch.randn(256, 3, 8, 8)
    model.train()(x)  # statistics that are the network's own
    model.eval()
    captured = capture(model)
    errors = {}
    for equalized in (False, True):
        student = build_quantized(captured, QuantizerConfig(weight_bits=8, activation_bits=8))[0]
        if equalized:
            equalize(student, equalizable_pairs(student))
        calibrate(student, [x])
        with torch.no_grad():
            errors[equalized] = (student(x) - model(x)).square().mean().item()
    assert errors[True] < 0.8 * errors[False]
