"""Inverted images: optimized, a part of the bank at a time, until P's BN statistics fit them (ZeroQ, CVPR 2020).

They begin as noise with the spectrum of natural images. Large ones are optimized at a quarter and at half of their size
first, where an iteration takes a sixteenth and a quarter of the time. P is seen through swing convolutions (GENIE, CVPR
2023), and its class can be asked for, less of images that have it already (hard samples: HAST, CVPR 2023).
"""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import gdfq_ext
from gdfq.config import Config, Section
from gdfq.graph import BatchNormStatistics, CapturedModel, Pixels, Teacher, swinging
from gdfq.images.bank import Bank, seed_of_part
from gdfq.images.noise import pink_images
from gdfq.images.transforms import LowPass
from gdfq.images.views import Views
from gdfq.memory import explained
from gdfq.progress import steps
from gdfq.registry import SECTIONS, SOURCES

LEAST_SIZE = 32  # pixels that a smaller copy of images has


class InversionConfig(Section):
    """Inverted images: how many, and how they are optimized."""

    images: int = Field(256, ge=2, description="of the bank; a part more is held out")
    batch_size: int = Field(128, ge=2, description="images that are optimized together, a part of the bank")
    iterations: int = Field(150, ge=1, description="at full size")
    coarse_iterations: int = Field(
        0, ge=0, description="before these at a quarter of the size, and again at half, where that is 32 pixels or more"
    )
    learning_rate: float = Field(
        0.1, gt=0, description="of Adam, at the scale of standardized images; falls as a cosine at every size"
    )
    swing: bool = Field(True, description="inputs of strided convolutions are shifted by chance (GENIE)")
    cross_entropy_weight: float = Field(
        0.0, ge=0, description="beta of the hard-sample loss; HAST: 10 for CIFAR, 0.1 for ImageNet"
    )
    hardness: float = Field(0.5, ge=0, description="gamma of it; HAST: 2 for CIFAR, 0.5 for ImageNet")
    crop: float | None = Field(
        None, gt=0, le=1, description="least share of the area that random crops leave (IntraQ: 0.4); without it, none"
    )
    flip: bool = Field(False, description="images are flipped at random")
    low_pass: float | None = Field(
        None, gt=0, description="images are of low frequencies: D0 of SynQ's filter, see gdfq.images.transforms"
    )


def inverted(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> Bank:
    """A bank in parts of at most `inversion.batch_size` images, each with a seed of its own."""
    own = config.inversion

    def make(count: int, part: int) -> Tensor:
        with explained(
            "inverting images", {"inversion.batch_size": own.batch_size, "run.checkpointing": config.run.checkpointing}
        ):
            seed, what = seed_of_part(config, part), f"inverted images, part {part + 1}"
            return invert(teacher, captured, own, count, seed, device, progress, what)

    settings = {"inversion": own.model_dump(mode="json")}
    return Bank.in_parts(teacher, captured.image_shape, config, device, make, own.images, own.batch_size, settings)


@torch.enable_grad()  # images may be made when a calibration asks for them, which itself needs no gradients
def invert(
    teacher: Teacher,
    captured: CapturedModel,
    config: InversionConfig,
    count: int,
    seed: int,
    device: torch.device,
    progress: bool = False,
    what: str = "inverted images",
) -> Tensor:
    """Images `(count, *captured.image_shape)`, optimized together to minimize

        misfit + beta * mean((1 - p_y)^gamma * CE(z_P, y))

    with p_y the probability that P gives the label y; of all labels there are as many as of any other, or one more.

    Args:
        seed: of all that is drawn.
        what: images are made, where it is said how long it takes.
    """
    channels, *full = captured.image_shape
    pixels = captured.pixels or Pixels.standardized(channels)
    chance = torch.Generator().manual_seed(seed)
    reader = teacher.reader(("statistics",))
    if config.swing:
        reader = swinging(reader, chance)
    look = Views(config.crop, config.flip, chance)
    labels = balanced_labels(count, captured.num_classes, chance).to(device)
    filtered = LowPass(config.low_pass) if config.low_pass else torch.clone
    sizes = [*_smaller_sizes(captured), tuple(full)] if config.coarse_iterations else [tuple(full)]
    images = pink_images((channels, *sizes[0]), count, seed, device)
    for size in sizes:
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        iterations = config.iterations if size == tuple(full) else config.coarse_iterations
        optimizer = torch.optim.Adam([images], config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for _ in steps(iterations, f"{what}, {size[0]} x {size[1]}", progress):
            view = look(filtered(images))
            logits, readings = reader(pixels.scaled(view))
            loss = misfit(view, readings["statistics"])
            if config.cross_entropy_weight:
                loss = loss + config.cross_entropy_weight * hard_sample_loss(logits, labels, config.hardness)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        images = images.detach()
    return pixels.scaled(filtered(images))


def _smaller_sizes(captured: CapturedModel) -> list[tuple[int, int]]:
    """A quarter and a half of the images' size, where the network takes such."""
    channels, height, width = captured.image_shape
    sizes = [(math.ceil(height / part), math.ceil(width / part)) for part in (4, 2)]
    return [size for size in sizes if min(size) >= LEAST_SIZE and captured.sizes.right_at((2, channels, *size))]


def balanced_labels(count: int, num_classes: int, random: torch.Generator) -> Tensor:
    """`(count,)` int64: all classes in a random order, and again in another one."""
    rounds = -(-count // num_classes)
    return torch.cat([torch.randperm(num_classes, generator=random) for _ in range(rounds)])[:count]


def hard_sample_loss(logits: Tensor, labels: Tensor, hardness: float) -> Tensor:
    """mean((1 - p_y)^hardness * CE) of logits `(N, classes)` and labels `(N,)`."""
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")
    return ((-torch.expm1(-cross_entropy)).clamp_min(1e-6) ** hardness * cross_entropy).mean()


def misfit(images: Tensor, layers: BatchNormStatistics) -> Tensor:
    """What images leave to be desired, over the image itself and all BN inputs l:

        sum_l |mean_l - mu_l|^2 + |std_l - sigma_l|^2        (means over channels, and over l)

    with mu, sigma the running statistics, and 0 and 1 for the image.

    Args:
        images: standardized, `(N, C, H, W)`.
        layers: what P's BN layers say of them.
    """
    variance, mean = torch.var_mean(images, (0, 2, 3), correction=0)
    return gdfq_ext.bns_loss(
        [mean, *layers.means],
        [_std(variance) for variance in (variance, *layers.variances)],
        [torch.zeros_like(mean), *layers.running_means],
        [torch.ones_like(mean), *(_std(variance) for variance in layers.running_vars)],
        reduction="mean",
    )


def _std(variance: Tensor) -> Tensor:
    return (variance + 1e-6).sqrt()


SOURCES["inverted"] = inverted
SECTIONS["inversion"] = InversionConfig
