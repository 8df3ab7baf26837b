"""ZeroQ's images (Cai et al., CVPR 2020): optimized from noise until the BN statistics fit; no labels."""

import torch
from pydantic import Field
from torch import Tensor

import gdfq_ext
from gdfq.config import Config, Section
from gdfq.graph import CapturedModel, Pixels, Teacher
from gdfq.images.bank import Bank
from gdfq.memory import explained
from gdfq.progress import steps
from gdfq.registry import SECTIONS, SOURCES


class ZeroqConfig(Section):
    """ZeroQ: images optimized from noise until the BN statistics fit."""

    iterations: int = Field(500, ge=1)
    images: int = Field(64, ge=2)
    learning_rate: float = Field(0.5, gt=0, description="of Adam, lowered on a plateau")


def zeroq(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> Bank:
    """A bank of images that are inverted when they are first asked for."""
    shape, own = captured.image_shape, config.zeroq

    def make(seed: int) -> Tensor:
        with explained("making ZeroQ's images", {"zeroq.images": own.images}):
            return invert(teacher, shape, own, seed, device, progress, captured.pixels)

    return Bank(teacher, shape, config, device, make)


@torch.enable_grad()  # images may be made when a calibration asks for them, which itself needs no gradients
def invert(
    teacher: Teacher,
    shape: tuple[int, int, int],
    config: ZeroqConfig,
    seed: int,
    device: torch.device,
    progress: bool = False,
    pixels: Pixels | None = None,
) -> Tensor:
    """Images `(config.images, *shape)` that minimize, over the image itself and all BN inputs l,

        sum_l |mean_l - mu_l|^2 + |std_l - sigma_l|^2        (ZeroQ, Eq. 3; per channel means of the squares)

    with mu, sigma the running statistics, and those of the model's images for the image. What is optimized is the
    standardized image, to whose scale the learning rate belongs.
    """
    mean, std = (pixels or Pixels.standardized(shape[0])).tensors(device)
    random = torch.Generator(device).manual_seed(seed)
    images = torch.randn(config.images, *shape, generator=random, device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam([images], config.learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=100)
    zero, one = torch.zeros(shape[0], device=device), torch.ones(shape[0], device=device)
    for _ in steps(config.iterations, "ZeroQ images", progress):
        layers = teacher.read(images * std + mean, ("statistics",))[1]["statistics"]
        image_variance, image_mean = torch.var_mean(images, (0, 2, 3), correction=0)
        loss = gdfq_ext.bns_loss(
            [image_mean, *layers.means],
            [_std(variance) for variance in (image_variance, *layers.variances)],
            [zero, *layers.running_means],
            [one, *(_std(variance) for variance in layers.running_vars)],
            reduction="mean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss.detach())
    return images.detach() * std + mean


def _std(variance: Tensor) -> Tensor:
    return (variance + 1e-6).sqrt()


SOURCES["zeroq"] = zeroq
SECTIONS["zeroq"] = ZeroqConfig
