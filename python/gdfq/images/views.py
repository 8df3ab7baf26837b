"""How images are looked at while they are optimized: cut and flipped at random, so that they fit in every view."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ASPECT = 4 / 3  # of a crop, at most, and 3 / 4 at least


class Views:
    """With a probability of one half each, all images of a batch are cut to the same place and brought back to their
    size, and flipped left to right (IntraQ, CVPR 2022; SynQ, ICLR 2025).

    Args:
        crop: least share of the area that is left, or None: nothing is cut.
        flip: whether they are flipped.
        random: on the CPU; what decides.
    """

    def __init__(self, crop: float | None, flip: bool, random: torch.Generator) -> None:
        self.crop = crop
        self.flip = flip
        self.random = random

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(N, C, H, W)`, as the next view has them."""
        if self.crop is not None and self._uniform(0, 1) < 0.5:
            images = cropped(images, *self._place(*images.shape[2:]))
        if self.flip and self._uniform(0, 1) < 0.5:
            images = images.flip(3)
        return images

    def _place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop."""
        area, ratio = self._uniform(self.crop or 1, 1), math.exp(self._uniform(-math.log(ASPECT), math.log(ASPECT)))
        rows = min(height, max(1, round(height * math.sqrt(area / ratio))))
        columns = min(width, max(1, round(width * math.sqrt(area * ratio))))
        top, left = (int(self._uniform(0, most + 1)) for most in (height - rows, width - columns))
        return top, left, rows, columns

    def _uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=self.random, dtype=torch.float64).item()


def cropped(images: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """That part of the images, at their size (bilinear)."""
    part = images[:, :, top : top + height, left : left + width]
    return F.interpolate(part, images.shape[2:], mode="bilinear", align_corners=False)
