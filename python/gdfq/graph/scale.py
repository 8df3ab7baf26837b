"""Mean and standard deviation of the images that a network takes: known, or inferred from its first BN layers.

A trained network remembers the scale of its images: the running statistics of a first BN are those of what the layers
before it make of them. Images of another scale give no error, only nonsense.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdfq.config import ModelConfig
from gdfq.errors import GdfqError
from gdfq.graph.pixels import Pixels
from gdfq.graph.teacher import BatchNormStatistics, Teacher

SAME = 1.35  # scales whose ratio is below this are taken for the same
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in 0..1

_SCALES = [4.0**power for power in range(-6, 9)]  # of the standard deviation; the start
_ROUNDS = 3  # of least squares
_LEAST_SLOPE = 1e-4  # of a BN input's mean by the images', both in standard deviations: less is what rounding makes
_LEAST_GROWTH = 0.1  # of a BN input's deviation by the images', both in logarithms
_ITERATIONS, _RATE = 200, 0.05  # of Adam
_DOUBT = (
    "the model takes the {} out of each image by itself, so that its BN layers say nothing of it: images are taken to "
    "be standardized in that, and where pixels themselves are quantized, those far from such are clipped, unless "
    "model.input_mean and model.input_std say what they are"
)
_SPREAD = 0.2  # weight of how different the channels' scales are, of which a first layer says the least


def pixels_of(model: nn.Module, inferred: Pixels, config: ModelConfig) -> Pixels:
    """What the settings say; else a timm model's `default_cfg`, unless the BN statistics contradict it; else these.

    Args:
        model: the user's.
        inferred: by `infer`.
        config: `input_mean` and `input_std` are read.

    Raises:
        GdfqError: a setting has neither one number nor one for each channel.
    """
    channels = len(inferred.mean)
    mean, std = (_per_channel(name, getattr(config, name), channels) for name in ("input_mean", "input_std"))
    if mean and std:
        return _as_set(mean, std, "set", inferred)
    known = _of_timm(model, channels)
    if known and (inferred.doubt or alike(known, inferred)):
        inferred = known
    elif known:
        inferred = replace(inferred, origin=f"{inferred.origin}, which its default_cfg does not fit")
    if mean or std:
        name = "mean" if mean else "std"
        origin = f"{name} set, the other {inferred.origin}"
        return _as_set(mean or inferred.mean, std or inferred.std, origin, inferred, inferred.doubt)
    return inferred


def _as_set(mean: tuple[float, ...], std: tuple[float, ...], origin: str, inferred: Pixels, doubt: str = "") -> Pixels:
    pixels = Pixels.around(mean, std, origin)
    if inferred.doubt or alike(pixels, inferred):  # with a doubt there is nothing to contradict it
        return replace(pixels, doubt=doubt)
    said = f"the first BN layers contradict the scale of pixels that is set: they say {inferred.numbers('mean', 'std')}"
    return replace(pixels, doubt=f"{said} (of the images as the model takes them)")


def alike(one: Pixels, other: Pixels) -> bool:
    """Whether scales and means are the same, as far as inferring can tell."""
    return all(
        1 / SAME < a / b < SAME and abs(m - n) < 0.5 * max(a, b)
        for a, b, m, n in zip(one.std, other.std, one.mean, other.mean, strict=True)
    )


def _per_channel(name: str, value: float | tuple[float, ...] | str, channels: int) -> tuple[float, ...] | None:
    if value == "auto":
        return None
    values = value if isinstance(value, tuple) else (value,) * channels
    if len(values) != channels:
        raise GdfqError(
            f"setting 'model.{name}' has {len(values)} numbers, but the images that the model takes have {channels} "
            "channel(s): give one number for all, or one for each"
        )
    return tuple(float(number) for number in values)


def _of_timm(model: nn.Module, channels: int) -> Pixels | None:
    """By `default_cfg`, whose mean and std normalize pixels in 0..1: ImageNet's, if nothing else is known."""
    config = getattr(model, "default_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std or not len(mean) == len(std) == channels == len(_IMAGENET_MEAN):
        return None
    shift, scale = torch.tensor(mean), torch.tensor(std)

    def of(pixel: Any) -> tuple[float, ...]:
        return tuple(((torch.as_tensor(pixel) - shift) / scale).tolist())

    spread = tuple((torch.tensor(_IMAGENET_STD) / scale).tolist())
    return Pixels(of(_IMAGENET_MEAN), spread, of(0.0), of(1.0), "by the model's default_cfg", black_to_white=True)


# --- inference ---------------------------------------------------------------------------------------------------


@torch.enable_grad()
def infer(teacher: Teacher, shape: tuple[int, int, int]) -> Pixels:
    """Mean and standard deviation of each channel that give the first BN layers what they remember.

    Of natural images little but the scale is unknown: those tried are `mean + std * field`, where a field is a sum of
    random ones of all octaves with a part that all channels share. For each of a range of scales the means come from
    least squares; the best is refined by gradient descent, together with how the field is composed.

    Args:
        teacher: P.
        shape: `(channels, height, width)`.
    """
    front = teacher.front()
    device = next(teacher.parameters()).device
    fields = _Fields(shape, device)

    def statistics(mean: Tensor, std: Tensor) -> BatchNormStatistics:
        return front(mean.view(-1, 1, 1) + std.view(-1, 1, 1) * fields.compose())[1]["first_statistics"]

    starts = []
    for scale in _SCALES:
        std = torch.full((shape[0],), scale, device=device)
        mean = _means(lambda mean, std=std: statistics(mean, std), std)
        starts.append((_distance(statistics(mean, std)).nan_to_num(nan=math.inf).item(), mean, scale))
    _, mean, scale = min(starts, key=lambda start: start[0])

    shift, log_gain = (torch.zeros(shape[0], device=device, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([shift, log_gain, *fields.parameters], _RATE)
    for _ in range(_ITERATIONS):
        optimizer.zero_grad()
        loss = _distance(statistics(mean + scale * shift, scale * log_gain.exp()))
        loss = loss + _SPREAD * (log_gain - log_gain.mean()).square().mean()
        loss.backward()
        optimizer.step()
    mean, std = (mean + scale * shift).detach(), (scale * log_gain.exp()).detach()
    if not torch.stack([mean, std]).isfinite().all():
        return replace(
            Pixels.standardized(shape[0]), origin="taken to be standardized: its first BN layers say nothing"
        )
    unsaid = _unsaid(statistics, mean, std)
    if "scale" in unsaid:
        mean, std = (of / std.log().mean().exp() for of in (mean, std))
    pixels = Pixels.around(tuple(mean.tolist()), tuple(std.tolist()), "inferred from its first BN layers")
    return replace(pixels, doubt=_DOUBT.format(" and ".join(unsaid))) if unsaid else pixels


class _Fields:
    """Random fields `(N, C, H, W)`, each channel of mean 0 and variance 1, composed of octaves.

    Attributes:
        parameters: how much of the variance each octave has, and how much all channels share.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        channels, height, width = shape
        count = max(2, min(16, 2**18 // (height * width)))
        random = torch.Generator(device).manual_seed(0)
        octaves = []
        step = 1
        while True:
            size = (math.ceil(height / step), math.ceil(width / step))
            grid = torch.randn(count, channels + 1, *size, generator=random, device=device)
            octaves.append(_standardized(F.interpolate(grid, (height, width), mode="bilinear")))
            if max(size) == 1:
                break
            step *= 2
        self.octaves = torch.stack(octaves)
        shares = torch.zeros(len(octaves), device=device, requires_grad=True)
        common = torch.zeros((), device=device, requires_grad=True)
        self.parameters = [shares, common]

    def compose(self) -> Tensor:
        shares, common = self.parameters
        field = torch.einsum("o,onchw->nchw", shares.softmax(0).sqrt(), self.octaves)
        shared, own = field[:, :1], field[:, 1:]
        part = common.sigmoid()
        return _standardized(part.sqrt() * shared + (1 - part).sqrt() * own)


def _standardized(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-12).sqrt()


@torch.no_grad()
def _means(statistics: Callable[[Tensor], BatchNormStatistics], std: Tensor) -> Tensor:
    """The means `(C,)` that bring the first BN layers closest to the means they remember: least squares, repeated in
    case the layers before them are not affine."""
    mean = torch.zeros_like(std)
    for _ in range(_ROUNDS):
        off, deviations = _compared(statistics(mean))
        slopes = torch.stack([_compared(statistics(mean + step))[0] - off for step in torch.diag(std)], 1)
        if not slopes.isfinite().all():
            break
        cutoff, largest = _LEAST_SLOPE * deviations.mean(), torch.linalg.matrix_norm(slopes, 2)
        if largest <= cutoff:
            break
        steps = torch.linalg.lstsq(slopes, -off, rcond=(cutoff / largest).item(), driver="gelsd").solution
        mean = mean + std * steps.to(mean)
    return mean


@torch.no_grad()
def _unsaid(statistics: Callable[[Tensor, Tensor], BatchNormStatistics], mean: Tensor, std: Tensor) -> list[str]:
    """What of the images P takes out of each by itself, so that no BN layer can remember it."""
    off, deviations = _compared(statistics(mean, std))
    of_brighter, _ = _compared(statistics(mean + std, std))
    _, of_wider = _compared(statistics(mean, 4 * std))
    alive = deviations > 0
    growth = (of_wider[alive] / deviations[alive]).log().abs().mean() / math.log(4)
    unsaid = ["mean"] if (of_brighter - off).norm() <= _LEAST_SLOPE * deviations.mean() else []
    return [*unsaid, "scale"] if growth <= _LEAST_GROWTH else unsaid


def _compared(statistics: BatchNormStatistics) -> tuple[Tensor, Tensor]:
    """Of all BN inputs' channels, float64 on the CPU: how far the mean is off, and the deviation; in units of the
    deviation that is remembered."""
    found, variances, running_means, running_vars = statistics
    units = [(var + negligible(var)).sqrt() for var in running_vars]
    off = [(m - r) / unit for m, r, unit in zip(found, running_means, units, strict=True)]
    deviations = [var.sqrt() / unit for var, unit in zip(variances, units, strict=True)]
    return torch.cat(off).cpu().double(), torch.cat(deviations).cpu().double()


def _distance(statistics: BatchNormStatistics) -> Tensor:
    """Between a batch's statistics and the running ones: of means in standard deviations, of these in logarithms."""
    parts = []
    for mean, var, running_mean, running_var in zip(*statistics, strict=True):
        eps = negligible(running_var)
        parts.append(_robust((mean - running_mean) / (running_var + eps).sqrt()))
        parts.append(_robust(0.5 * ((var + eps) / (running_var + eps)).log()))
    return torch.cat(parts).mean()


def negligible(variance: Tensor) -> Tensor:
    """What keeps dead channels, whose variance is almost nothing, from deciding."""
    return 1e-3 * variance.mean() + 1e-12


def _robust(x: Tensor) -> Tensor:
    return F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")
