"""A folder of images: one sub-folder per class, as ImageNet has it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gdfq.data.images import LabeledImages, normalization
from gdfq.errors import GdfqError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageFolder(LabeledImages):
    """Image files in one sub-folder per class, decoded when asked for and seen as RGB."""

    def __init__(
        self,
        files: Sequence[Path],
        labels: torch.Tensor,
        classes: Sequence[str],
        mean: Any,
        std: Any,
        transform: Callable[[Image.Image], Image.Image],
    ):
        super().__init__(labels, classes, *normalization(mean, std, 3))
        self.files = list(files)
        self.transform = transform

    def pixels(self, index: int) -> torch.Tensor:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                image = self.transform(image.convert("RGB"))
        except UNREADABLE_IMAGE as error:
            raise GdfqError(f"cannot decode the image {path}: {error}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def class_folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def folder(
    path: Path,
    resize: int = 256,
    crop: int = 224,
    mean: Any = IMAGENET_MEAN,
    std: Any = IMAGENET_STD,
    interpolation: str = "bilinear",
) -> ImageFolder:
    if not path.is_dir():
        raise GdfqError(f"{path} is not a folder")
    if interpolation not in INTERPOLATIONS:
        raise GdfqError(f"unknown interpolation {interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
    if not (isinstance(crop, int) and isinstance(resize, int) and 1 <= crop <= resize):
        raise GdfqError(f"crop and resize are whole numbers, 1 <= crop <= resize; given: crop {crop}, resize {resize}")
    folders = class_folders(path)
    names = [folder.name for folder in folders]
    splits = [name for name in names if name.lower() in ("train", "val", "valid", "validation", "test")]
    if splits and len(splits) == len(names):
        raise GdfqError(f"{path} holds the splits {', '.join(names)}; give one of them, such as {path / splits[-1]}")
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        files += found
        labels += [label] * len(found)
    if not files:
        raise GdfqError(
            f"{path} holds no images; looked for one sub-folder per class with files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    return ImageFolder(files, torch.tensor(labels), names, mean, std, _ResizeAndCrop(resize, crop, interpolation))


class _ResizeAndCrop:
    """Resize the short side to `resize`, keeping the proportions, then cut the center `crop` x `crop`."""

    def __init__(self, resize: int, crop: int, interpolation: str):
        self.resize = resize
        self.crop = crop
        self.resampling = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width <= height:
            size = (self.resize, self.resize * height // width)
        else:
            size = (self.resize * width // height, self.resize)
        if size != image.size:
            image = image.resize(size, self.resampling)
        left, top = round((size[0] - self.crop) / 2), round((size[1] - self.crop) / 2)
        return image.crop((left, top, left + self.crop, top + self.crop))
