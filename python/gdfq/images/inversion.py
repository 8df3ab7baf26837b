"""Inverted images: optimized, a part of the bank at a time, until P's BN statistics fit them (ZeroQ, CVPR 2020; GENIE,
CVPR 2023)."""

import random

import torch
from pydantic import Field
from torch import Tensor

import gdfq_ext
from gdfq.config import Config, Section
from gdfq.graph import BatchNormStatistics, CapturedModel, Pixels, Teacher, swinging
from gdfq.images.bank import Bank
from gdfq.memory import explained
from gdfq.progress import steps
from gdfq.registry import SECTIONS, SOURCES


class InversionConfig(Section):
    """Inverted images: how many, and how they are optimized."""

    images: int = Field(512, ge=2, description="of the bank; a part more is held out")
    batch_size: int = Field(128, ge=2, description="images that are optimized together, a part of the bank")
    iterations: int = Field(250, ge=1)
    learning_rate: float = Field(0.1, gt=0, description="of Adam, at the scale of standardized images")
    swing: bool = Field(True, description="inputs of strided convolutions are shifted by chance (GENIE)")


def inverted(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> Bank:
    """A bank in parts of at most `inversion.batch_size` images, each with a seed of its own."""
    shape, own = captured.image_shape, config.inversion
    parts = -(-own.images // own.batch_size)

    def make(part: int) -> Tensor:
        count = own.images // parts + (part < own.images % parts)
        seed = random.Random(f"{config.run.seed} {part}").getrandbits(63)
        with explained("inverting images", {"inversion.batch_size": own.batch_size}):
            return invert(teacher, shape, own, count, seed, device, progress, captured.pixels)

    return Bank(teacher, shape, config, device, make, parts, {"inversion": own.model_dump(mode="json")})


@torch.enable_grad()  # images may be made when a calibration asks for them, which itself needs no gradients
def invert(
    teacher: Teacher,
    shape: tuple[int, int, int],
    config: InversionConfig,
    count: int,
    seed: int,
    device: torch.device,
    progress: bool = False,
    pixels: Pixels | None = None,
) -> Tensor:
    """Images `(count, *shape)` of least `misfit`, optimized together from noise.

    Args:
        seed: of all that is drawn.
        pixels: the scale of the images; default: standardized.
    """
    mean, std = (pixels or Pixels.standardized(shape[0])).tensors(device)
    images = torch.randn(count, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    read = teacher.reader(("statistics",))
    if config.swing:
        read = swinging(read, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam([images], config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    for _ in steps(config.iterations, "inverted images", progress):
        loss = misfit(images, read(images * std + mean)[1]["statistics"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return images.detach() * std + mean


def misfit(images: Tensor, layers: BatchNormStatistics) -> Tensor:
    """What images leave to be desired, over the image itself and all BN inputs l:

        sum_l |mean_l - mu_l|^2 + |std_l - sigma_l|^2        (per channel means of the squares)

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
