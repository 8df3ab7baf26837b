"""The ONNX writer against Q: in onnxruntime a file gives Q's codes and logits, and runs in integers as promised."""

import functools
import inspect
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from small_models import Plain, Residual, TwoHeads, Unusual, capture_once, randomize_batch_norm
from torch import fx, nn
from torch.nn import functional as F

from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.demo import teacher
from gdfq.deploy import Normalization, write
from gdfq.deploy.grids import Grid
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture
from gdfq.graph.image import mark_image

SHAPE = (3, 8, 8)
TARGETS = {
    "onnx": "onnx",
    "int4-symmetric": "int4-symmetric",
    "paper": "paper",
    "signed activations": {"extends": "onnx", "activation_scheme": "symmetric"},
}


class Branches(nn.Module):
    """Depthwise, pools, nested concatenations, channels shuffled, ReLU6, a gate, a convolution on a pooled map."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(20, 8, 1)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.bn1(self.stem(x))), 3, 2, ceil_mode=True)
        x = x * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        y = torch.cat([F.relu6(self.bn2(self.depthwise(x))), F.avg_pool2d(x, 3, 1, 1)], 1)
        y = torch.cat([y, self.grouped(F.channel_shuffle(x, 2))], 1)
        y = F.relu(self.bn3(self.last(y)))
        return self.head(y.mean((2, 3), keepdim=True)).flatten(1)


class Preactivation(nn.Module):
    """BN ahead of the convolutions."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(F.relu(self.bn1(x)))
        return self.fc(x.mean((2, 3)))


def images(count=3, seed=1):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@functools.cache
def captured_of(make, prepare=None):
    torch.manual_seed(0)
    model = randomize_batch_norm(make())
    if prepare is not None:
        prepare(model)
    return capture(model)


def student_of(make=Residual, target="onnx", bits=(4, 4), prepare=None):
    settings = {"quantizer.weight_bits": bits[0], "quantizer.activation_bits": bits[1], "quantizer.target": target}
    student, _ = build_quantized(captured_of(make, prepare), Config.load("cifar", settings).quantizer)
    calibrate(student, [images(8)])
    return student.eval()


def session_of(model, optimized=None):
    model = onnx.ModelProto.FromString(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.optimized_model_filepath = "" if optimized is None else str(optimized)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, x):
    """The logits."""
    return session_of(model).run(None, {"images": x.numpy()})[0]


def run_apart(written, x, levels):
    """The logits and the codes of every quantizer, where all that reads codes reads those of Q, `levels`, instead."""
    model = onnx.ModelProto.FromString(written.model.SerializeToString())
    tensors = {codes.tensor: (codes.grid, levels[name]) for name, codes in written.codes.items()}
    for node in model.graph.node:
        node.input[:] = [f"given_{name}" if name in tensors else name for name in node.input]
    for name, (grid, given) in tensors.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(grid.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(f"given_{name}", kind, given.shape))
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = session_of(model)
    given = {f"given_{name}": given.astype(grid.dtype) for name, (grid, given) in tensors.items()}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, given | {"images": x.numpy()}), strict=True))
    return found["logits"], {name: found[codes.tensor] for name, codes in written.codes.items()}


def operators_of(model, path):
    """Of the graph that onnxruntime runs, by kind."""
    session_of(model, optimized=path)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


class Seeing(fx.Interpreter):
    """Runs Q and keeps what its quantizers gave."""

    def __init__(self, student, names):
        super().__init__(student)
        self.names = names
        self.seen = {}

    def run_node(self, n):
        result = super().run_node(n)
        name = next((name for name in (n.target, f"{n.target}.quantizer") if name in self.names), None)
        if name is not None:
            self.seen[name] = result.detach().numpy().astype(np.float64)
        return result


