"""Q in integers against onnxruntime, which computes the same file: no level anywhere in the network is another."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import Plain, Residual, TwoHeads, capture_once
from torch import fx, nn
from torch.nn import functional as F

from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.deploy import write
from gdfq.deploy.integers import Averaged, IntegerSimulation, Sum, _in_float64, normalized
from gdfq.deploy.runtime import session
from gdfq.graph import build_quantized
from gdfq_ext import Grid


class Pools(nn.Module):
    """Average pools that see all of a map, a part, and what is beyond its border; a sum; layers without a BN."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu6(self.bn(self.conv(x)))
        x = F.relu(x + self.other(x))
        x = torch.cat([F.avg_pool2d(x, 2), F.max_pool2d(x, 2)], 1)
        x = F.relu(self.last(x))
        x = F.avg_pool2d(x, 4)
        x = F.avg_pool2d(x, 3, stride=1, padding=1)
        return self.fc(x.flatten(1))


class Dense(nn.Module):
    """BN layers behind no layer: they read concatenations."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.other = nn.Conv2d(8, 24, 3, padding=1)
        self.bns = nn.ModuleList([nn.BatchNorm2d(32), nn.BatchNorm2d(32)])
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = torch.cat([x, self.other(x)], 1)
        x = self.last(F.relu(self.bns[0](x)))
        x = F.max_pool2d(F.relu(x), 2)
        return self.fc(F.relu6(self.bns[1](x)).mean((2, 3)))


@pytest.mark.parametrize("make", [Plain, Residual, TwoHeads, Pools, Dense])
@pytest.mark.parametrize(
    ("bits", "target"), [(4, "onnx"), (8, "onnx"), (4, "int4-symmetric"), (4, {"activation_scheme": "symmetric"})]
)
def test_it_computes_what_onnxruntime_does(make, bits, target):
    torch.manual_seed(0)
    settings = {"quantizer.weight_bits": bits, "quantizer.activation_bits": bits, "quantizer.target": target}
    student, _ = build_quantized(capture_once(make), Config.load("cifar", settings).quantizer)
    calibrate(student, [torch.randn(8, 3, 8, 8) for _ in range(4)])
    images = 1.5 * torch.randn(64, 3, 8, 8)
    (logits,) = session(write(student, (3, 8, 8)).model).run(None, {"images": images.numpy()})
    found = IntegerSimulation(student).run(images)
    torch.testing.assert_close(found, torch.from_numpy(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(256, 8, 3, bias=False), nn.Conv2d(512, 8, 3, groups=2, bias=False), nn.Linear(2304, 8, bias=False)],
    ids=["convolution", "groups", "linear"],
)
def test_sums_beyond_what_float32_has(layer):
    """2304 products of up to 255 * 127, against sums in int64."""
    random = torch.Generator().manual_seed(0)
    graph = fx.Graph()
    is_linear = isinstance(layer, nn.Linear)
    node = graph.call_function(torch.ops.aten.linear.default if is_linear else torch.ops.aten.conv2d.default)
    codes = torch.randint(0, 256, (2, 2304) if is_linear else (2, layer.in_channels, 5, 5), generator=random)
    carriers = torch.randint(100, 128, layer.weight.shape, generator=random)
    how = [] if is_linear else [[1, 1], [0, 0], [1, 1], layer.groups]
    expected = node.target(codes, carriers, None, *how)
    assert expected.max() > 2**24
    assert torch.equal(_in_float64(node, codes.float(), carriers.float(), how), expected.double())


@pytest.mark.parametrize("seed", [13, 20, 32, 34])  # in each, a sum depends on which term is added first
def test_a_sum_of_any_two_codes_is_onnxruntimes(seed):
    random = np.random.default_rng(seed)
    steps = random.uniform(0.005, 0.05, 3).astype(np.float32)
    zero_points = random.integers(0, 256, 3).astype(np.uint8)
    codes = [of.ravel() for of in np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))]
    given = {"a": codes[0], "b": codes[1]}
    constants = {f"step{i}": steps[i] for i in range(3)} | {f"zero{i}": zero_points[i] for i in range(3)}
    names = ["a", "step0", "zero0", "b", "step1", "zero1", "step2", "zero2"]
    expected = computed_by_onnxruntime("QLinearAdd", names, given, constants)

    grids = [
        Grid(torch.tensor(step), torch.tensor(float(zero)), 0, 255)
        for step, zero in zip(steps, zero_points, strict=True)
    ]
    terms = [
        (torch.from_numpy(of).float() - grid.zero_point) * grid.step for of, grid in zip(codes, grids[:2], strict=True)
    ]
    found = Sum(tuple(terms), tuple(grids[:2])).code(grids[2].step, grids[2].zero_point).clamp(0, 255)
    assert torch.equal(found, torch.from_numpy(expected).float())


@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 1, "padding": 1}])
def test_an_average_of_codes_is_onnxruntimes(window):
    random = np.random.default_rng(0)
    for step_x, step_y in random.uniform(0.01, 0.03, (8, 2)).astype(np.float32):
        codes = random.integers(0, 256, (4, 8, 64, 64), dtype=np.uint8)
        zero_x, zero_y = random.integers(100, 156, 2).astype(np.uint8)
        constants = {"step_x": step_x, "zero_x": zero_x, "step_y": step_y, "zero_y": zero_y}
        size, padding = window["kernel_size"], window.get("padding", 0)
        how = {"kernel_shape": [size] * 2, "strides": [window.get("stride", size)] * 2, "pads": [padding] * 4}
        names = ["x", *constants]
        expected = computed_by_onnxruntime(
            "QLinearAveragePool", names, {"x": codes}, constants, count_include_pad=1, **how
        )
        x = (torch.from_numpy(codes).float() - zero_x) * step_x
        found = Averaged(F.avg_pool2d(x, **window)).code(torch.tensor(step_y), torch.tensor(float(zero_y)))
        assert torch.equal(found.clamp(0, 255), torch.from_numpy(expected).float())


def computed_by_onnxruntime(operator, names, given, constants, **attributes):
    """What one of its own operators gives for codes."""
    node = helper.make_node(operator, names, ["y"], domain="com.microsoft", **attributes)
    values = [
        helper.make_tensor_value_info(name, TensorProto.UINT8, [None] * of.ndim)
        for name, of in (given | {"y": next(iter(given.values()))}).items()
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], operator, values[:-1], values[-1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return session(helper.make_model(graph, opset_imports=opsets, ir_version=9)).run(None, given)[0]


def test_a_batch_norm_behind_no_layer_is_onnxruntimes():
    torch.manual_seed(0)
    x = torch.randint(-100, 100, (3, 64, 15, 15)) * torch.rand(64, 1, 1)
    values = {"gamma": torch.randn(64), "beta": torch.randn(64), "mean": torch.randn(64), "var": torch.rand(64) + 0.1}
    node = helper.make_node("BatchNormalization", ["x", *values], ["y"], epsilon=1e-5)
    described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy"]
    tensors = [numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    graph = helper.make_graph([node], "bn", described[:1], described[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (expected,) = session(model).run(None, {"x": x.numpy()})
    gamma, beta, mean, var = values.values()
    assert torch.equal(normalized(x, mean, var, gamma, beta, 1e-5), torch.from_numpy(expected))
