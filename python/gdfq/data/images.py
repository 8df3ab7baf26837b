"""What a data set is: labeled images, normalized, and what all kinds check."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from gdfq.errors import GdfqError

SPLITS = ("test", "train")
Size = int | Sequence[int] | None


@dataclass(frozen=True)
class Preparation:
    """What a model gets of an image file.

    Attributes:
        shape: `(channels, height, width)`.
        pixels: what was done to the pixels, in words.
        mean, std: that the pixels, scaled to 0..1, are normalized with; one number per channel.
    """

    shape: tuple[int, int, int]
    pixels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{' x '.join(map(str, self.shape))}, {self.pixels}, mean {mean}, std {std}"


class LabeledImages(Dataset):
    """What `load_dataset` returns.

    `labels` is an int64 tensor `(N,)`; `classes` holds one name per class; item i is `(image, label)` with the image
    a normalized float32 tensor `(C, H, W)`.
    """

    def __init__(self, labels: torch.Tensor, classes: Sequence[str], mean: torch.Tensor, std: torch.Tensor):
        self.labels = labels
        self.classes = tuple(classes)
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.image(index), int(self.labels[index])

    def image(self, index: int) -> torch.Tensor:
        """Image `index`, normalized: float32 `(C, H, W)`."""
        return (self.pixels(index).float().div_(255) - self.mean) / self.std

    @property
    def preparation(self) -> Preparation:
        """How the images are prepared."""
        mean, std = (tuple(values.flatten().tolist()) for values in (self.mean, self.std))
        (height, width), words = self.size_and_words()
        return Preparation((len(mean), height, width), words, mean, std)

    def size_and_words(self) -> tuple[tuple[int, int], str]:
        """Height and width of what `pixels` gives, and how it came to be."""
        raise NotImplementedError

    def pixels(self, index: int) -> torch.Tensor:
        """Image `index` as it is stored or decoded: uint8 `(C, H, W)`."""
        raise NotImplementedError


class StoredImages(LabeledImages):
    """Images that lie in memory as one uint8 tensor `(N, C, H, W)`.

    Args:
        images, labels, classes: see `LabeledImages`.
        mean, std: one number or one per channel; three become their mean where one channel is asked for by `channels`.
        size: height and width to give, default the images' own.
        channels: to give, default the images' own; gray images become RGB, and RGB ones gray.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        classes: Sequence[str],
        mean: Any,
        std: Any,
        size: Size = None,
        channels: int | None = None,
    ):
        self.images = images
        stored, *own = images.shape[1:]
        self.size = (own[0], own[1]) if size is None else height_and_width(size)
        self.channels = stored if channels is None else channels
        if self.channels != stored and {self.channels, stored} != {1, 3}:
            raise GdfqError(
                f"the model takes {self.channels} channels, but these images have {stored}; in Python give a data set "
                "of your own that has them"
            )
        super().__init__(labels, classes, *normalization(mean, std, self.channels))

    def pixels(self, index: int) -> torch.Tensor:
        pixels = self.images[index]
        if len(pixels) > self.channels:
            pixels = (pixels * GRAY).sum(0, keepdim=True).round().byte()
        if tuple(pixels.shape[1:]) != self.size:
            resized = F.interpolate(pixels[None].float(), self.size, mode="bilinear", antialias=True)[0]
            pixels = resized.round().clamp(0, 255).byte()
        return pixels.expand(self.channels, *self.size)

    def size_and_words(self) -> tuple[tuple[int, int], str]:
        stored, height, width = self.images.shape[1:]
        words = "as stored" if (height, width) == self.size else f"resized from {height} x {width} (bilinear)"
        return self.size, words + {-2: ", gray made RGB", 2: ", RGB made gray"}.get(stored - self.channels, "")


GRAY = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601, as Pillow has it


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Of a number for both, or of the two.

    Raises:
        GdfqError: anything else.
    """
    both = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(both) != 2 or not all(type(side) is int and side >= 1 for side in both):
        raise GdfqError(f"a size in pixels is a whole number from 1, or (height, width); given: {size!r}")
    return both[0], both[1]


def of_channels(values: Sequence[float], channels: int | None) -> float | Sequence[float]:
    """A known mean or std of red, green and blue; for gray images, theirs."""
    return sum(values) / len(values) if channels == 1 else values


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise GdfqError(f"split is {' or '.join(SPLITS)}, not {split!r}")


def normalization(mean: Any, std: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean` and `std` as float32 `(C, 1, 1)`."""
    tensors = []
    for name, given in (("mean", mean), ("std", std)):
        try:
            values = torch.as_tensor(given, dtype=torch.float32).flatten()
        except (TypeError, ValueError, RuntimeError) as error:
            raise GdfqError(f"{name} is a number or one number per channel, not {given!r}") from error
        if len(values) not in (1, channels) or not values.isfinite().all():
            raise GdfqError(f"{name} needs 1 or {channels} finite numbers for these images, given: {given}")
        if name == "std" and not (values > 0).all():
            raise GdfqError(f"std must be above 0, given: {given}")
        tensors.append(values.expand(channels).reshape(channels, 1, 1).clone())
    return tensors[0], tensors[1]


def checked_labels(labels: Any, count: int, classes: Sequence[str], where: Path) -> torch.Tensor:
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    if labels.shape != (count,):
        raise GdfqError(f"{where} holds {count} images but {labels.numel()} labels")
    if count == 0:
        raise GdfqError(f"{where} holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise GdfqError(f"{where} holds labels {low}..{high}; allowed: 0..{len(classes) - 1}")
    return labels
