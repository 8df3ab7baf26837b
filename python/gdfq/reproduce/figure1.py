"""The paper's toy experiment (section 5.2, Figure 1): what data-free methods know of a distribution one can look at.

Points are uniform in [-4, 4]^2 and have two labels. A small classifier with BN layers is trained on them, and then
Gaussian noise, ZeroQ and GDFQ's generator each make points from the classifier alone.

The paper leaves the labeling rule, the layers and the training open; they are chosen here. A point is to the
classifier an image of two channels and one pixel, normalized like every image: so this is the package's own way from
`gdfq.graph.capture` to the image sources, and the noise N(0, 1) has the mean and the variance of the real points from
the start.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

from gdfq.config import Config
from gdfq.graph import Teacher, build_teacher, capture
from gdfq.images.generator import GeneratorImages
from gdfq.images.noise import gaussian_images
from gdfq.images.zeroq import ZeroqConfig, invert
from gdfq.provenance import versions
from gdfq.reproduce.scale import check_scale, scaled
from gdfq.run.files import write_text
from gdfq.run.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF_WIDTH = 4.0  # of the square that the real points fill
STANDARD_DEVIATION = HALF_WIDTH / math.sqrt(3)  # of a coordinate
CLASSES = 2
IMAGE_SHAPE = (2, 1, 1)
WIDTH = 64  # of the hidden layers, the classifier's and the generator's
POINTS = 2000  # of every sample
BATCH_SIZE = 200
CLASSIFIER_ITERATIONS = 1000
GENERATOR_ITERATIONS = 2000
CONFIDENT = 0.9  # the probability from which on a point is not near the boundary
PICTURE_INCHES = (14.0, 4.2)
DOTS_PER_INCH = 100
CPU = torch.device("cpu")


class LabeledPoints(NamedTuple):
    """`points` `(N, 2)` float32, in the square's coordinates; `labels` `(N,)` int64."""

    points: Tensor
    labels: Tensor


