"""Steps, zero points and codes of Q's quantizers, by the convention that everybody outside of Eq. 6 has:

    y = (code - zero_point) * step        lowest <= code <= highest
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import gdfq_ext
from gdfq.nn import FakeQuantize, WeightFakeQuantize
from gdfq.observers import LearnedStep


@dataclass(frozen=True)
class Grid:
    """The values of one quantizer."""

    step: float
    zero_point: int
    lowest: int
    highest: int

    @property
    def dtype(self) -> np.dtype:
        """Of the codes: int8 where there are negative ones, else uint8."""
        return np.dtype(np.int8 if self.lowest < 0 else np.uint8)

    @property
    def is_full(self) -> bool:
        """Whether every number of the codes' type is a code, so that nothing has to be clipped."""
        limits = np.iinfo(self.dtype)
        return (self.lowest, self.highest) == (limits.min, limits.max)

    def code(self, value: float) -> int:
        """That of the level nearest to `value`, as ONNX computes it."""
        rounded = int(np.rint(np.clip(np.float32(value) / np.float32(self.step), -1e9, 1e9))) + self.zero_point
        return min(max(rounded, self.lowest), self.highest)

    def in_a_byte(self) -> "Grid | None":
        """The same values with codes and a zero point that one byte holds, moved where they have to be; None where
        there is no such grid: Eq. 6 does not force zero into the range, so that a zero point can be any integer."""
        limits = np.iinfo(self.dtype)
        shift = max(0, limits.min - self.zero_point)
        moved = replace(
            self, zero_point=self.zero_point + shift, lowest=self.lowest + shift, highest=self.highest + shift
        )
        return moved if max(moved.zero_point, moved.highest) <= limits.max else None


def activation_grid(quantizer: FakeQuantize) -> Grid:
    """That of an activation quantizer whose range is known."""
    top = 2**quantizer.bits - 1
    if isinstance(quantizer.observer, LearnedStep):
        return Grid(float(quantizer.observer.step), int(quantizer.observer.zero_point), 0, top)
    lower, upper = quantizer.range.float().cpu()
    scale, zero_point = _scale_and_zero_point(lower, upper, quantizer.bits)
    return Grid(float(1 / scale), int(zero_point), 0, top)


def weight_codes(quantizer: WeightFakeQuantize, index: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of a weight, its steps and its zero points.

    Returns:
        `(channels, ...)`, `(channels,)` and `(channels,)`; codes are 0..2^k - 1, all float32.
    """
    bits = quantizer.bits[index]
    weight = weight.detach().float()
    if str(index) in quantizer.stored:
        stored = quantizer.stored[str(index)]
        return stored.codes(weight), stored.step, stored.zero_point
    scale, zero_point = _scale_and_zero_point(*gdfq_ext.reference.channel_range(weight), bits)
    levels = gdfq_ext.fake_quantize_weight(weight, bits) * _per_channel(scale, weight)
    return levels.round() + _per_channel(zero_point, weight), 1 / scale, zero_point


def _scale_and_zero_point(lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = (2**bits - 1) / (upper - lower).clamp_min(1e-8)
    return scale, -torch.round(scale * lower)


def _per_channel(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))
