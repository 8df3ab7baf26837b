"""A small network twice, written by hand from the same integers: as a simulation in PyTorch and as an ONNX file."""

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from gdfq.deploy import QuantizedTensor, Written
from gdfq.deploy.grids import Grid

CODES = "{}_codes"


class Quantizer(nn.Module):
    """What QuantizeLinear, Clip and DequantizeLinear do."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x):
        code = ((x / self.grid.step).round() + self.grid.zero_point).clamp(self.grid.lowest, self.grid.highest)
        return (code - self.grid.zero_point) * self.grid.step


class Network(nn.Module):
    """Two convolutions, of which the second has a shortcut around it, an average pool and a linear layer."""

    def __init__(self, integers: dict[str, np.ndarray], grids: dict[str, Grid]) -> None:
        super().__init__()
        self.integers = {name: torch.from_numpy(value) for name, value in integers.items()}
        self.quantizers = nn.ModuleDict({name: Quantizer(grid) for name, grid in grids.items()})

    def weight(self, layer: str):
        carriers, steps = self.integers[layer], self.integers[f"{layer}.step"]
        return carriers.float() * steps.view(-1, *[1] * (carriers.dim() - 1))

    def bias(self, layer: str, read: str):
        of_input = torch.tensor(self.quantizers[read].grid.step, dtype=torch.float32)
        return self.integers[f"{layer}.bias"].float() * (of_input * self.integers[f"{layer}.step"])

    def forward(self, x):
        q = self.quantizers
        x = q["image"](x)
        x = q["first"](F.relu(F.conv2d(x, self.weight("conv1"), self.bias("conv1", "image"), padding=1)))
        y = q["second"](F.conv2d(x, self.weight("conv2"), self.bias("conv2", "first"), padding=1))
        y = q["sum"](F.relu(y + x))
        y = q["pool"](y.mean((2, 3)))
        return F.linear(y, self.weight("fc"), self.bias("fc", "pool"))


def integer_network(
    channels: int = 8, size: int = 8, top: int = 15, largest: int = 7, seed: int = 0
) -> tuple[fx.GraphModule, Written]:
    """The network and its file, for images `(N, 3, size, size)` and five classes.

    Args:
        top: the highest code of an activation.
        largest: weights are -largest..largest.
    """
    random = np.random.default_rng(seed)
    integers: dict[str, np.ndarray] = {}
    shapes = {"conv1": (channels, 3, 3, 3), "conv2": (channels, channels, 3, 3), "fc": (5, channels)}
    for name, shape in shapes.items():
        integers[name] = random.integers(-largest, largest + 1, shape).astype(np.int8)
        integers[f"{name}.step"] = (random.uniform(0.3, 0.6, shape[0]) / largest / shape[1] ** 0.5).astype(np.float32)
        integers[f"{name}.bias"] = random.integers(-20 * top, 20 * top, shape[0]).astype(np.int32)
    grids = {
        "image": Grid(5.91 / 255, 128, 0, 255),
        "first": Grid(1.37 / top, 0, 0, top),
        "second": Grid(5.83 / top, top // 2 + 1, 0, top),
        "sum": Grid(4.71 / top, 0, 0, top),
        "pool": Grid(2.83 / top, 0, 0, top),
    }
    codes = {f"quantizers.{name}": QuantizedTensor(CODES.format(name), grid) for name, grid in grids.items()}
    network = Network(integers, grids).eval()
    student = fx.GraphModule(network, _Tracer().trace(network))
    return student, Written(_file(integers, grids, size), codes, [])


class _Tracer(fx.Tracer):
    """Quantizers are called as modules, as in Q."""

    def is_leaf_module(self, module, name):
        return isinstance(module, Quantizer)


def _file(integers: dict[str, np.ndarray], grids: dict[str, Grid], size: int) -> onnx.ModelProto:
    nodes, constants = [], {}

    def add(operator, *inputs, output, name="", **attributes):
        nodes.append(helper.make_node(operator, list(inputs), [output], name or output, **attributes))
        return output

    def constant(name, value):
        constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def quantize(value, name, act_on_codes=lambda codes: codes):
        grid = grids[name]
        step, zero = (
            constant(f"{name}_step", np.float32(grid.step)),
            constant(f"{name}_zero", np.uint8(grid.zero_point)),
        )
        codes = add("QuantizeLinear", value, step, zero, output=f"{name}_rounded")
        bounds = constant(f"{name}_low", np.uint8(grid.lowest)), constant(f"{name}_high", np.uint8(grid.highest))
        codes = act_on_codes(add("Clip", codes, *bounds, output=CODES.format(name)))
        return add("DequantizeLinear", codes, step, zero, output=f"{name}_value")

    def layer(operator, value, read, name, **attributes):
        step = integers[f"{name}.step"]
        zeros = constant(f"{name}.zeros", np.zeros(len(step), np.int8))
        weight = (constant(name, integers[name]), constant(f"{name}.step", step), zeros)
        bias = (constant(f"{name}.bias", integers[f"{name}.bias"]), f"{name}.bias_step")
        constant(bias[1], np.float32(grids[read].step) * step)
        weight = add("DequantizeLinear", *weight, output=f"{name}.weight_value", axis=0)
        bias = add("DequantizeLinear", *bias, output=f"{name}.bias_value", axis=0)
        return add(operator, value, weight, bias, output=f"{name}.result", name=name, **attributes)

    x = quantize("images", "image")
    x = quantize(add("Relu", layer("Conv", x, "image", "conv1", pads=[1] * 4), output="relu1"), "first")
    y = quantize(layer("Conv", x, "first", "conv2", pads=[1] * 4), "second")
    y = quantize(add("Relu", add("Add", y, x, output="add"), output="relu2"), "sum")
    y = add("GlobalAveragePool", y, output="average")
    y = quantize(y, "pool", lambda codes: add("Flatten", codes, output="flat"))
    layer("Gemm", y, "pool", "fc", transB=1)
    nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model
