"""GENIE-D (Jeon et al., CVPR 2023): images distilled through a generator, for a GPU.

For every part of the bank there are fresh latents, one an image, and a fresh generator; both are trained until P's BN
statistics fit what comes out, and the last images are kept. Without labels. On a CPU the generator takes several times
as long as the network: images of the source `inverted` are optimized directly.
"""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from gdfq.config import Config, Section
from gdfq.graph import CapturedModel, Pixels, Teacher, swinging
from gdfq.images.bank import Bank, seed_of_part
from gdfq.images.inversion import misfit
from gdfq.images.networks import UpsampledConvolution
from gdfq.memory import explained
from gdfq.nn import to_channels_last
from gdfq.progress import steps
from gdfq.registry import SECTIONS, SOURCES

DECAY_EVERY, DECAY = 100, 0.95  # of the generator's learning rate


class DistillationConfig(Section):
    """GENIE-D: images of a generator and latents that are trained for them alone."""

    images: int = Field(1024, ge=2, description="of the bank; a part more is held out")
    batch_size: int = Field(128, ge=2, description="images that have a generator of their own, a part of the bank")
    iterations: int = Field(4000, ge=1)
    latent_size: int = Field(256, ge=1)
    latent_learning_rate: float = Field(0.1, gt=0, description="of Adam, lowered on a plateau")
    generator_learning_rate: float = Field(0.01, gt=0, description="of Adam, x 0.95 every 100 iterations")
    swing: bool = Field(True, description="inputs of strided convolutions are shifted by chance")


class Decoder(nn.Module):
    """Linear -> BN -> Up2 -> Conv 64 -> BN -> LeakyReLU -> Up2 -> Conv -> Tanh -> BN: latents `(N, latent_size)` to
    standardized images `(N, *image_shape)`.

    Args:
        image_shape: `(channels, height, width)`, any size: the grid starts at a quarter, rounded up, and is cropped.
        latent_size: of the latents.
    """

    def __init__(self, image_shape: tuple[int, int, int], latent_size: int) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        self.start = (math.ceil(self.height / 4), math.ceil(self.width / 4))
        self.linear = nn.Linear(latent_size, 128 * math.prod(self.start))
        self.norm1 = nn.BatchNorm2d(128)
        self.conv1 = UpsampledConvolution(128, 64)
        self.norm2 = nn.BatchNorm2d(64)
        self.conv2 = UpsampledConvolution(64, channels)
        self.norm3 = nn.BatchNorm2d(channels, affine=False)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.norm1(self.linear(latents).view(len(latents), 128, *self.start))
        x = nn.functional.leaky_relu(self.norm2(self.conv1(x)), 0.2)
        return self.norm3(torch.tanh(self.conv2(x)[:, :, : self.height, : self.width]))


def distilled(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> Bank:
    """A bank in parts of at most `distillation.batch_size` images, each with a seed of its own."""
    own = config.distillation

    def make(count: int, part: int) -> Tensor:
        with explained(
            "distilling images",
            {"distillation.batch_size": own.batch_size, "run.checkpointing": config.run.checkpointing},
        ):
            return distill(teacher, captured, own, count, seed_of_part(config, part), device, progress)

    settings = {"distillation": own.model_dump(mode="json")}
    return Bank.in_parts(teacher, captured.image_shape, config, device, make, own.images, own.batch_size, settings)


@torch.enable_grad()  # as `invert`
def distill(
    teacher: Teacher,
    captured: CapturedModel,
    config: DistillationConfig,
    count: int,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> Tensor:
    """Images `(count, *captured.image_shape)` of a new generator of least `misfit`.

    Args:
        seed: of all that is drawn.
    """
    pixels = captured.pixels or Pixels.standardized(captured.image_shape[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generator = Decoder(captured.image_shape, config.latent_size).to(device)
        latents = torch.randn(count, config.latent_size, device=device, requires_grad=True)
    to_channels_last(generator)
    reader = teacher.reader(("statistics",))
    if config.swing:
        reader = swinging(reader, torch.Generator().manual_seed(seed))
    of_latents = torch.optim.Adam([latents], config.latent_learning_rate)
    of_generator = torch.optim.Adam(generator.parameters(), config.generator_learning_rate)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(of_latents, patience=100, min_lr=1e-4)
    decay = torch.optim.lr_scheduler.StepLR(of_generator, DECAY_EVERY, DECAY)
    for _ in steps(config.iterations, "distilled images", progress):
        images = generator(latents)
        loss = misfit(images, reader(pixels.scaled(images))[1]["statistics"])
        for optimizer in (of_latents, of_generator):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (of_latents, of_generator):
            optimizer.step()
        plateau.step(loss.detach())
        decay.step()
    return pixels.scaled(images.detach())


SOURCES["distilled"] = distilled
SECTIONS["distillation"] = DistillationConfig