def assert_same(student, written, x=None, share=0.001):
    """Each layer gives Q's codes for Q's codes, but for a few that lie between two for all that float32 can tell."""
    x = images() if x is None else x
    onnx.checker.check_model(written.model, full_check=True)
    seeing = Seeing(student, written.codes)
    with torch.no_grad():
        expected = seeing.run(x).numpy()
    levels = {
        name: np.rint(seeing.seen[name] / codes.grid.step) + codes.grid.zero_point
        for name, codes in written.codes.items()
    }
    logits, codes = run_apart(written, x, levels)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    different = 0
    for name, found in codes.items():
        grid = written.codes[name].grid
        assert grid.lowest <= found.min() <= found.max() <= grid.highest
        assert np.abs(found - levels[name]).max() <= 1
        different += (found != levels[name]).sum()
    assert different <= share * sum(map(np.size, codes.values()))
    tolerance = 0.3 if different else 1e-5  # what one code moves grows from layer to layer
    np.testing.assert_allclose(run(written.model, x), expected, rtol=0, atol=tolerance * np.abs(expected).max())


MODELS = {make.__name__: make for make in (Plain, Residual, TwoHeads, Unusual, Branches, Preactivation)}


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_q_does(name, bits):
    student = student_of(MODELS[name], bits=bits)
    written = write(student, SHAPE)
    share = 0.01 if bits == (2, 3) else 0.001  # of few levels, many sums of two are the same, or all of them at once
    assert_same(student, written, share=share)
    assert_same(student, written, images(1), share)


