"""Q in PyTorch's own operators, for processes that have no `gdfq`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gdfq.calibrate import check_ranges
from gdfq.errors import GdfqError
from gdfq.graph.leaving import Leaving
from gdfq.graph.nodes import aten, op_of
from gdfq.graph.query import QuantizedWeight, quantized_weight
from gdfq.graph.sizes import ImageSizes
from gdfq.nn import BatchNormAct, BatchNormActFakeQuantize, FakeQuantize, WeightFakeQuantize
from gdfq_ext import Grid

_ACTIVATIONS: dict[str, Callable] = {"relu": F.relu, "relu6": F.relu6}


def to_standard(model: nn.Module) -> fx.GraphModule:
    """Q from `quantize` or `load_quantized` in plain PyTorch: `torch.fake_quantize_per_tensor_affine` for activations,
    `torch.fake_quantize_per_channel_affine` for weights, `F.batch_norm`. It can be saved, traced, and exported (for one
    size of a batch: `torch.export` knows no other for these operators), and then be loaded where there is no `gdfq`.

    Weights are the same, number for number, and are stored on their levels. PyTorch multiplies by 1 / step where the
    quantizers divide by it, so that an activation may take the neighboring level where its value lies within a
    millionth of a boundary (times the number of levels); nothing else differs. Unlike Q, the result does not refuse
    images of other sizes than those that its graph is right for.

    Args:
        model: Q; it is not changed.

    Returns:
        `(N, C, H, W) -> (N, classes)`, in eval mode, on the device of `model`.

    Raises:
        GdfqError: `model` is no quantized one; ranges were not observed; a quantizer's range does not contain zero,
            which PyTorch's operators cannot express.
    """
    quantizers = (FakeQuantize, WeightFakeQuantize)
    if not isinstance(model, fx.GraphModule) or not any(isinstance(module, quantizers) for module in model.modules()):
        raise GdfqError(
            f"to_standard takes a quantized model, as result.model or what load_quantized returns, not a "
            f"{type(model).__name__}"
        )
    check_ranges(model)
    with torch.no_grad():
        return _Standard(model).converted()


class _Standard(fx.Interpreter):
    """Copies a graph node by node; what does not depend on the image is computed now, and stored."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.root = nn.Module()
        self.new = fx.Graph()
        self.of_image: set[fx.Node] = set()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.env: dict[fx.Node, Any] = {}

    def converted(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            if node.op == "placeholder" or self.of_image.intersection(node.all_input_nodes):
                self.of_image.add(node)
                self._copy(node)
            else:
                self.env[node] = self.run_node(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        return fx.GraphModule(self.root, self.new, "StandardModel").eval()

    def _copy(self, node: fx.Node) -> None:
        module = self.module.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, (ImageSizes, Leaving)):
            return
        if isinstance(module, FakeQuantize):
            self.copies[node] = self._activation(node, module, self._value(node.args[0]))
        elif isinstance(module, BatchNormAct):
            self.copies[node] = self._batch_norm(node, module)
        elif isinstance(module, BatchNormActFakeQuantize):
            self.copies[node] = self._activation(node, module.quantizer, self._batch_norm(node, module.batch_norm_act))
        elif module is not None:
            raise GdfqError(f"{node.target} ({type(module).__name__}) has no counterpart among PyTorch's operators")
        elif node.op == "call_function" and self._handles_sizes(node):
            # A tensor's own methods are traced for any batch: there sizes are no numbers yet.
            name = "size" if node.target is aten.sym_size.int else op_of(node)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
            self.copies[node] = self.new.call_method(name, args, kwargs)
        else:
            self.copies[node] = self.new.node_copy(node, self._value)

    def _handles_sizes(self, node: fx.Node) -> bool:
        """Whether `node` gives the size of a tensor, or is a tensor's method and is given one."""
        if node.target is aten.sym_size.int:
            return True
        sizes = [source for source in node.all_input_nodes if not isinstance(source.meta.get("val"), Tensor)]
        return bool(sizes) and isinstance(node.meta.get("val"), Tensor) and hasattr(Tensor, op_of(node))

    def _value(self, node: fx.Node) -> Any:
        """What stands for `node` in the new graph."""
        if node not in self.copies and isinstance(self.env[node], Tensor):
            quantized = quantized_weight(self.module, node)
            if quantized is None:
                name = node.target if node.op == "get_attr" else node.name
                self.copies[node] = self._stored(name, self.env[node])
            else:
                self.copies[node] = self._weight(node, quantized)
        return self.copies[node] if node in self.copies else self.env[node]

    def _activation(self, node: fx.Node, quantizer: FakeQuantize, x: fx.Node) -> fx.Node:
        grid = quantizer.grid()
        _check_zero(str(node.target), grid)
        arguments = (x, float(grid.step), int(grid.zero_point), grid.lowest, grid.highest)
        return self.new.call_function(torch.fake_quantize_per_tensor_affine, arguments)

    def _batch_norm(self, node: fx.Node, module: BatchNormAct) -> fx.Node:
        tensors = (source if source is None else self._value(source) for source in node.args)
        result = self.new.call_function(F.batch_norm, (*tensors, False, 0.0, module.eps))
        return result if module.act == "none" else self.new.call_function(_ACTIVATIONS[module.act], (result,))

    def _weight(self, node: fx.Node, quantized: QuantizedWeight) -> fx.Node:
        source = quantized.weight
        name = source.target if source.op == "get_attr" else node.name
        grid = quantized.quantizer.grid(quantized.index, self.env[source])
        _check_zero(name, grid)
        scale = self._stored(f"{name}_scale", grid.step)
        zero_point = self._stored(f"{name}_zero_point", grid.zero_point.to(torch.int32))
        arguments = (self._stored(name, self.env[node]), scale, zero_point, 0, grid.lowest, grid.highest)
        return self.new.call_function(torch.fake_quantize_per_channel_affine, arguments)

    def _stored(self, name: str, value: Tensor) -> fx.Node:
        """A buffer of the new module, under the name that the user's model has for it where it has one."""
        *path, last = name.split(".")
        module = self.root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, value.detach().clone())
        return self.new.get_attr(name)


def _check_zero(name: str, grid: Grid) -> None:
    inside = (grid.zero_point >= grid.lowest) & (grid.zero_point <= grid.highest)
    if not bool(inside.all()):
        raise GdfqError(
            f"the range of {name} does not contain zero, which PyTorch's fake quantization cannot express: quantize "
            "for a target with zero in every range, as 'onnx' (`gdfq targets` lists them)"
        )
