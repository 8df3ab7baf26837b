"""Images of Gaussian noise at the scale of the model's images: what is left where nothing better is known."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gdfq.config import Config
from gdfq.graph import CapturedModel, Pixels, Teacher
from gdfq.images.source import ImageSource
from gdfq.registry import SOURCES


class GaussianImages(ImageSource):
    """Gaussian noise, labeled by P.

    Args:
        teacher, shape, config, device: see `ImageSource`.
        pixels: its scale; default: N(0, 1).
    """

    def __init__(
        self,
        teacher: Teacher,
        shape: tuple[int, int, int],
        config: Config,
        device: torch.device,
        pixels: Pixels | None = None,
    ) -> None:
        super().__init__(teacher, shape, config, device)
        self.mean, self.std = (pixels or Pixels.standardized(shape[0])).tensors(device)

    def images(self, count: int) -> tuple[Tensor, None]:
        noise = torch.randn(count, *self.shape, generator=self.random.generator, device=self.device)
        return self.transform(noise * self.std + self.mean), None

    def held_out(self) -> Iterator[Tensor]:
        size, count = self.config.schedule.batch_size, self.config.run.held_out_images
        for images in gaussian_images(self.shape, count, size, self.config.run.seed + 1, self.device):
            yield self.transform(images * self.std + self.mean)


def gaussian_images(
    shape: tuple[int, int, int], count: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """`count` images of N(0, 1) noise in batches `(N, *shape)`."""
    random = torch.Generator(device).manual_seed(seed)
    for start in range(0, count, batch_size):
        yield torch.randn(min(batch_size, count - start), *shape, generator=random, device=device)


def pink_images(shape: tuple[int, int, int], count: int, seed: int, device: torch.device) -> Tensor:
    """`count` images `(count, *shape)` of noise with the spectrum of natural images (Field, 1987): amplitudes as 1 / r,
    r the frequency, and r = 1 for an image's mean; of variance 1 on average."""
    noise = torch.randn(count, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    rows, columns = (torch.fft.fftfreq(size, 1 / size, device=device) for size in shape[1:])
    gain = (rows[:, None] ** 2 + columns**2).clamp_min(1).rsqrt()
    gain /= gain.square().mean().sqrt()
    return torch.fft.irfft2(torch.fft.rfft2(noise) * gain[:, : shape[2] // 2 + 1], s=shape[1:])


def gaussian(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> GaussianImages:
    return GaussianImages(teacher, captured.image_shape, config, device, captured.pixels)


SOURCES["gaussian"] = gaussian
