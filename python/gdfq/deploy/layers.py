"""Convolutions and linear layers: BN folded in, weights as integers, the bias at step_x * step_c."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gdfq.deploy.builder import Builder
from gdfq.deploy.call import Call
from gdfq.deploy.grids import Grid
from gdfq.deploy.pools import spread
from gdfq.deploy.values import Arising, Codes, Value

_LARGEST_BIAS = 2.0**30  # half of int32, so that products can be added to it
_SMALLEST_STEP = 1e-30  # products with it are still normal numbers of float32


@dataclass(frozen=True)
class Weight:
    """A layer's weight, `(channels, ...)`: as integers, or where it is not quantized, or int8 does not hold them, as
    floating numbers.

    Attributes:
        carriers: int8 of -127..127, the weight is carriers * step.
        step: `(channels,)` float64.
        values: float32; None where there are carriers.
        stays_float: why there are none.
    """

    carriers: np.ndarray | None = None
    step: np.ndarray | None = None
    values: np.ndarray | None = None
    stays_float: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.values if self.carriers is None else self.carriers).shape

    def as_matrix(self) -> "Weight":
        """`(channels, everything else)`."""
        flat = (None if a is None else a.reshape(len(a), -1) for a in (self.carriers, self.values))
        carriers, values = flat
        return Weight(carriers, self.step, values, self.stays_float)


@dataclass(frozen=True)
class Affine:
    """factor * x + shift, `(channels,)` float64 each: a frozen BN."""

    factor: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True)
class Folded:
    """The numbers of a layer in integers: (sum of carriers * codes + bias) * step of the input * step.

    Attributes:
        carriers: int8, of the weight's shape.
        step: `(channels,)` float32.
        bias: `(channels,)` int32.
    """

    carriers: np.ndarray
    step: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class LayerSpec:
    """What a layer is.

    Attributes:
        name: the user's.
        operator: `Conv` or `Gemm`.
        weight: of it.
        bias: `(channels,)` float64, or None.
        attributes: of the ONNX node.
        rounds_bias: whether Q rounds its bias to what integers can add.
    """

    name: str
    operator: str
    weight: Weight
    bias: np.ndarray | None
    attributes: dict[str, Any] = field(default_factory=dict)
    rounds_bias: bool = True


def convolution(call: Call, weight: Weight) -> LayerSpec:
    """conv1d, conv2d, conv3d."""
    kernel = list(weight.shape[2:])
    rank = len(kernel)
    strides, dilations = (spread(call.fixed(name), rank) for name in ("stride", "dilation"))
    padding = call.fixed("padding")
    if isinstance(padding, str):
        total = [dilation * (size - 1) * (padding == "same") for dilation, size in zip(dilations, kernel, strict=True)]
        pads = [size // 2 for size in total] + [size - size // 2 for size in total]
    else:
        pads = spread(padding, rank) * 2
    attributes = {
        "kernel_shape": kernel,
        "strides": strides if any(stride != 1 for stride in strides) else None,
        "pads": pads if any(pads) else None,
        "dilations": dilations if any(dilation != 1 for dilation in dilations) else None,
        "group": call.fixed("groups") if call.fixed("groups") != 1 else None,
    }
    return LayerSpec(call.name, "Conv", weight, _bias(call), attributes)


def is_linear(call: Call, spec: LayerSpec) -> bool:
    """Whether a convolution sees all of its input at once, as those on pooled maps do: onnxruntime computes a linear
    layer in integers, whoever reads its result."""
    sees_all = call.shape("input")[2:] == spec.weight.shape[2:]
    return sees_all and spec.attributes["group"] is None and spec.attributes["pads"] is None


def linear(call: Call, weight: Weight) -> LayerSpec:
    """A linear layer of inputs `(N, features)`."""
    return LayerSpec(call.name, "Gemm", weight, _bias(call), {"transB": 1})


def _bias(call: Call) -> np.ndarray | None:
    bias = call.array("bias")
    return None if bias is None else bias.astype(np.float64)


def fold(weight: Weight, bias: np.ndarray, factor: np.ndarray, input_step: float) -> Folded:
    """A layer whose input has the step `input_step`, and whose result is multiplied by `factor`.

    A negative factor turns the sign of the carriers, and 0 leaves the bias alone. The channel's step is at least so
    large that the bias fits into int32; where that makes it larger, carriers are rounded anew.

    Args:
        bias: `(channels,)` float64, of the result.
        factor: `(channels,)` float64.
    """
    step = weight.step * np.abs(factor)
    floor = np.abs(bias) / (input_step * _LARGEST_BIAS)
    gone = step < _SMALLEST_STEP
    # The finest step that holds the bias is that for a bias alone, which is then all but exact.
    new_step = np.where(gone, np.where(floor > _SMALLEST_STEP, 2 * floor, 1.0), np.maximum(step, floor))
    sign = np.where(gone, 0, np.sign(factor)).astype(np.int8)
    carriers = weight.carriers * per_channel(sign, weight.carriers)
    for channel in np.flatnonzero(~gone & (step < floor)):
        carriers[channel] = np.rint(carriers[channel] * (step[channel] / floor[channel]))
    new_step = new_step.astype(np.float32)
    bias_step = (np.float32(input_step) * new_step).astype(np.float64)
    return Folded(carriers, new_step, np.rint(bias / bias_step).astype(np.int32))


def per_channel(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`(channels,)` in a shape that goes with `weight`'s."""
    return values.reshape(-1, *[1] * (weight.ndim - 1))