def figure1(out: Path | None, seed: int = 0, scale: float = 1.0, progress: bool = False) -> dict:
    """Run the experiment; write `figure1.png` and `figure1.json` to the folder `out`, if one is given.

    Args:
        out: created when it is missing.
        seed: of everything random; equal seeds give equal figures.
        scale: factor on the iterations of the classifier, ZeroQ and the generator, above 0.
        progress: show bars.

    Returns:
        What `figure1.json` holds: `seed`, `scale`, `versions`, `classifier_accuracy` (share of fresh real points) and
        `methods`: for `real` (a fresh sample: what is left when nothing is wrong), `gaussian`, `zeroq` and `gdfq` the
        figures of `compare`. Noise and ZeroQ's points have no labels of their own: they get the classifier's. With
        random ones, as the paper has it for the noise, they are `gaussian_random_labels` and `zeroq_random_labels`.

    Raises:
        GdfqError: `scale` is not above 0, or `out` cannot be written.
    """
    check_scale(scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = train_classifier(real_points(), scaled(CLASSIFIER_ITERATIONS, scale), progress)
        reference, fresh = real_points(), real_points()
        (noise,) = gaussian_images(IMAGE_SHAPE, POINTS, POINTS, seed, CPU)
        zeroq_config = ZeroqConfig(images=POINTS, iterations=scaled(ZeroqConfig().iterations, scale))
        zeroq_images = invert(teacher, IMAGE_SHAPE, zeroq_config, seed, CPU, progress)
        panels = {
            "real": fresh,
            "gaussian": label_by_classifier(teacher, noise),
            "zeroq": label_by_classifier(teacher, zeroq_images),
            "gdfq": generate(teacher, scaled(GENERATOR_ITERATIONS, scale), seed, progress),
        }
        random_labels = {
            f"{method}_random_labels": panels[method]._replace(labels=torch.randint(CLASSES, (POINTS,)))
            for method in ("gaussian", "zeroq")
        }
    result = {
        "seed": seed,
        "scale": scale,
        "versions": versions(),
        "classifier_accuracy": share(classify(teacher, fresh.points) == fresh.labels),
        "methods": {name: compare(teacher, data, reference) for name, data in (panels | random_labels).items()},
    }
    if out is not None:
        draw(out / "figure1.png", teacher, panels, result["methods"])
        write_text(out / "figure1.json", json.dumps(result, indent=2) + "\n")
    return result


# --- the task ----------------------------------------------------------------------------------------------------


def labelling_rule(points: Tensor) -> Tensor:
    """1 above the curve `y = 2 sin(pi x / 4)`, 0 below: two classes of one piece and equal share, no straight border.

    `(N, 2)` gives `(N,)` int64.
    """
    x, y = points.unbind(1)
    return (y > 2 * torch.sin(x * math.pi / 4)).long()


def real_points() -> LabeledPoints:
    """A sample, uniform in the square, from torch's global random state."""
    points = (2 * torch.rand(POINTS, 2) - 1) * HALF_WIDTH
    return LabeledPoints(points, labelling_rule(points))


def to_images(points: Tensor) -> Tensor:
    """Points `(N, 2)` as normalized images `(N, 2, 1, 1)`."""
    return (points / STANDARD_DEVIATION)[:, :, None, None]


def to_points(images: Tensor) -> Tensor:
    """The inverse of `to_images`."""
    return images.flatten(1) * STANDARD_DEVIATION


def train_classifier(data: LabeledPoints, iterations: int, progress: bool = False) -> Teacher:
    """Three times linear, BN, ReLU, and a linear layer, trained with Adam on batches drawn from `data`."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (2, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = CosineAnnealingLR(optimizer, iterations)
    images = to_images(data.points)
    for _ in trange(iterations, disable=not progress, desc="classifier", unit="it", dynamic_ncols=True):
        batch = torch.randint(len(images), (BATCH_SIZE,))
        loss = F.cross_entropy(model(images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    channels, *size = IMAGE_SHAPE
    return build_teacher(capture(model, tuple(size), channels))


# --- the points --------------------------------------------------------------------------------------------------


@torch.no_grad()
def classify(teacher: Teacher, points: Tensor) -> Tensor:
    """The class `(N,)` that the classifier gives each point `(N, 2)`."""
    return teacher(to_images(points)).argmax(1)


def label_by_classifier(teacher: Teacher, images: Tensor) -> LabeledPoints:
    points = to_points(images)
    return LabeledPoints(points, classify(teacher, points))


class PointGenerator(nn.Module):
    """The paper's generator for CIFAR (`gdfq.images.networks.Generator`), linear layers for its convolutions (Eq. 3).

    `generator(noise, labels)`: noise `(N, latent_size)` float32, labels `(N,)` int64, gives `(N, 2, 1, 1)` float32.
    """

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, latent_size)
        layers: list[nn.Module] = []
        for inputs in (latent_size, WIDTH):
            layers += [nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.LeakyReLU(0.2)]
        channels = IMAGE_SHAPE[0]
        self.layers = nn.Sequential(
            *layers, nn.Linear(WIDTH, channels), nn.Tanh(), nn.BatchNorm1d(channels, affine=False)
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.layers(noise * self.embedding(labels)).view(-1, *IMAGE_SHAPE)


def generate(teacher: Teacher, iterations: int, seed: int, progress: bool = False) -> LabeledPoints:
    """Train a generator on CE + beta * BNS (Eq. 4, 5) and draw a sample from it, with the labels asked for."""
    settings = {
        "generator.latent_size": 16,  # a plane needs less noise than images do
        "generator.bns_reduction": "sum",
        "run.seed": seed,
        "run.channels_last": False,
    }
    config = Config.load(overrides=settings)
    source = GeneratorImages(teacher, IMAGE_SHAPE, CLASSES, config, CPU, PointGenerator(config.generator.latent_size))
    for iteration in trange(iterations, disable=not progress, desc="generator", unit="it", dynamic_ncols=True):
        source.begin_epoch(iteration, rate=(1 + math.cos(math.pi * iteration / iterations)) / 2)
        source.step(BATCH_SIZE)
    images, labels = source.images(POINTS)
    return LabeledPoints(to_points(images), labels)


# --- figures and picture -----------------------------------------------------------------------------------------


def compare(teacher: Teacher, data: LabeledPoints, reference: LabeledPoints) -> dict:
    """What there is to say of `data`, beside real points `reference`.

    Returns:
        Shares of the points, 0 to 1: `label_by_classifier` and `label_by_rule`, whose label is the classifier's or the
        labeling rule's; `near_boundary`, which the classifier gives no class with a probability of 0.9;
        `inside_square`. And the `energy_distance` to `reference`: `classes`, one for each label's points, `class_mean`,
        and `all`, regardless of the labels.
    """
    with torch.no_grad():
        probability = teacher(to_images(data.points)).softmax(1).amax(1)
    of_classes = [
        energy_distance(data.points[data.labels == label], reference.points[reference.labels == label])
        for label in range(CLASSES)
    ]
    return {
        "label_by_classifier": share(classify(teacher, data.points) == data.labels),
        "label_by_rule": share(labelling_rule(data.points) == data.labels),
        "near_boundary": share(probability < CONFIDENT),
        "inside_square": share(data.points.abs().amax(1) <= HALF_WIDTH),
        "energy_distance": {
            "classes": of_classes,
            "class_mean": sum(of_classes) / CLASSES,
            "all": energy_distance(data.points, reference.points),
        },
    }


def share(hits: Tensor) -> float:
    return hits.double().mean().item()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Distance of the distributions that two samples stand for; zero for equal ones (Székely and Rizzo, 2013):

        sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|)

    with the samples' means, in float64. In the root of the points' unit.

    Args:
        x, y: `(N, D)` and `(M, D)`, at least one point each.
    """
    x, y = x.double(), y.double()
    between, within_x, within_y = (torch.cdist(*pair).mean() for pair in ((x, y), (x, x), (y, y)))
    return (2 * between - within_x - within_y).clamp_min(0).sqrt().item()


def draw(path: Path, teacher: Teacher, panels: dict[str, LabeledPoints], figures: dict[str, dict]) -> None:
    """The four panels, side by side: points by label over the classifier's regions, the square's outline dashed."""
    titles = {
        "real": "(a) real",
        "gaussian": "(b) Gaussian noise, labels: the classifier's",
        "zeroq": "(c) ZeroQ, labels: the classifier's",
        "gdfq": "(d) GDFQ, labels: those asked for",
    }
    figure = new_figure(figsize=PICTURE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    for axes, (method, title) in zip(figure.subplots(1, len(titles), sharey=True), titles.items(), strict=True):
        distance = figures[method]["energy_distance"]["class_mean"]
        axes.set_title(f"{title}\nenergy distance per class {distance:.2f}", fontsize=9)
        _draw_panel(axes, teacher, panels[method])
    save_figure(figure, path)


def _draw_panel(axes: "Axes", teacher: Teacher, data: LabeledPoints) -> None:
    extent = 1.5 * HALF_WIDTH
    ticks = torch.linspace(-extent, extent, 301)
    grid = torch.cartesian_prod(ticks, ticks)  # x changes slowest
    regions = classify(teacher, grid).view(len(ticks), len(ticks)).T
    axes.contourf(ticks.numpy(), ticks.numpy(), regions.numpy(), levels=[-0.5, 0.5, 1.5], colors=["#dbe9f6", "#fde3cd"])
    for label, color in enumerate(["#1f5fa8", "#d1600f"]):
        axes.scatter(*data.points[data.labels == label].T.numpy(), s=3, color=color, linewidths=0)
    corners = torch.tensor([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]) * HALF_WIDTH
    axes.plot(*corners.T.numpy(), color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
