"""ZeroQ's images (Cai et al., CVPR 2020): optimized from noise until the BN statistics fit; no labels."""

import torch
from pydantic import Field
from torch import Tensor

from gdfq.config import Config, Section
from gdfq.graph import CapturedModel, Pixels, Teacher
from gdfq.images.bank import Bank
from gdfq.images.inversion import misfit
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
    """A bank of one part; what is held out is the next seed's."""
    shape, own = captured.image_shape, config.zeroq

    def make(part: int) -> Tensor:
        with explained(
            "making ZeroQ's images", {"zeroq.images": own.images, "run.checkpointing": config.run.checkpointing}
        ):
            return invert(teacher, shape, own, config.run.seed + part, device, progress, captured.pixels)

    bank = Bank(teacher, shape, config, device, make, settings={"zeroq": own.model_dump(mode="json")})
    bank.held_out_setting = "zeroq.images"
    return bank


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
    """Images `(config.images, *shape)` of least `misfit` (ZeroQ, Eq. 3). What is optimized is standardized images, to
    whose scale the learning rate belongs."""
    mean, std = (pixels or Pixels.standardized(shape[0])).tensors(device)
    random = torch.Generator(device).manual_seed(seed)
    images = torch.randn(config.images, *shape, generator=random, device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam([images], config.learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=100)
    for _ in steps(config.iterations, "ZeroQ images", progress):
        layers = teacher.read(images * std + mean, ("statistics",))[1]["statistics"]
        loss = misfit(images, layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss.detach())
    return images.detach() * std + mean


SOURCES["zeroq"] = zeroq
SECTIONS["zeroq"] = ZeroqConfig