class LayerResult(Arising):
    """What a layer gives, with the BN behind it where there is one.

    Attributes:
        node: the name of the ONNX node, empty until it is written.
        carriers: its weight's integers as written, None where there are none.
    """

    def __init__(self, builder: Builder, spec: LayerSpec, source: Value, affine: Affine | None = None) -> None:
        super().__init__(builder)
        self.spec = spec
        self.source = source
        self.affine = affine
        self.node = ""
        self.carriers: np.ndarray | None = None

    def behind(self, affine: Affine) -> "LayerResult":
        """The result with a BN behind it."""
        return LayerResult(self.builder, self.spec, self.source, affine)

    @property
    def input_grid(self) -> Grid | None:
        return self.source.grid if isinstance(self.source, Codes) else None

    @property
    def stays_float(self) -> str:
        """Why no runtime computes it in integers; empty where one can. A linear layer's result need not be codes."""
        if self.spec.weight.stays_float:
            return self.spec.weight.stays_float
        if self.input_grid is None:
            return "its input is not quantized"
        if not self.spec.rounds_bias and self._factor_and_bias()[1] is not None:
            return "its bias is not rounded to what integers can add: quantize for a target that does it, as onnx"
        if self.spec.operator == "Conv" and not self.only_rounded:
            return "its result is read in float"
        return ""

    @cached_property
    def tensor(self) -> str:  # written when it is asked for
        spec, builder, grid = self.spec, self.builder, self.input_grid
        source = self.source.as_float
        factor, bias = self._factor_and_bias()
        if spec.weight.carriers is None:
            values = spec.weight.values * per_channel(factor, spec.weight.values)
            weight, bias_name = builder.constant(values, np.float32), ""
        else:
            at = np.zeros_like(factor) if bias is None else bias
            folded = fold(spec.weight, at, factor, grid.step if grid else 1.0)
            self.carriers = folded.carriers
            weight, bias_name = self._weight(folded), ""
            if grid and bias is not None and spec.rounds_bias:
                bias_name = self._integer_bias(folded)
        added = bias is not None and not spec.rounds_bias  # apart: onnxruntime rounds a layer's own, and its result
        if bias is not None and not bias_name and not added:
            bias_name = builder.constant(bias, np.float32)
        written = builder.add(spec.operator, source, weight, bias_name, name=spec.name, **spec.attributes)
        self.node = builder.nodes[-1].name
        if added:
            rank = spec.weight.carriers.ndim if spec.weight.carriers is not None else spec.weight.values.ndim
            shape = (-1, *[1] * (rank - 2)) if spec.operator == "Conv" else (-1,)
            written = builder.add("Add", written, builder.constant(bias.reshape(shape), np.float32))
        return written

    def _factor_and_bias(self) -> tuple[np.ndarray, np.ndarray | None]:
        bias, affine = self.spec.bias, self.affine
        if affine is None:
            return np.ones(self.spec.weight.shape[0]), bias
        return affine.factor, affine.shift if bias is None else bias * affine.factor + affine.shift

    def _weight(self, folded: Folded) -> str:
        """The carriers in packed INT4 where these hold them, or where a number for each channel brings them into -8..7,
        as it does all weights of up to 4 bits: onnxruntime adds that number when it loads the file. Else in int8."""
        builder, carriers = self.builder, folded.carriers
        by_channel = carriers.reshape(len(carriers), -1)
        low, high = (ends.astype(np.int16) for ends in (by_channel.min(1, initial=0), by_channel.max(1, initial=0)))
        in_int4 = (high - low).max() <= 15
        if low.min() >= -8 and high.max() <= 7:
            stored = self._unpacked(carriers)
        elif in_int4:
            zero_points = per_channel((-8 - low).astype(np.int8), carriers)
            stored = builder.add("Sub", self._unpacked(carriers + zero_points), self._unpacked(zero_points))
        else:
            stored = builder.constant(carriers, owner=self.spec.name)
        zero_point = ""
        if self.spec.operator == "Gemm" or not in_int4:
            # That 0 is the zero point must be said, and by a tensor of the layer's own: onnxruntime 1.32 fuses no Gemm
            # without it, and session.x64quantprecision, which rewrites weights beyond 63, fails.
            zero_point = builder.constant(np.zeros(len(low), np.int8), owner=self.spec.name)
        return builder.add("DequantizeLinear", stored, builder.constant(folded.step), zero_point, axis=0)

    def _unpacked(self, values: np.ndarray) -> str:
        return self.builder.add("Cast", self.builder.packed_int4(values), to=self.builder.type_of("int8"))

    def _integer_bias(self, folded: Folded) -> str:
        # onnxruntime fuses where this is the product of both steps in float32
        step = self.builder.constant(np.float32(self.input_grid.step) * folded.step)
        return self.builder.add("DequantizeLinear", self.builder.constant(folded.bias), step, axis=0)
