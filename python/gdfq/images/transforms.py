"""What images go through before anybody sees them.

A transform is a class in `gdfq.registry.TRANSFORMS`; the setting `images.transforms` makes one with what it gives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdfq.errors import GdfqError
from gdfq.registry import TRANSFORMS

Transform = Callable[[Tensor], Tensor]


def build_transform(settings: dict[str, dict[str, Any]]) -> Transform:
    """All transforms that are set, one after the other.

    Raises:
        GdfqError: a transform does not take what is set for it.
    """
    transforms = []
    for name, values in settings.items():
        try:
            transforms.append(TRANSFORMS[name](**values))
        except (TypeError, ValueError) as error:
            raise GdfqError(f"setting 'images.transforms.{name}': {error}") from None

    def transform(images: Tensor) -> Tensor:
        for apply in transforms:
            images = apply(images)
        return images

    return transform


class LowPass:
    """SynQ's Gaussian low-pass (ICLR 2025): the centered spectrum times exp(-r^2 / (2 D0^2)), r the distance in
    frequencies from its center.

    Args:
        cutoff: D0, above 0. SynQ has 20 to 100 for images of 224 pixels.
    """

    def __init__(self, cutoff: float) -> None:
        if not cutoff > 0:
            raise ValueError(f"cutoff = {cutoff!r} must be above 0")
        self.cutoff = cutoff

    def __call__(self, images: Tensor) -> Tensor:
        """Images `(N, C, H, W)` with their gradient; float32 whatever autocast says, in the layout that they have."""
        height, width = images.shape[2:]
        rows = torch.fft.fftfreq(height, 1 / height, device=images.device)
        columns = torch.fft.rfftfreq(width, 1 / width, device=images.device)
        gain = torch.exp((rows[:, None] ** 2 + columns**2) / (-2 * self.cutoff**2))
        filtered = torch.fft.irfft2(torch.fft.rfft2(images.float()) * gain, s=(height, width))
        return torch.empty_like(images).copy_(filtered)  # in their type and layout


TRANSFORMS["low_pass"] = LowPass
