"""The quantizers' arithmetic in pure PyTorch: that of `_schemas.py`, for any range at once.

Every operation is a separate PyTorch call (no FMA), and none is `number / tensor`, which PyTorch computes as
`reciprocal() * number`, or `tensor / number`, which it computes as `tensor * (1 / number)` on CUDA.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import check_bits, check_choice, check_device, check_floating, check_shape
from ._schemas import SCHEMES

Scheme = Literal["eq6", "affine", "symmetric"]


class Grid(NamedTuple):
    """The values of a quantizer, `(code - zero_point) * step` for every integer code from `lowest` to `highest`."""

    step: Tensor
    """float32, shaped as the range; NaN where the range is inverted, infinite or NaN."""
    zero_point: Tensor
    """The code of 0, an integer in float32, shaped as the range."""
    lowest: int
    highest: int


class Eq6:
    """Eq. 6 of GDFQ. `scale` and `zero` broadcast against what is quantized; a level is `round(scale * x - zero)`."""

    def __init__(self, lower: Tensor, upper: Tensor, bits: int) -> None:
        width = (upper - lower).clamp(min=1e-8)
        self.scale = torch.where(upper >= lower, torch.full_like(width, 2**bits - 1) / width, torch.nan)
        self.zero = torch.round(self.scale * lower) + 2 ** (bits - 1)
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def level(self, x: Tensor) -> Tensor:
        """Not yet clamped."""
        return (x * self.scale).sub_(self.zero).round_()

    def dequantize(self, level: Tensor) -> Tensor:
        """The value of a clamped level, computed in its memory."""
        return level.add_(self.zero).div_(self.scale)

    def grid(self) -> Grid:
        return Grid(torch.ones_like(self.scale) / self.scale, -self.low - self.zero, 0, self.high - self.low)


class Stepped:
    """Multiples of a step, the levels, from `low` to `high`."""

    def __init__(self, step: Tensor, low: Tensor, high: Tensor) -> None:
        self.step, self.low, self.high = step, low, high

    def level(self, x: Tensor) -> Tensor:
        """Not yet clamped."""
        return (x / self.step).round_()

    def dequantize(self, level: Tensor) -> Tensor:
        """The value of a clamped level, computed in its memory. Adding 0 makes +0 of -0."""
        return level.add_(0.0).mul_(self.step)


class Affine(Stepped):
    def __init__(self, lower: Tensor, upper: Tensor, bits: int) -> None:
        below = 0 - lower.clamp(max=0)
        step = _step(upper.clamp(min=0) + below, 1e-8, 2**bits - 1, upper >= lower)
        zero_point = torch.round(below / step)
        self.zero_point, self.highest = zero_point, 2**bits - 1
        super().__init__(step, -zero_point, self.highest - zero_point)

    def grid(self) -> Grid:
        return Grid(self.step, self.zero_point, 0, self.highest)


class Symmetric(Stepped):
    def __init__(self, lower: Tensor, upper: Tensor, bits: int) -> None:
        self.highest = 2 ** (bits - 1) - 1
        step = _step(torch.maximum(-lower, upper), 5e-9, self.highest, upper >= lower)
        super().__init__(step, torch.full_like(step, -self.highest), torch.full_like(step, self.highest))

    def grid(self) -> Grid:
        return Grid(self.step, torch.zeros_like(self.step), -self.highest, self.highest)


Quantizer = Eq6 | Stepped
_BY_SCHEME: dict[int, type[Eq6] | type[Affine] | type[Symmetric]] = {
    SCHEMES["eq6"]: Eq6,
    SCHEMES["affine"]: Affine,
    SCHEMES["symmetric"]: Symmetric,
}


def quantizer(lower: Tensor, upper: Tensor, bits: int, scheme: int) -> Eq6 | Affine | Symmetric:
    """For a range in float32, shaped to broadcast against what is quantized."""
    return _BY_SCHEME[scheme](lower, upper, bits)


def quantizer_grid(lower: Tensor, upper: Tensor, bits: int, scheme: Scheme = "eq6") -> Grid:
    """The values that `fake_quantize` rounds to, by their integer codes: `(code - zero_point) * step`.

    "eq6" and "affine" have codes from 0 to 2^k - 1, "symmetric" from -(2^(k-1) - 1) to 2^(k-1) - 1 and zero point 0. A
    zero point of "eq6" may lie beyond its codes, and its values are the quotients of Eq. 6, which these products equal
    but for the last bits.

    Args:
        lower: l, any shape and floating type.
        upper: u, of the shape of `lower`.
        bits: k, 2..8.
        scheme: "eq6", "affine" or "symmetric"; see `fake_quantize`.

    Returns:
        `Grid(step, zero_point, lowest, highest)`: two float32 tensors shaped as the range, without a gradient, and two
        integers.

    Raises:
        TypeError: the range is not floating.
        ValueError: `bits` or `scheme` is out of range, or `upper` has another shape or device than `lower`.
    """
    check_bits(bits)
    check_choice("scheme", scheme, SCHEMES)
    check_floating("lower", lower)
    check_floating("upper", upper)
    check_shape("upper", upper, tuple(lower.shape))
    check_device("upper", upper, lower)
    return quantizer(lower.detach().float(), upper.detach().float(), bits, SCHEMES[scheme]).grid()


def code_bounds(bits: int, scheme: Scheme = "eq6") -> tuple[int, int]:
    """The lowest and the highest code of `quantizer_grid`."""
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if scheme == "symmetric" else (0, 2**bits - 1)


def clamp(level: Tensor, of: Quantizer) -> Tensor:
    """To the first and the last level, in the memory of `level`."""
    return level.clamp_(of.low, of.high)


def inside(level: Tensor, of: Quantizer) -> Tensor:
    """Where the clamp changes nothing; NaN counts as inside."""
    return ~((level < of.low) | (level > of.high))


def _step(width: Tensor, least: float, steps: int, valid: Tensor) -> Tensor:
    step = width.clamp(min=least) / torch.full_like(width, steps)
    return torch.where(valid & width.isfinite(), step, torch.nan)
