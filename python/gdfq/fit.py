"""Whether images are such as the network was trained on, as far as it remembers: what figures taken on them say."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdfq.graph import Pixels, Teacher
from gdfq.graph.scale import negligible

SOUND = 0.24  # of the distance that noise has
NOISE = 0.03  # nats, as where each mean is off by a quarter of a deviation
FAR = 0.3  # nats, as where each mean is off by 0.8 deviations


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
        classes: how many classes P sees in them, effectively: exp of the entropy of how often each is its first. As
            many as P has, or as there are images, if all are alike in number; 1 if all are of one class.
        rank: how many dimensions P's last features of them have, effectively: exp of the entropy of the shares that
            the eigenvalues of their covariance have in its trace (Roy and Vetterli, 2007). At most the number of
            features, and of images less one. Near 1, all images are shades of the same.
        same_source: whether they are of the source whose images Q was made with.
        problems: why figures taken on them say nothing of real images; none where they do.
    """

    layers: list[LayerFit]
    confident: float
    classes: float
    rank: float
    same_source: bool
    problems: list[str]

    def __str__(self) -> str:
        distance, of_noise = mean_distances(self.layers)
        source = "" if self.same_source else "; of another source than those that Q was made with"
        return (
            f"their BN statistics are {distance:.3g} from P's (noise: {of_noise:.3g}), P is sure of "
            f"{self.confident:.0f}% and sees {self.classes:.1f} classes, in features of rank {self.rank:.1f}{source}"
        )


@torch.no_grad()
def fit(teacher: Teacher, batches: Iterable[Tensor], inferred: Pixels, same_source: bool = True) -> Fit:
    """Measure it on `batches` of images `(N, C, H, W)`, against as much noise at the scale that P's statistics say."""
    batches = list(batches)
    random = torch.Generator(batches[0].device).manual_seed(0)
    noise = (inferred.scaled(torch.randn(x.shape, generator=random, device=x.device)) for x in batches)
    distances, logits, features = _measure(teacher, batches)
    layers = [LayerFit(*row) for row in zip(teacher.layers, distances, _measure(teacher, noise)[0], strict=True)]
    confident = 100 * (logits.softmax(1).amax(1) > 0.5).float().mean().item()
    classes = effective_number(logits.argmax(1).bincount())
    return Fit(layers, confident, classes, effective_rank(features), same_source, problems(layers))


def effective_number(amounts: Tensor) -> float:
    """exp of the entropy of the shares that `amounts`, none of them negative, have in their sum; 1 where it is 0."""
    shares = amounts.double() / amounts.sum().clamp_min(1e-300)
    return torch.special.entr(shares).sum().exp().item()


def effective_rank(features: Tensor) -> float:
    """Of the covariance of `features` `(N, C)`; NaN counts as 0."""
    centered = (features - features.mean(0)).double().nan_to_num()
    return effective_number(torch.linalg.svdvals(centered).square())


def mean_distances(layers: list[LayerFit]) -> tuple[float, float]:
    """Of the images and of noise."""
    count = len(layers)
    return sum(layer.distance for layer in layers) / count, sum(layer.of_noise for layer in layers) / count


def problems(layers: list[LayerFit]) -> list[str]:
    """What speaks against images; docs/fit.md has how often it is right."""
    distance, of_noise = mean_distances(layers)
    if of_noise <= NOISE:
        return [f"P's BN statistics are {of_noise:.3g} from those of noise, so that they are of no images"]
    bound, words = min((SOUND * of_noise, f"{SOUND:.0%} of what noise is, {of_noise:.3g}"), (FAR, f"{FAR:.3g}"))
    if distance <= bound:
        return []
    return [
        f"the images' BN statistics are {distance:.3g} from P's, which is more than {words}: such images P was not "
        "trained on"
    ]


def _measure(teacher: Teacher, batches: Iterable[Tensor]) -> tuple[list[float], Tensor, Tensor]:
    """Distances of all layers over all images together; logits and last features of each, without their places."""
    sums: list[list[Tensor]] = []
    outputs = []
    count = 0
    for images in batches:
        logits, readings = teacher.read(images, ("statistics", "features"))
        statistics = readings["statistics"]
        features = logits if readings["features"] is None else readings["features"].flatten(2).mean(2)
        outputs.append((logits, features))
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
    logits, features = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return distances, logits, features
