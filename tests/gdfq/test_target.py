"""What a target makes of the quantizer: where it stands, which levels it has, what a bias is a multiple of."""

import itertools

import pytest
import torch
from distinct_inputs import distinct_inputs
from small_models import Plain, Residual, TwoHeads, capture_once
from torch import nn
from torch.nn import functional as F

from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, quantized_layers
from gdfq.graph.query import batch_norm_of, quantizer_of
from gdfq.nn import activation_quantizers
from gdfq.registry import TARGETS
from gdfq.target import target_of

DEPLOYED = [name for name in TARGETS if name != "paper"]


class Dense(nn.Module):
    """Concatenations that are concatenated again, one of them read by a convolution in between, and an average pool."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, self.second(x)], 1)
        return self.fc(F.avg_pool2d(x, 4).flatten(1))


def student_of(make=Residual, target="onnx", **changes):
    config = Config.load("cifar", {"quantizer.target": target, **changes}).quantizer
    student, summary = build_quantized(capture_once(make), config)
    calibrate(student, [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
    return student, summary


class Seeing(torch.fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, student, images):
        super().__init__(student, garbage_collect_values=False)
        self.run(images)

    def __getitem__(self, node):
        return self.env[node].detach().double() if node is not None else None


def input_step(student, layer) -> torch.Tensor:
    node = layer.node.args[0]
    while quantizer_of(student, node) is None:
        node = node.args[0]
    return quantizer_of(student, node).grid().step.double()


def off_grid(values: torch.Tensor, unit: torch.Tensor) -> float:
    """How far the values, channels last, are from whole numbers of units at most, in units."""
    levels = values / unit
    return (levels - levels.round()).abs().max().item()


@pytest.mark.parametrize("target", DEPLOYED)
@pytest.mark.parametrize(("make", "bits"), [*itertools.product([Residual, TwoHeads, Dense, Plain], [4, 2])])
def test_what_a_layer_gives_is_a_whole_number_of_its_steps(target, make, bits):
    student, _ = student_of(make, target, **{"quantizer.weight_bits": bits})
    seen = Seeing(student, torch.randn(4, 3, 8, 8))
    layers = quantized_layers(student)
    assert layers
    for layer in layers:
        step = input_step(student, layer)
        assert off_grid(seen[layer.node.args[0]], step) < 1e-4
        unit = step * layer.quantizer.grid(layer.index, student.get_parameter(layer.weight)).step
        y, user = seen[layer.node], next(iter(layer.node.users))
        batch_norm = batch_norm_of(student, user)
        if batch_norm is not None and len(layer.node.users) == 1:
            mean, variance, gamma, beta = (seen[arg] for arg in user.args[1:])
            y = F.batch_norm(y, mean, variance, gamma, beta, eps=batch_norm.eps)
            unit = unit * (1.0 if gamma is None else gamma.abs()) / (variance + batch_norm.eps).sqrt()
        assert off_grid(y.movedim(1, -1), unit) < 1e-2, layer.weight


@pytest.mark.parametrize("target", DEPLOYED)
@pytest.mark.parametrize(
    ("make", "in_bytes"),
    [  # the image; what an add, a concatenation or an average pool reads and no layer does
        (Residual, {"x", "bn2", "bn4"}),
        (Dense, {"x", "first", "second", "cat_1"}),
        (TwoHeads, {"x", "bn_a", "bn_b", "next"}),
    ],
)
def test_what_no_weight_is_multiplied_with_has_eight_bits(target, make, in_bytes):
    for few in (2, 4):
        _, summary = student_of(make, target, **{"quantizer.activation_bits": few})
        found = {entry.name: entry.bits for entry in summary.activations}
        assert found == {name: 8 if name in in_bytes else few for name in found}
        assert in_bytes < found.keys()
    table = {"extends": target, "unweighted_bits": 3}
    _, summary = student_of(make, table, **{"quantizer.activation_bits": 4})
    assert {entry.bits for entry in summary.activations if entry.name != "x"} == {4}, "never fewer than the others"


@pytest.mark.parametrize("target", DEPLOYED)
def test_zero_is_a_level_of_every_quantizer(target):
    student, _ = student_of(TwoHeads, target)
    for quantizer in activation_quantizers(student).values():
        for low, high in ((0.5, 2.0), (-2.0, -0.5), (-0.3, 1.9)):
            quantizer.range.copy_(torch.tensor([low, high]))
            step, zero_point, lowest, highest = quantizer.grid()
            assert lowest <= zero_point <= highest
            assert zero_point == zero_point.round()
            assert quantizer(torch.zeros(1)).item() == 0
            ends = quantizer(torch.tensor([-100.0, 100.0]))
            torch.testing.assert_close(ends, torch.stack([lowest - zero_point, highest - zero_point]) * step)


@pytest.mark.parametrize(
    ("target", "bits", "lowest", "highest"),
    [("onnx", 4, -15, 15), ("onnx", 7, -127, 127), ("onnx", 8, -127, 127), ("int4-symmetric", 4, -7, 7),
     ("int4-symmetric", 2, -1, 1)],
)  # fmt: skip
def test_weights_fit_the_integers_that_the_runtime_reads(target, bits, lowest, highest):
    student, _ = student_of(Residual, target, **{"quantizer.weight_bits": bits})
    for layer in quantized_layers(student):
        weight = student.get_parameter(layer.weight)
        step, zero_point, *_ = layer.quantizer.grid(layer.index, weight)
        shape = (-1, *[1] * (weight.dim() - 1))
        carriers = layer.quantizer.codes(layer.index, weight) - zero_point.view(shape)
        assert lowest <= carriers.min() <= carriers.max() <= highest
        torch.testing.assert_close(carriers * step.view(shape), layer.quantizer.quantized(layer.index, weight))
        assert target != "int4-symmetric" or not zero_point.any()


def test_quantizers_stand_where_values_arise_and_in_front_of_pools_and_concatenations():
    _, summary = student_of(Dense)
    names = [entry.name for entry in summary.activations]
    assert names == ["x", "bn", "first", "cat", "second", "cat_1", "avg_pool2d"], names
    assert not summary.stayed_float
    fused = {entry.name: entry.fused for entry in summary.activations}
    assert fused["bn"] == "batch_norm, relu"  # not behind the max pool


class Picks(nn.Module):
    """Layers read items of what operators give as several tensors."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.left, self.right, self.fc = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(8, 5)
        self.is_read_in_float = False

    def forward(self, x):
        x = F.relu(self.bn(self.stem(F.batch_norm(x, None, None, training=True))))
        gate = torch.sigmoid(x).amax(1, keepdim=True) if self.is_read_in_float else 1
        left, right = x.chunk(2, 1)
        right, _ = F.max_pool2d(right, 3, 1, 1, return_indices=True)
        return self.fc((torch.cat([self.left(left), self.right(right)], 1) * gate).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:an image's logits depend")
@pytest.mark.parametrize("is_read_in_float", [False, True])
def test_a_quantizer_stands_behind_a_tensor_and_not_behind_several(is_read_in_float):
    def make():
        model = Picks()
        model.is_read_in_float = is_read_in_float
        return model

    student, summary = student_of(make)
    assert [entry.fused for entry in summary.activations[:2]] == ["", "" if is_read_in_float else "batch_norm, relu"]
    x = torch.randn(4, 3, 8, 8)
    assert student(x).isfinite().all()
    assert max(distinct_inputs(student, x)) <= 256


def test_a_target_of_ones_own(tmp_path):
    table = {"extends": "onnx", "name": "ours", "weight_scheme": "symmetric", "quantized": ["layer_inputs"]}
    config = Config.load("cifar", {"quantizer.target": table})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "config.toml") == config
    (tmp_path / "ours.toml").write_text(
        'extends = "onnx"\nname = "ours"\nweight_scheme = "symmetric"\nquantized = ["layer_inputs"]\n'
    )
    assert Config.load("cifar", {"quantizer.target": str(tmp_path / "ours.toml")}) == config
    target = target_of(config.quantizer)
    assert (target.name, target.weight_scheme, target.activation_scheme) == ("ours", "symmetric", "affine")
    student, summary = student_of(Dense, table)
    assert [entry.name for entry in summary.activations] == ["x", "max_pool2d", "cat", "avg_pool2d"]
    assert {layer.scheme for layer in quantized_layers(student)} == {"symmetric"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tensorrt", ["quantizer.target", "'tensorrt'", "onnx", "paper"]),
        ({"extends": "tensorrt"}, ["quantizer.target.extends", "'tensorrt'", "onnx"]),
        ({"weight_schem": "affine"}, ["quantizer.target.weight_schem", "weight_scheme"]),
        ({"weight_scheme": "power of two"}, ["quantizer.target.weight_scheme", "symmetric"]),
        ({"most_weight_bits": 3}, ["at most 3 bits", "4 are asked for"]),
        ("missing.toml", ["missing.toml"]),
    ],
)
def test_what_is_wrong_with_a_target_is_said(target, words):
    with pytest.raises(GdfqError) as error:
        Config.load("cifar", {"quantizer.target": target})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_int4_holds_no_more_than_four_bits():
    for settings in ({"quantizer.weight_bits": 8}, {"quantizer.layers": {"<first>": 8}}):
        with pytest.raises(GdfqError, match="int4-symmetric"):
            Config.load("cifar", {"quantizer.target": "int4-symmetric", **settings})


