"""Steps, zero points and codes of Q's activation quantizers, as numbers:

y = (code - zero_point) * step        lowest <= code <= highest
"""

from dataclasses import dataclass, replace

import numpy as np

from gdfq.nn import FakeQuantize


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
    grid = quantizer.grid()
    return Grid(float(grid.step), int(grid.zero_point), grid.lowest, grid.highest)
