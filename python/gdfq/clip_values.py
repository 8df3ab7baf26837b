"""Clip values by the quantization error (MSE), a fitted distribution (ACIQ) or the KL: the rules of Table 5.

A rule gets `values (rows, N)`, the bits and how a range is made into levels (see `gdfq_ext.fake_quantize`): weights, or
with `counts (rows, N)` the histogram of activations. It returns the lower and the upper clip value of each row,
`(rows,)` float32. They may lie outside the values; nothing is clipped there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import gdfq_ext
from gdfq_ext import Scheme

_BINS = 2048  # of the magnitude, as TensorRT

Rule = Callable[[Tensor, Tensor | None, int, Scheme], tuple[Tensor, Tensor]]


def mse(values: Tensor, counts: Tensor | None, bits: int, scheme: Scheme = "eq6") -> tuple[Tensor, Tensor]:
    """-a and a with the least squared error on the values clipped there.

    a is searched among the largest magnitude times 2^(-j/4), j = 0 to 31, then in steps of 2^(1/32) around the best.
    """
    largest = values.abs().amax(1)
    low, high = values.amin(1), values.amax(1)
    best, least = largest, torch.full_like(largest, math.inf)

    def try_clip_values(candidates: Tensor) -> None:
        nonlocal best, least
        lower, upper = torch.maximum(low, -candidates), torch.minimum(high, candidates)
        # Clamped first, as weights are: the ends of a symmetric range lie half way between two levels of Eq. 6, and
        # what is clamped there can take the inner one.
        clipped = values.clamp(lower[:, None], upper[:, None])
        error = (gdfq_ext.fake_quantize(clipped, lower, upper, bits, axis=0, scheme=scheme) - values).square_()
        error = (error if counts is None else error * counts).sum(1)
        # Where all values are on one side of zero the range can be inverted, and its error NaN: never the least.
        better = error < least
        best, least = torch.where(better, candidates, best), torch.where(better, error, least)

    for step in range(32):
        try_clip_values(largest * 2 ** (-step / 4))
    coarse = best
    for step in range(-7, 8):
        try_clip_values(torch.minimum(coarse * 2 ** (step / 32), largest))
    return -best, best


def shrunk(values: Tensor, counts: Tensor | None, bits: int, scheme: Scheme = "eq6") -> tuple[Tensor, Tensor]:
    """The minimum and the maximum times the share of 0.2, 0.22, ... 1 with the least sum of |error|^2.4 (BRECQ)."""
    low, high = values.amin(1), values.amax(1)
    best, least = torch.ones_like(low), torch.full_like(low, math.inf)
    for share in torch.linspace(1.0, 0.2, 41).tolist():
        quantized = gdfq_ext.fake_quantize(values, low * share, high * share, bits, axis=0, scheme=scheme)
        error = (quantized - values).abs_().pow_(2.4)
        error = (error if counts is None else error * counts).sum(1)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)
    return low * best, high * best


def aciq(values: Tensor, counts: Tensor | None, bits: int, scheme: Scheme = "eq6") -> tuple[Tensor, Tensor]:
    """ACIQ (Banner et al., NeurIPS 2019): mean -+ a with the least expected error of a Laplace or normal distribution.

        Laplace:  a = b W(3 * 4^k)      b = E|x - mean|, W the Lambert function
        normal:   a = sigma t           t solves t / (3 * 4^k) = sqrt(2 / pi) exp(-t^2 / 2) - t erfc(t / sqrt 2)

    whichever has the ratio E|x - mean| / sigma nearer (0.71 or 0.80). Values without a negative are taken as what a
    ReLU leaves of a distribution around zero: half of it, at twice as many levels (k + 1), and by `symmetric` at as
    many.
    """
    weights = torch.ones_like(values) if counts is None else counts
    total = weights.sum(1)

    def mean_of(x: Tensor) -> Tensor:
        return (x * weights).sum(1) / total

    rectified = values.amin(1) >= 0
    mean = torch.where(rectified, 0.0, mean_of(values))
    centred = values - mean[:, None]
    halves = torch.where(rectified, 2.0, 1.0)
    deviation, sigma = halves * mean_of(centred.abs()), (halves * mean_of(centred.square())).sqrt()
    is_laplace = deviation / sigma < (math.sqrt(1 / 2) + math.sqrt(2 / math.pi)) / 2
    of_half = bits if scheme == "symmetric" else bits + 1
    laplace, gaussian = (
        torch.where(rectified, clip_value(of_half), clip_value(bits)) for clip_value in (laplace_clip, gaussian_clip)
    )
    reach = torch.where(is_laplace, deviation * laplace, sigma * gaussian)
    return mean - reach, mean + reach


def laplace_clip(bits: int) -> float:
    """a / b of ACIQ for a Laplace distribution: w with w e^w = 3 * 4^k."""
    return _root(lambda w: w + math.log(w) - math.log(3 * 4**bits))


def gaussian_clip(bits: int) -> float:
    """a / sigma of ACIQ for a normal distribution."""

    def slope(t: float) -> float:
        clipping = math.sqrt(2 / math.pi) * math.exp(-t * t / 2) - t * math.erfc(t / math.sqrt(2))
        return t / (3 * 4**bits) - clipping

    return _root(slope)


def _root(increasing: Callable[[float], float]) -> float:
    """The zero of an increasing function between 0 and 100, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return high