@pytest.mark.parametrize("gamma", [0.0, 1e-42, 1e-38, 1e-30])
@pytest.mark.parametrize("weight", [1.0, 1e-41, 0.0])
def test_a_dead_channel_has_its_bias(gamma, weight):
    """The unit of its bias is nothing, or nearly."""

    def make():
        model = Plain()
        with torch.no_grad():
            model.conv.weight[0] *= weight
        return model

    student, _ = student_of(make)
    with torch.no_grad():
        student.bn.weight[0], student.bn.bias[0] = gamma, 0.37
    x = torch.randn(8, 3, 8, 8)
    calibrate(student, [x])
    (node,) = (node for node in student.graph.nodes if batch_norm_of(student, node))
    _, highest = quantizer_of(student, node).range
    (quantizer,) = (module for name, module in student.named_modules() if name == "bias_quantizers.conv")
    bn = student.bn
    beta = quantizer(student.conv.weight, None, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    assert beta[0].item() == pytest.approx(0.37, rel=1e-3)
    assert student(x).isfinite().all()
    assert highest.isfinite()


def test_a_model_of_another_type_stays_of_that_type():
    student, _ = student_of(Residual)
    x = torch.randn(4, 3, 8, 8)
    expected = student(x)
    logits = student.bfloat16()(x.bfloat16())
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.3, atol=0.3)


def test_the_gradient_passes_through_rounded_biases():
    student, _ = student_of(Residual)
    student(torch.randn(4, 3, 8, 8)).square().mean().backward()
    assert all(student.get_parameter(name).grad.abs().max() > 0 for name in ("bn1.bias", "depthwise.bias", "fc.bias"))
