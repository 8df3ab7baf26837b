"""What a data set is: labeled images, normalized, and what all kinds check."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gdfq.errors import GdfqError

SPLITS = ("test", "train")


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

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.pixels(index)
        return (pixels.float().div_(255) - self.mean) / self.std, int(self.labels[index])

    def pixels(self, index: int) -> torch.Tensor:
        """Image `index` as it is stored or decoded: uint8 `(C, H, W)`."""
        raise NotImplementedError


class StoredImages(LabeledImages):
    """Images that lie in memory as one uint8 tensor `(N, C, H, W)`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], mean: Any, std: Any):
        super().__init__(labels, classes, *normalization(mean, std, images.shape[1]))
        self.images = images

    def pixels(self, index: int) -> torch.Tensor:
        return self.images[index]


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
