"""Q in the arithmetic of integer runtimes: sums of products of codes, and one multiplication to the next step.

Q computes with values in float32. There a sum is off by about a millionth, and of the many that are rounded to levels a
few land beside the level that an integer runtime has; behind many layers of 8 bits little is then left the same. Here
sums are exact, and what is rounded is what onnxruntime rounds:

    layer, BN folded in   round((sum + bias) * (step_x * step_w / step_y))
    sum of two            round(a * (step_a / step_y) + b * (step_b / step_y) + what of it is the same for all codes)
    global average pool   round(sum * (step_x / (step_y * count)))
    other average pool    round(mean / step_y + zero_y), one rounding for both: in 8 bits one of 100,000 is another then
    BN behind no layer    round((x * factor + shift) / step_y)        factor = gamma / sqrt(var + eps)
                                                                      shift = beta - mean * factor

each operation in float32. Whatever else there is, is computed as Q does.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from gdfq.graph.nodes import BOUNDS, CONVOLUTIONS, activation_name, average_pool_inputs, op_of, sum_inputs
from gdfq.graph.query import QuantizedLayer, batch_norm_of, quantized_layers, quantizer_behind, quantizer_of, unrounded
from gdfq.nn import BatchNormAct, FakeQuantize, per_channel
from gdfq_ext import Grid

_EXACT = 2**24  # integers up to which float32 has all of


@dataclass(frozen=True, kw_only=True)
class Unrounded:
    """What is to be rounded to the grid of the quantizer that reads it, behind an activation, or `none`."""

    act: str = "none"

    def values(self) -> Tensor:
        """In float32, without the activation."""
        raise NotImplementedError

    def code(self, step: Tensor, zero_point: Tensor) -> Tensor:
        """Rounded to the quantizer's step, with its zero point, and not clamped."""
        raise NotImplementedError

    def quantized(self, quantizer: FakeQuantize) -> Tensor:
        """On the quantizer's grid, in float32."""
        step, zero_point, lowest, highest = quantizer.grid()
        level = self.code(step, zero_point).clamp_(lowest, highest).sub_(zero_point)
        if self.act != "none":
            low, high = BOUNDS[self.act]
            level.clamp_(low, None if high is None else float((high / step).round()))
        return level.mul_(step)


@dataclass(frozen=True)
class Scaled(Unrounded):
    """Whole numbers `(N, C, ...)`, in float64 where float32 does not have them all, and their unit in float32, shaped
    to go with them."""

    integers: Tensor
    unit: Tensor

    def values(self) -> Tensor:
        return self.integers.float() * self.unit

    def code(self, step: Tensor, zero_point: Tensor) -> Tensor:
        return (self.integers.float() * (self.unit / step)).round_().add_(zero_point)


@dataclass(frozen=True)
class Computed(Unrounded):
    """Values in float32."""

    result: Tensor

    def values(self) -> Tensor:
        return self.result

    def code(self, step: Tensor, zero_point: Tensor) -> Tensor:
        return (self.result / step).round_().add_(zero_point)


@dataclass(frozen=True)
class Averaged(Computed):
    """Means of parts of a map, in float32."""

    def code(self, step: Tensor, zero_point: Tensor) -> Tensor:
        return (self.result / step).add_(zero_point).round_()


@dataclass(frozen=True)
class Sum(Unrounded):
    """Of values on the grids of two quantizers."""

    terms: tuple[Tensor, Tensor]
    grids: tuple[Grid, Grid]

    def values(self) -> Tensor:
        return self.terms[0] + self.terms[1]

    def code(self, step: Tensor, zero_point: Tensor) -> Tensor:
        ratios = [grid.step / step for grid in self.grids]
        offsets = [grid.zero_point for grid in self.grids]
        sum_ = zero_point - _multiply_add(offsets[0], ratios[0], offsets[1] * ratios[1])
        # The second first, as onnxruntime does: one sum in a million is another the other way around.
        for term, grid, ratio in reversed(list(zip(self.terms, self.grids, ratios, strict=True))):
            sum_ = _multiply_add((term / grid.step).round_().add_(grid.zero_point), ratio, sum_)
        return sum_.round_()


