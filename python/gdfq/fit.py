"""Whether images are such as the network was trained on, as far as it remembers: what figures taken on them say."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.graph import Pixels, Teacher
from gdfq.graph.scale import negligible

SOUND = 0.24  # of the distance that noise has


@dataclass(frozen=True)
class LayerFit:
    """Of one BN layer: how far the statistics of its input are from those that it remembers.

    Attributes:
        name: of the layer.
        distance: KL(N(mean, var) || N(running_mean, running_var)) in nats, mean over channels, each at most 100.
        of_noise: the same for Gaussian noise.
    """

    name: str
    distance: float
    of_noise: float


@dataclass(frozen=True)
class Fit:
    """How well images fit the network.

    Attributes:
        layers: in the order of the forward pass.
        confident: share of the images, in percent, that P gives a class with a probability above one half.
        same_source: whether they are of the source whose images Q was made with.
        problems: why figures taken on them say nothing of real images; none where they do.
    """

    layers: list[LayerFit]
    confident: float
    same_source: bool
    problems: list[str]

    def __str__(self) -> str:
        distance, of_noise = mean_distances(self.layers)
        source = "" if self.same_source else "; of another source than those that Q was made with"
        return (
            f"their BN statistics are {distance:.3g} from P's (noise: {of_noise:.3g}), P is sure of "
            f"{self.confident:.0f}%{source}"
        )


@torch.no_grad()
def fit(teacher: Teacher, batches: Iterable[Tensor], inferred: Pixels, same_source: bool = True) -> Fit:
    """Measure it on `batches` of images `(N, C, H, W)`, against as much noise at the scale that P's statistics say."""
    batches = list(batches)
    random = torch.Generator(batches[0].device).manual_seed(0)
    noise = (inferred.scaled(torch.randn(x.shape, generator=random, device=x.device)) for x in batches)
    distances, probabilities = _measure(teacher, batches)
    layers = [LayerFit(*row) for row in zip(teacher.layers, distances, _measure(teacher, noise)[0], strict=True)]
    confident = 100 * (probabilities > 0.5).float().mean().item()
    return Fit(layers, confident, same_source, problems(layers))


def mean_distances(layers: list[LayerFit]) -> tuple[float, float]:
    """Of the images and of noise."""
    count = len(layers)
    return sum(layer.distance for layer in layers) / count, sum(layer.of_noise for layer in layers) / count


def problems(layers: list[LayerFit]) -> list[str]:
    """What speaks against images; docs/fit.md has how often it is right."""
    distance, of_noise = mean_distances(layers)
    if distance <= SOUND * of_noise:
        return []
    return [
        f"the images' BN statistics are {distance:.3g} from P's, which is more than {SOUND:.0%} of what noise is, "
        f"{of_noise:.3g}: such images P was not trained on"
    ]


def _measure(teacher: Teacher, batches: Iterable[Tensor]) -> tuple[list[float], Tensor]:
    """Distances of all layers over all images together, and the probability of the class that P gives each."""
    sums: list[list[Tensor]] = []
    probabilities = []
    count = 0
    for images in batches:
        logits, readings = teacher.read(images, ("statistics",))
        statistics = readings["statistics"]
        probabilities.append(logits.softmax(1).amax(1))
        moments = [
            [len(images) * mean, len(images) * (var + mean.square())]
            for mean, var in zip(statistics.means, statistics.variances, strict=True)
        ]
        sums = (
            [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, moments, strict=True)]
            if sums
            else moments
        )
        count += len(images)
    distances = []
    for (first, second), mean, var in zip(sums, statistics.running_means, statistics.running_vars, strict=True):
        found = first / count
        eps = negligible(var)
        ratio = ((second / count - found.square()).clamp_min(0) + eps) / (var + eps)
        kl = 0.5 * ((found - mean).square() / (var + eps) + ratio - 1 - ratio.log())
        distances.append(kl.nan_to_num(nan=100).clamp(max=100).mean().item())
    return distances, torch.cat(probabilities)
