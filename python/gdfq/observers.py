"""Where an activation quantizer's range comes from: a moving average, a histogram, or training.

An observer is handed every input while the quantizer is observing, and the range `(2,)` float32 to write.
"""

import math

import torch
from torch import Tensor, nn

import gdfq_ext
from gdfq import ranks
from gdfq.clip_values import Rule
from gdfq.random_state import RandomState, random_bytes
from gdfq_ext import Grid, Scheme, code_bounds, quantizer_grid

BINS = 2048  # on either side of zero


class Observer(nn.Module):
    """What finds a range.

    Attributes:
        passes: how often it has to see all calibration images before the range is there.
        quantizes: whether the quantizer does its work meanwhile, or lets its input through.
    """

    passes = 1
    quantizes = True

    def observe(self, x: Tensor, range: Tensor) -> None:
        """Look at an input; write the range as far as it is known."""
        raise NotImplementedError

    def end_pass(self, range: Tensor, bits: int) -> None:
        """All calibration images have been seen once more."""

    def reset(self) -> None:
        """Forget all."""


class MovingAverage(Observer):
    """The moving average (0.9, bias corrected) of every batch's minimum and maximum (GDFQ's).

    Attributes:
        state: `(3,)` float32, see `gdfq_ext.observe_range`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3))

    def observe(self, x: Tensor, range: Tensor) -> None:
        range.copy_(gdfq_ext.observe_range(ranks.extremes(x), self.state))

    def reset(self) -> None:
        self.state.zero_()


class Histogram(Observer):
    """Clip values chosen from a histogram over all calibration images, with nothing quantized meanwhile.

    The first pass finds minimum and maximum, the second fills 4096 bins around zero.

    Args:
        rule: of `gdfq.clip_values`; None: the minimum and the maximum.
        scheme: what a range is made into levels by, see `gdfq_ext.fake_quantize`.
    """

    passes = 2
    quantizes = False

    def __init__(self, rule: Rule | None, scheme: Scheme = "eq6") -> None:
        super().__init__()
        self.rule = rule
        self.scheme: Scheme = scheme
        self.reset()

    def reset(self) -> None:
        self.bounds: Tensor | None = None
        self.reach: float | None = None  # known after the first pass
        self.counts: Tensor | int = 0

    def observe(self, x: Tensor, range: Tensor) -> None:
        if self.reach is None:
            low, high = ranks.extremes(x).aminmax()
            if self.bounds is not None:
                low, high = torch.minimum(self.bounds[0], low), torch.maximum(self.bounds[1], high)
            self.bounds = torch.stack([low, high])
        elif self.rule is not None:
            self.counts = self.counts + torch.histc(x.float(), 2 * BINS, -self.reach, self.reach).double()

    def end_pass(self, range: Tensor, bits: int) -> None:
        assert self.bounds is not None
        range.copy_(self.bounds)
        if self.reach is None:
            self.reach = max(self.bounds.abs().max().item(), 1e-30)
        elif self.rule is not None:
            assert isinstance(self.counts, Tensor)
            ranks.add_up([self.counts])
            lower, upper = self.rule(*self.values_and_counts(), bits, self.scheme)
            range.copy_(torch.cat([lower, upper]).clamp(*self.bounds))

    def values_and_counts(self) -> tuple[Tensor, Tensor]:
        """The histogram: centers of the bins that hold something and how much, `(1, bins)` float32 each."""
        assert self.reach is not None
        assert isinstance(self.counts, Tensor)
        centers = (torch.arange(2 * BINS, device=self.counts.device) + 0.5) * (self.reach / BINS) - self.reach
        present = self.counts > 0
        return centers[present][None].float(), self.counts[present][None].float()


class LearnedStep(Observer):
    """The step is a parameter that training moves (LSQ, Esser et al., ICLR 2020); the zero point stays.

        y = clamp(round(x / step), lowest - zero_point, highest - zero_point) * step

    Gradients are LSQ's, whatever `quantizer.straight_through` says: straight through where nothing was clamped, behind
    the rounding, the step's scaled by 1 / sqrt(numel * (2^k - 1)). It begins at the range that has been observed by its
    moving average.

    Args:
        scheme: what a range is made into levels by, see `gdfq_ext.fake_quantize`.
        keep: the share of elements that is not quantized (QDrop), in steps of 1/256.
        random: what these are drawn from; None: all are quantized.

    Attributes:
        step: `()` float32, NaN until `end_pass`.
        zero_point: `()` float32, an integer.
    """

    def __init__(self, scheme: Scheme = "eq6", keep: float = 0.0, random: RandomState | None = None) -> None:
        super().__init__()
        self.scheme: Scheme = scheme
        self.keep, self.random = keep, random
        self.moving_average = MovingAverage()
        self.step = nn.Parameter(torch.tensor(torch.nan))
        self.register_buffer("zero_point", torch.tensor(0.0))

    def observe(self, x: Tensor, range: Tensor) -> None:
        self.moving_average.observe(x, range)

    @torch.no_grad()
    def end_pass(self, range: Tensor, bits: int) -> None:
        step, zero_point, *_ = quantizer_grid(range[0], range[1], bits, self.scheme)
        self.step.copy_(step)
        self.zero_point.copy_(zero_point)

    def reset(self) -> None:
        self.moving_average.reset()

    def grid(self, bits: int) -> Grid:
        return Grid(self.step.detach(), self.zero_point, *code_bounds(bits, self.scheme))

    def quantize(self, x: Tensor, range: Tensor, bits: int) -> Tensor:
        """`x` quantized, with gradients to it and to the step. `range` takes what the step makes of it."""
        _, zero_point, lowest, highest = self.grid(bits)
        with torch.no_grad():
            range.copy_(torch.stack([lowest - zero_point, highest - zero_point]) * self.step)
        choice = None if self.random is None else random_bytes(x, self.random)
        scale = 1 / math.sqrt(max(ranks.numel(x), 1) * (2**bits - 1))
        return gdfq_ext.fake_quantize_learned(
            x, self.step, self.zero_point, bits,
            scheme=self.scheme, choice=choice, keep=self.keep, step_gradient_scale=scale,
        )  # fmt: skip