@pytest.mark.parametrize("target", list(TARGETS)[1:])
def test_whatever_the_target_is(target):
    student = student_of(Branches, TARGETS[target], (4, 4))
    assert_same(student, write(student, SHAPE))


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)], ids=str)
@pytest.mark.parametrize(
    ("make", "in_integers", "in_float"),
    [
        (Residual, {"QLinearConv": 4, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}, []),
        (
            Branches,
            {"QLinearConv": 4, "QGemm": 3, "QLinearConcat": 1, "QLinearAveragePool": 1, "QLinearGlobalAveragePool": 2},
            ["Mul", "Sigmoid"],
        ),
        (Preactivation, {"QLinearConv": 2, "QLinearAdd": 1, "QGemm": 1}, ["BatchNormalization"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_layers_sums_and_pools_run_in_integers(make, in_integers, in_float, bits, tmp_path):
    written = write(student_of(make, bits=bits), SHAPE)
    found = operators_of(written.model, tmp_path / "optimized.onnx")
    assert {name: found[name] for name in in_integers} == in_integers
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool", "Concat"} & set(found)
    assert sorted({entry.op for entry in written.floats}) == in_float
    assert [layer.name for layer in written.layers if layer.stays_float] == []


def test_concatenated_layers_need_no_quantizer_of_their_own(tmp_path):
    """Rounding the concatenation is concatenating what is rounded, each part behind its layer."""
    target = {"extends": "onnx", "quantized": ["layer_inputs"]}
    student = student_of(Branches, target)
    written = write(student, SHAPE)
    assert_same(student, written)
    assert operators_of(written.model, tmp_path / "optimized.onnx")["Conv"] == 0


def test_a_file_is_a_fraction_of_the_float_one():
    model = teacher()
    student, _ = build_quantized(capture(model, 28), Config.load("cifar").quantizer)
    calibrate(student, [torch.randn(4, 1, 28, 28)])
    of_parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert len(write(student, (1, 28, 28)).model.SerializeToString()) < of_parameters / 6


def decoded(model):
    """The weight of each layer by its node's name, decoded by hand: two of 4 bits are in a byte, the first one low."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}

    def value(name):
        if name in stored and stored[name].data_type == TensorProto.INT4:
            raw = np.frombuffer(stored[name].raw_data, np.uint8)
            nibbles = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[: int(np.prod(stored[name].dims))].astype(int)
            return np.where(nibbles > 7, nibbles - 16, nibbles).reshape(stored[name].dims)
        if name in stored:
            return onnx.numpy_helper.to_array(stored[name]).astype(float)
        node = made[name]
        given = [value(source) for source in node.input]
        if node.op_type == "Cast":
            return given[0]
        if node.op_type == "Sub":
            return given[0] - given[1]
        assert node.op_type == "DequantizeLinear"
        return given[0] * given[1].reshape(-1, *[1] * (given[0].ndim - 1))

    return {node.name: value(node.input[1]) for node in model.graph.node if node.op_type in ("Conv", "Gemm")}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_stored_weights_are_those_of_q(bits):
    student = student_of(Residual, bits=(bits, 4))
    model = write(student, SHAPE).model
    packed = [tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT4]
    assert (len(packed) > 0) == (bits <= 4)
    found = decoded(model)
    module = student.get_submodule("weight_quantizers.stored")
    names = ["conv1", "conv2", "depthwise", "grouped", "fc"]
    weights = [student.get_submodule(name).weight for name in names]
    state = student.state_dict()
    for name, weight, quantized in zip(names, weights, module(weights), strict=True):
        expected = quantized.detach().numpy().astype(float)
        if name != "fc":
            bn = {"conv1": "bn1", "conv2": "bn2", "depthwise": "bn3", "grouped": "bn4"}[name]
            factor = state.get(f"{bn}.weight", torch.ones(len(weight))) / (state[f"{bn}.running_var"] + 1e-5).sqrt()
            expected *= factor.numpy().reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7)


def set_gamma(model):
    with torch.no_grad():
        model.bn1.weight[:4] = torch.tensor([-1.0, 0.0, 1e-10, -1e-10])
        model.bn2.weight[:3] = torch.tensor([-0.5, 0.0, 1e-20])
        model.bn3.weight.neg_()


@pytest.mark.parametrize("bits", [(4, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("target", ["onnx", "int4-symmetric"])
def test_gamma_may_be_negative_or_nothing(target, bits):
    if target == "onnx" or bits[0] <= 4:
        student = student_of(Residual, target, bits, prepare=set_gamma)
        assert_same(student, write(student, SHAPE))


def test_pixels_come_as_a_camera_gives_them():
    student = student_of()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), np.uint8)
    normalized = (pixels.astype(np.float32) / 255 - np.float32(mean).reshape(3, 1, 1)) / np.float32(std).reshape(
        3, 1, 1
    )
    expected = run(write(student, SHAPE).model, torch.from_numpy(normalized))
    found = run(write(student, SHAPE, pixels=Normalization(mean, std)).model, torch.from_numpy(pixels))
    np.testing.assert_array_equal(found, expected)


def test_the_file_says_what_it_is():
    written = write(student_of(), SHAPE, metadata={"classes": "5", "target": "onnx"})
    model = written.model
    assert {entry.key: entry.value for entry in model.metadata_props} == {"classes": "5", "target": "onnx"}
    assert (model.ir_version, model.opset_import[0].version, model.producer_name) == (10, 21, "gdfq")
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("images", "logits")
    shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert shape == ["N", 3, 8, 8]
    names = ["conv1", "conv2", "depthwise", "grouped", "fc"]
    assert [(layer.name, layer.node) for layer in written.layers] == [(name, name) for name in names]
    assert set(names) < {node.name for node in model.graph.node}


@pytest.mark.parametrize(("bits", "can"), [((4, 8), False), ((4, 4), False), ((8, 8), True), ((8, 4), False)])
def test_layers_that_can_saturate_16_bits_are_known(bits, can):
    layers = write(student_of(bits=bits), SHAPE).layers
    assert {layer.can_saturate for layer in layers if layer.name not in ("conv1", "fc")} == {can}


def test_a_zero_point_beyond_the_codes_moves_them():
    """Eq. 6 does not force zero into the range."""
    student = student_of(target="paper")
    for name, module in student.named_modules():
        if name.startswith("activation_quantizers") and hasattr(module, "range"):
            module.range.copy_(torch.tensor([0.5, 2.0]))
    written = write(student, SHAPE)
    assert {codes.grid.lowest for codes in written.codes.values()} == {5}
    assert_same(student, written, share=0.01)


def test_a_zero_point_that_no_byte_holds_stays_float():
    student = student_of(target="paper")
    name = next(name for name, module in student.named_modules() if hasattr(module, "range"))
    student.get_submodule(name).range.copy_(torch.tensor([20.0, 20.5]))
    written = write(student, SHAPE)
    assert name not in written.codes
    assert "activation quantizer" in {entry.op for entry in written.floats}
    assert_same(student, written, share=0.01)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(0.1, 3, 0, 15), Grid(0.1, 3, 0, 15)),
        (Grid(0.1, -13, 0, 15), Grid(0.1, 0, 13, 28)),
        (Grid(0.1, 20, 0, 15), Grid(0.1, 20, 0, 15)),
        (Grid(0.1, 0, -7, 7), Grid(0.1, 0, -7, 7)),
        (Grid(0.1, -1, 0, 255), None),
        (Grid(0.1, 256, 0, 15), None),
    ],
)
def test_codes_fit_into_a_byte(grid, expected):
    assert grid.in_a_byte() == expected


# --- operators, each alone ---


def _pooled(x):
    return F.adaptive_avg_pool2d(x, (3, 5)) - F.adaptive_max_pool2d(x, (3, 5))


OPERATORS = {
    "adaptive pools": _pooled,
    "average pools": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "average pool, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pool of one's own divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "bmm": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "celu": lambda x: F.celu(x, 0.7),
    "chunk": lambda x: torch.cat(x.chunk(2, 2)[::-1], 2),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "constants of the batch": lambda x: torch.cat([x, torch.ones_like(x[:, :1]), x.new_zeros(x.shape[0], 1, 8, 9)], 1),
    "division": lambda x: x / (1 + x.abs()),
    "elu": lambda x: F.elu(x, 0.3),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 9),
    "flip and roll": lambda x: x.flip(2, 3).roll(2, 3),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "group norm": lambda x: F.group_norm(x, 2),
    "hard": lambda x: F.hardswish(x) * F.hardsigmoid(x) + F.hardtanh(x, -0.1, 0.4),
    "index": lambda x: x[:, [3, 1, 1]],
    "instance norm": lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt(),
    "layer norm": lambda x: F.layer_norm(x, (9,)),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "log": lambda x: x.abs().add(1).log() + x.exp().reciprocal(),
    "max of two": lambda x: torch.maximum(x, -x).sqrt() + torch.minimum(x, 0.5 * x),
    "max over channels": lambda x: x.max(1, keepdim=True)[0] + x.amin(1, keepdim=True),
    "max pools": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max pool, dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "mish": lambda x: F.mish(x) + F.softplus(x),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad, reflect": lambda x: F.pad(x, (1, 2, 3, 1), mode="reflect"),
    "pad, replicate": lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate"),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "powers": lambda x: x**2 + x.abs() ** 1.5 + (x**2 + 1).rsqrt(),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4])),
    "relu6": lambda x: F.relu6(4 * x),
    "resize": lambda x: F.interpolate(x, size=(5, 12), mode="bilinear"),
    "resize to corners": lambda x: F.interpolate(x, size=(5, 12), mode="bilinear", align_corners=True),
    "resize to the nearest": lambda x: F.interpolate(x, size=(5, 12)),
    "reverse subtraction": lambda x: 1 - torch.rsub(x, 2, alpha=3),
    "select": lambda x: x[:, 1] + x[:, -1],
    "silu": lambda x: F.silu(x).tanh(),
    "slices": lambda x: x[:, 1:, ::2, -3:],
    "softmax": lambda x: x.softmax(1) + F.log_softmax(x, 2),
    "split": lambda x: torch.cat([part.mean(1, keepdim=True) for part in x.split([1, 3], 1)], 1),
    "stack": lambda x: torch.stack([x, 2 * x], 2),
    "sum": lambda x: x.sum((1, 2)),
    "threshold": lambda x: F.threshold(x, 0.3, 0.1),
    "tile": lambda x: x.repeat(1, 2, 1, 1),
    "transpose": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4).mT,
    "transposed convolution": lambda x: F.conv_transpose2d(
        x, torch.arange(72.0).view(4, 2, 3, 3).sin(), stride=2, padding=1, output_padding=1
    ),
    "unbind": lambda x: x.unbind(1)[2],
    "where": lambda x: torch.where(x > 0.2, x, 3.0).masked_fill(x < -1, 2.0),
    "attention": lambda x: F.scaled_dot_product_attention(x.flatten(2), x.flatten(2), x.flatten(2)),
    "clamp between tensors": lambda x: torch.clamp(
        x, x.mean((2, 3), True), torch.tensor([0.1, 0.5, 1.0, 2.0]).view(4, 1, 1)
    ),
    "cosine similarity": lambda x: F.cosine_similarity(x, x.flip(3), 1),
    "cumulative sum": lambda x: x.cumsum(2),
    "deviation": lambda x: x / (x.std((2, 3), keepdim=True) + 0.1) - torch.var_mean(x, 1, keepdim=True)[1],
    "division, rounded": lambda x: (
        torch.div(3 * x, 0.7, rounding_mode="floor") + torch.div(3 * x, 0.7, rounding_mode="trunc") + x // 0.3
    ),
    "einsum": lambda x: torch.einsum("nchw,cd->ndhw", x, torch.arange(8.0).view(4, 2).cos()),
    "einsum, as many as images": lambda x: torch.einsum("nchw,ndhw->ncd", x[:, :2], x[:, 2:]),
    "exponentials": lambda x: x.expm1() + x.exp2() + torch.erfc(x) + x.tan().atan() + x.sinh(),
    "gather": lambda x: x.gather(1, torch.tensor([2, 0]).view(1, 2, 1, 1).expand(x.shape[0], 2, 8, 9)),
    "gated linear unit": lambda x: F.glu(x, 1),
    "grid sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "index of the greatest": lambda x: x * (x.argmax(1, keepdim=True) > 1) + x.argmin(2, keepdim=True),
    "interpolation": lambda x: (
        torch.lerp(x, x.flip(2), 0.3) + torch.addcmul(x, x, x, value=0.2) + torch.addcdiv(x, x, x.abs() + 1)
    ),
    "logarithms": lambda x: x.abs().log1p() + (x.abs() + 1).log2() + (x.abs() + 1).log10() + F.logsigmoid(x),
    "masks": lambda x: x * ((x > 0) & (x < 1) | ~(x != x.flip(3))) + (x > 0.5).sum((2, 3), keepdim=True),
    "norms": lambda x: F.normalize(x, dim=1) + x / x.norm(p=1, dim=(2, 3), keepdim=True),
    "patches": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "product": lambda x: x * x.prod(1, keepdim=True),
    "remainders": lambda x: x.remainder(0.3) + x.fmod(0.4) + x.trunc() + (3 * x).frac(),
    "rms norm": lambda x: F.rms_norm(x, (9,)),
    "rrelu": lambda x: F.rrelu(x) + F.selu(x) + F.softplus(x, 3.0, 1.5),
    "square": lambda x: (
        x.square().square() + F.normalize(torch.var_mean(x.square(), 1)[0].square(), dim=2).unsqueeze(1)
    ),
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x).flatten(1)


def graph_of(function):
    program = torch.export.export(
        Function(function), (torch.randn(2, 4, 8, 9),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).run_decompositions({})
    module = program.module(check_guards=False)
    graph = fx.Graph()
    (result,) = graph.graph_copy(module.graph, {})
    graph.output(result)
    result = fx.GraphModule(module, graph)
    mark_image(result)
    return result


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    module = graph_of(OPERATORS[name])
    written = write(module, (4, 8, 9))
    onnx.checker.check_model(written.model, full_check=True)
    for count in (1, 3):
        x = torch.randn(count, 4, 8, 9)
        found = run(written.model, x)
        np.testing.assert_allclose(found, OPERATORS[name](x).flatten(1), rtol=1e-4, atol=1e-5)


class Sorted(Plain):
    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)).sort(1).values)


def test_an_unknown_operator_is_named_with_its_place():
    line = inspect.getsourcelines(Sorted.forward)[1] + 2
    with pytest.raises(GdfqError, match=rf"sort, at .*test_writer.py:{line}.*does not know the operator sort"):
        write(student_of(Sorted), SHAPE)


# --- bad input ---


def test_ranges_that_were_never_observed_are_named():
    student, _ = build_quantized(capture_once(Plain), Config.load("cifar").quantizer)
    with pytest.raises(GdfqError, match="NaN or Inf in the activations"):
        write(student, SHAPE)


def test_nan_in_a_weight_is_named():
    student = student_of(Plain)
    with torch.no_grad():
        student.get_parameter("conv.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(GdfqError, match=r"NaN or Inf in conv\.weight"):
        write(student, SHAPE)


def test_without_onnx_it_says_what_to_install(monkeypatch):
    student = student_of(Plain)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(GdfqError, match=r"this needs `pip install gdfq\[export\]`"):
        write(student, SHAPE)


def test_an_opset_without_4_bits_is_refused():
    with pytest.raises(GdfqError, match="opset 21 and later"):
        write(student_of(Plain), SHAPE, opset=20)
