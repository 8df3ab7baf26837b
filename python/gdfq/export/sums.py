"""Q with the sums of its layers' products as integers have them."""

from typing import Any, NamedTuple

from torch import Tensor, fx

from gdfq.graph.nodes import CONVOLUTIONS
from gdfq.graph.query import called_by, quantized_layers, quantizer_behind
from gdfq.nn import BiasFakeQuantize, per_channel


class _Steps(NamedTuple):
    x: Tensor
    weight: Tensor
    has_rounded_bias: bool


class IntegerSums(fx.Interpreter):
    """Runs Q, and its layers on codes in the place of values.

    In float32 a sum of products of values is off by about a hundred-thousandth of a step, and where that crosses a
    rounding boundary, some of what follows changes. A sum of products of codes is exact up to 2^24.

    Args:
        student: Q, from `build_quantized`; layers whose weight the graph computes, or whose input or weight stays
            float, are run as they are.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.steps: dict[fx.Node, _Steps] = {}
        for layer in quantized_layers(student):
            activation = quantizer_behind(student, layer.node.args[0])
            if activation is not None:
                weight = student.get_parameter(layer.weight)
                step = layer.quantizer.grid(layer.index, weight).step
                bias = layer.node.args[2] if layer.bias else None
                is_rounded = isinstance(called_by(student, bias), BiasFakeQuantize)
                self.steps[layer.node] = _Steps(activation.grid().step, step, is_rounded)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.steps:
            return super().run_node(n)
        (x, weight, *others), _ = self.fetch_args_kwargs_from_env(n)
        bias, *how = others or [None]
        step_x, step_w, has_rounded_bias = self.steps[n]
        sums = n.target((x / step_x).round(), (weight / per_channel(step_w, weight)).round(), None, *how)
        unit = (step_x.double() * step_w).float()
        like = (-1,) if n.target not in CONVOLUTIONS else (-1, *[1] * (weight.dim() - 2))  # channels in the result
        if bias is None:
            return sums * unit.view(like)
        if has_rounded_bias:
            return (sums + (bias / unit).round().view(like)) * unit.view(like)
        return sums * unit.view(like) + bias.view(like)
