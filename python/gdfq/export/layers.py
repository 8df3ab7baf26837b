"""Convolutions and linear layers: BN folded in, weights as integers, the bias at step_x * step_c."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from gdfq.export.builder import Builder
from gdfq.export.grids import Grid
from gdfq.export.values import Arising, Codes, Value

_LARGEST_BIAS = 2.0**31 - 1024  # of int32, less what float32 steps lose
_SMALLEST_STEP = 1e-30  # products with it are still normal numbers of float32


@dataclass(frozen=True)
class Weight:
    """A layer's weight.

    Attributes:
        values: `(channels, ...)` float64, what Q computes with.
        carriers: int8 of -127..127 and `values`' shape, values = carriers * step; None where it is not quantized, or
            does not fit.
        step: `(channels,)` float64; None with `carriers`.
    """

    values: np.ndarray
    carriers: np.ndarray | None = None
    step: np.ndarray | None = None


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
    """

    name: str
    operator: str
    weight: Weight
    bias: np.ndarray | None
    attributes: dict[str, Any] = field(default_factory=dict)


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
    # Of the bias alone, any step holds it that is large enough.
    new_step = np.where(gone, np.maximum(1.0, 2 * floor), np.maximum(step, floor))
    scale = np.where(gone, 0.0, np.sign(factor) * step / new_step)
    carriers = np.rint(weight.carriers * per_channel(scale, weight.carriers)).astype(np.int8)
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
        if self.spec.weight.step is None:
            return "its weight is not quantized"
        if self.spec.weight.carriers is None:
            return "its weight has zero points so far out that int8 does not hold codes less them"
        if self.input_grid is None:
            return "its input is not quantized"
        if self.spec.operator == "Conv" and not self.only_rounded:
            return "its result is read in float"
        return ""

    @cached_property
    def tensor(self) -> str:  # type: ignore[override] # written when it is asked for
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
            weight, bias_name = self._weight(folded), self._integer_bias(folded) if grid and bias is not None else ""
        if bias is not None and not bias_name:
            bias_name = builder.constant(bias, np.float32)
        written = builder.add(spec.operator, source, weight, bias_name, name=spec.name, **spec.attributes)
        self.node = builder.nodes[-1].name
        return written

    def _factor_and_bias(self) -> tuple[np.ndarray, np.ndarray | None]:
        bias, affine = self.spec.bias, self.affine
        if affine is None:
            return np.ones(len(self.spec.weight.values)), bias
        return affine.factor, affine.shift if bias is None else bias * affine.factor + affine.shift

    def _weight(self, folded: Folded) -> str:
        return self.builder.add(
            "DequantizeLinear", self._stored(folded.carriers), self.builder.constant(folded.step), axis=0
        )

    def _stored(self, carriers: np.ndarray) -> str:
        """The carriers as int8, in packed INT4 where these hold them, or where a number for each channel brings them
        into -8..7, as it does all weights of up to 4 bits: onnxruntime adds that number when it loads the file."""
        builder = self.builder
        by_channel = carriers.reshape(len(carriers), -1).astype(np.int64)
        low, high = by_channel.min(1, initial=0), by_channel.max(1, initial=0)
        if low.min() >= -8 and high.max() <= 7:
            return self._unpacked(carriers)
        if (high - low).max() > 15:
            return builder.constant(carriers)
        zero_points = per_channel(-8 - low, carriers)
        return builder.add("Sub", self._unpacked(carriers + zero_points), self._unpacked(zero_points))

    def _unpacked(self, values: np.ndarray) -> str:
        return self.builder.add("Cast", self.builder.packed_int4(values), to=self.builder.type_of("int8"))

    def _integer_bias(self, folded: Folded) -> str:
        # onnxruntime fuses where this is the product of both steps in float32
        step = self.builder.constant(np.float32(self.input_grid.step) * folded.step)
        return self.builder.add("DequantizeLinear", self.builder.constant(folded.bias), step, axis=0)