def kl(values: Tensor, counts: Tensor | None, bits: int, scheme: Scheme = "eq6") -> tuple[Tensor, Tensor]:
    """-a and a with the least KL(P || Q), as TensorRT calibrates (Migacz, GTC 2017).

    Of a histogram of |x| with 2048 bins, P is the first i bins, what lies beyond added to the last of them. Q is the
    first i bins without that, merged into as many levels as there are for |x| (2^(k-1), without negative values 2^k
    unless `symmetric`), each spread evenly over those of its bins that P has. i runs from the number of levels; a = i
    bins. The first bin takes the count of the second: a ReLU fills it with zeros, which would outweigh all else and
    need no clip value.
    """
    thresholds = []
    for index, row in enumerate(values):
        magnitudes = _magnitudes(row, None if counts is None else counts[index])
        thresholds.append(_kl_threshold(*magnitudes, _magnitude_levels(row, bits, scheme)))
    best = torch.stack(thresholds).to(values)
    return -best, best


def _magnitude_levels(values: Tensor, bits: int, scheme: Scheme) -> int:
    return 2**bits if scheme != "symmetric" and values.amin() >= 0 else 2 ** (bits - 1)


def _magnitudes(values: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Histogram of |values|, `(2048,)` float64, as `kl` compares it, and the width of a bin."""
    magnitudes = values.abs().double()
    width = (magnitudes.amax() / _BINS).clamp_min(1e-30)
    bins = (magnitudes / width).long().clamp_max(_BINS - 1)
    histogram = torch.bincount(bins, None if counts is None else counts.double(), _BINS).double()
    histogram[0] = histogram[1]
    return histogram, width


def _kl_threshold(histogram: Tensor, width: Tensor, levels: int) -> Tensor:
    """The threshold for one histogram `(bins,)`; all i at once.

    Q is the same in all bins of a level that P has. So the KL needs only sums over levels, differences of running sums:

        KL = sum_j p_j log p_j - sum_m (sum_{j in m} p_j) log q_m        j: bins, m: levels
    """
    bins, total = len(histogram), histogram.sum()
    ends = torch.arange(levels, bins + 1, device=histogram.device)  # every i
    # Bin j of i belongs to level floor(j * levels / i): the level m begins at ceil(m * i / levels).
    starts = (torch.arange(levels + 1, device=histogram.device) * ends[:, None] + levels - 1) // levels

    def running(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.cumsum(0)])

    inside = running(histogram)[ends]
    beyond = total - inside
    last = histogram[ends - 1]
    p_last = last + beyond
    mass = running(histogram)[starts].diff(dim=1)
    occupied = running((histogram > 0).double())[starts].diff(dim=1)
    occupied[:, -1] += (last == 0) & (p_last > 0)
    log_q = (mass / occupied / inside[:, None]).log()
    cross = torch.where(mass > 0, mass * log_q, 0.0).sum(1) + torch.where(beyond > 0, beyond * log_q[:, -1], 0.0)
    p_log_p = running(torch.xlogy(histogram, histogram / total))[ends]
    p_log_p = p_log_p - torch.xlogy(last, last / total) + torch.xlogy(p_last, p_last / total)
    # Where P has something in the last level and Q nothing the KL is infinite; where Q is empty, undefined.
    return ends[((p_log_p - cross) / total).nan_to_num(math.inf).argmin()] * width


RULES: dict[str, Rule] = {"mse": mse, "aciq": aciq, "kl": kl}