def normalized(
    x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """BatchNorm of `x` `(N, C, ...)` by running statistics, bit for bit as onnxruntime computes it."""
    factor = (variance + eps).rsqrt() * (1.0 if gamma is None else gamma)  # torch.sqrt is not the nearest everywhere
    shift = (0.0 if beta is None else beta) - mean * factor
    shape = (-1, *[1] * (x.dim() - 2))
    return x * factor.view(shape) + shift.view(shape)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32, rounded once, as processors have it."""
    return a.double().mul_(b).add_(c).float()


def _plus(integers: Tensor, largest: Tensor, others: Tensor) -> Tensor:
    """The sum of whole numbers of at most `largest`, which are overwritten where they can be, and of `others`."""
    if integers.dtype == torch.float32 and largest + others.abs().max() >= _EXACT:
        integers = integers.double()
    return integers.add_(others.to(integers.dtype))


def _in_float64(layer: fx.Node, codes: Tensor, carriers: Tensor, how: list[Any]) -> Tensor:
    """A layer's sums of products of whole numbers, the largest of which float32 does not have: in float32, which is
    faster, of so few input channels at once that it has theirs, and only where that cannot be in float64."""
    dim, channels = 1 if layer.target in CONVOLUTIONS else -1, carriers.shape[1]
    if codes.shape[dim] == channels:  # one group
        largest = carriers.abs().flatten(1).unflatten(1, (channels, -1)).sum(2) * codes.abs().max()
        for count in range(2, channels + 1):
            if all(part.sum(1).max() < _EXACT for part in largest.tensor_split(count, 1)):
                parts = zip(codes.tensor_split(count, dim), carriers.tensor_split(count, 1), strict=True)
                return sum(layer.target(x, weight, None, *how).double() for x, weight in parts)
    return layer.target(codes.double(), carriers.double(), None, *how)


def _pads(pool: fx.Node) -> bool:
    """Whether an average pool counts places outside of its input."""
    padding = pool.args[3] if op_of(pool).startswith("avg_pool") and len(pool.args) > 3 else 0
    return any(padding) if isinstance(padding, list | tuple) else padding != 0


class _Prepared(NamedTuple):
    """What no image changes of a layer: steps of its input and of its weight's channels, the weight in these steps, the
    largest sum of their sizes in a channel, and its bias as it is before it is rounded."""

    step_x: Tensor
    step_w: Tensor
    carriers: Tensor
    most: Tensor
    bias: Tensor | None


class IntegerSimulation(fx.Interpreter):
    """Runs Q in integers, on the CPU: `run(images)` gives the logits.

    Args:
        student: Q, from `build_quantized`, for a target that rounds biases.
    """

    def __init__(self, student: fx.GraphModule) -> None:
        super().__init__(student)
        self.student = student
        self.layers = {
            layer.node: self._prepared(layer)
            for layer in quantized_layers(student)
            if self._quantizer(layer.node.args[0]) is not None
        }
        self.folded = {
            user
            for node in self.layers
            for user in node.users
            if len(node.users) == 1 and batch_norm_of(student, user) is not None
        }

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().run(images)

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            return self._layer(n)
        if n in self.folded:
            return self._batch_norm(n, self._folded)
        if batch_norm_of(self.student, n) is not None:
            return self._batch_norm(n, self._alone)
        source = self.env.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if isinstance(source, Unrounded):  # `n` is a quantizer, or an activation that one reads
            quantizer = quantizer_of(self.student, n)
            return replace(source, act=activation_name(n)) if quantizer is None else source.quantized(quantizer)
        inputs = sum_inputs(n) or average_pool_inputs(n)
        quantizers = [self._quantizer(value) for value in inputs]
        if inputs and None not in quantizers and self._is_rounded(n):
            values, grids = [self.env[value] for value in inputs], [quantizer.grid() for quantizer in quantizers]
            if len(inputs) == 2 and not n.kwargs:
                return Sum(tuple(values), tuple(grids))
            result = super().run_node(n)
            if len(inputs) == 1 and result[0, 0].numel() == 1 and not _pads(n):
                levels = (values[0] / grids[0].step).round().double().flatten(2)
                return Scaled(levels.sum(2).view_as(result), grids[0].step / levels.shape[2])
            return Averaged(result) if op_of(n).startswith("avg_pool") else result
        return super().run_node(n)

    def _quantizer(self, value: fx.Node) -> FakeQuantize | None:
        return quantizer_behind(self.student, value)

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether quantizers alone read what `node` gives, themselves or through a ReLU."""
        return bool(node.users) and all(
            self._is_rounded(user)
            if activation_name(user)
            else quantizer_of(self.student, user) is not None and batch_norm_of(self.student, user) is None
            for user in node.users
        )

    def _prepared(self, layer: QuantizedLayer) -> "_Prepared":
        weight = self.student.get_parameter(layer.weight).detach()
        step = layer.quantizer.grid(layer.index, weight).step
        carriers = (layer.quantizer.quantized(layer.index, weight) / per_channel(step, weight)).round()
        bias = unrounded(self.student, layer.node.args[2]) if layer.bias else None
        bias = None if bias is None else self.fetch_attr(bias.target)
        most = carriers.abs().flatten(1).sum(1).max()
        return _Prepared(self._quantizer(layer.node.args[0]).grid().step, step, carriers, most, bias)

    def _layer(self, node: fx.Node) -> Any:
        step_x, step_w, carriers, most, _ = self.layers[node]
        (x, weight, *others), _ = self.fetch_args_kwargs_from_env(node)
        bias, *how = others or [None]
        codes = (x / step_x).round_()
        largest = most * codes.abs().max()
        sums = node.target(codes, carriers, None, *how) if largest < _EXACT else _in_float64(node, codes, carriers, how)
        if any(user in self.folded for user in node.users):
            return sums, largest
        shape = (-1, *[1] * (weight.dim() - 2)) if node.target in CONVOLUTIONS else (-1,)
        unit = step_x * step_w
        if bias is not None:
            sums = _plus(sums, largest, (bias.double() / unit).round().view(shape))
        result = Scaled(sums, unit.view(shape))
        return result if self._is_rounded(node) else result.values()

    def _batch_norm(self, node: fx.Node, compute: Callable[..., Unrounded]) -> Any:
        module = batch_norm_of(self.student, node)
        result = compute(node, module, *(None if arg is None else self.env[arg] for arg in node.args))
        quantizer = quantizer_of(self.student, node)
        if quantizer is not None:
            return result.quantized(quantizer)
        if self._is_rounded(node):
            return result
        return result.values() if module.act == "none" else result.values().clamp(*BOUNDS[module.act])

    def _folded(
        self,
        node: fx.Node,
        module: BatchNormAct,
        of_layer: tuple[Tensor, Tensor],
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Unrounded:
        """Into the layer whose sums it reads."""
        step_x, step_w, *_, bias = self.layers[node.args[0]]
        sums, largest = of_layer
        mean = mean.double() if bias is None else mean.double() - bias.double()
        factor = (variance.double() + module.eps).rsqrt() * (1.0 if gamma is None else gamma.double())
        shift = (0.0 if beta is None else beta.double()) - mean * factor
        unit = step_x * (step_w.double() * factor.abs()).float()
        shape = (-1, *[1] * (sums.dim() - 2))
        signed = sums.mul_(factor.sign().to(sums.dtype).view(shape))
        integers = _plus(signed, largest, (shift / unit).round().view(shape))
        return Scaled(integers, unit.view(shape), act=module.act)

    def _alone(
        self,
        node: fx.Node,
        module: BatchNormAct,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
    ) -> Unrounded:
        return Computed(normalized(x, mean, variance, gamma, beta, module.eps), act=module.act)
