"""A folder of images: one sub-folder per class, as ImageNet has it."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gdfq.data.images import LabeledImages, Size, height_and_width, normalization, of_channels
from gdfq.errors import GdfqError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
WHOLE = 64  # images of up to so many pixels are small as they are, and not cut
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageFolder(LabeledImages):
    """Image files in one sub-folder per class, decoded when asked for and seen as RGB, or gray where mean and std are
    `(1, 1, 1)`."""

    def __init__(
        self,
        files: Sequence[Path],
        labels: torch.Tensor,
        classes: Sequence[str],
        mean: torch.Tensor,
        std: torch.Tensor,
        transform: "_ResizeAndCrop",
    ):
        super().__init__(labels, classes, mean, std)
        self.files = list(files)
        self.transform = transform

    def pixels(self, index: int) -> torch.Tensor:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise GdfqError(f"{path} has more than 8 bits a pixel (mode {image.mode}): convert it to 8 bits")
                mode = "RGB" if len(self.mean) == 3 else "L"
                image = self.transform(image if image.mode == mode else image.convert(mode))
        except UNREADABLE_IMAGE as error:
            raise GdfqError(f"cannot decode the image {path}: {error}") from error
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels[None]

    def size_and_words(self) -> tuple[tuple[int, int], str]:
        return self.transform.crop, f"{self.transform}, {'RGB' if len(self.mean) == 3 else 'gray'}"


class UnlabeledFolder(ImageFolder):
    """Image files anywhere in a folder; item i is the image alone."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.image(index)


def class_folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def image_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(file for file in paths if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())


def folder(
    path: Path,
    size: Size = None,
    channels: int | None = None,
    labeled: bool = True,
    resize: int | None = None,
    crop: Size = None,
    mean: Any = None,
    std: Any = None,
    interpolation: str = "bilinear",
) -> ImageFolder:
    if not path.is_dir():
        raise GdfqError(f"{path} is not a folder")
    if channels not in (None, 1, 3):
        raise GdfqError(
            f"the model takes {channels} channels, but image files have 1 or 3; in Python give a data set of your own"
        )
    mean = of_channels(IMAGENET_MEAN, channels) if mean is None else mean
    std = of_channels(IMAGENET_STD, channels) if std is None else std
    transform = _resize_and_crop(size, resize, crop, interpolation)
    files, labels, names = _labeled_files(path, labeled)
    kind = ImageFolder if labeled else UnlabeledFolder
    return kind(files, torch.tensor(labels), names, *normalization(mean, std, channels or 3), transform)


def _labeled_files(path: Path, labeled: bool) -> tuple[list[Path], list[int], list[str]]:
    """Files, labels and the classes' names; of images without labels, files alone."""
    folders = class_folders(path)
    names = [folder.name for folder in folders]
    splits = [name for name in names if name.lower() in ("train", "val", "valid", "validation", "test")]
    if splits and len(splits) == len(names):
        raise GdfqError(f"{path} holds the splits {', '.join(names)}; give one of them, such as {path / splits[-1]}")
    found = [image_files(folder.rglob("*")) for folder in folders]
    files = [file for of_class in found for file in of_class]
    direct = image_files(path.iterdir())
    if not files and not direct:
        raise GdfqError(
            f"{path} holds no images; looked for one sub-folder per class with files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )
    if not labeled:
        return direct + files, [], []
    if not files:
        raise GdfqError(
            f"{len(direct)} images lie directly in {path}, and it has no folders of classes: to evaluate and to train "
            f"takes one sub-folder per class, as {path / 'cat' / direct[0].name}; without classes they are for "
            "calibration alone (`--calibration-data`)"
        )
    if direct:
        warnings.warn(
            f"{len(direct)} images lie directly in {path}, in no class's folder, and are left out", stacklevel=4
        )
    return files, [label for label, of_class in enumerate(found) for _ in of_class], names


def _resize_and_crop(size: Size, resize: int | None, crop: Size, interpolation: str) -> "_ResizeAndCrop":
    """What gives images of `size`, unless `crop` and `resize` say otherwise: up to 64 pixels all of the image, beyond
    it the middle 7/8, as 224 of 256."""
    if interpolation not in INTERPOLATIONS:
        raise GdfqError(f"unknown interpolation {interpolation!r}; allowed: {', '.join(INTERPOLATIONS)}")
    if not isinstance(crop, int | tuple | list | None) or type(resize) not in (int, type(None)):
        raise GdfqError(f"crop and resize are whole numbers; given: crop {crop!r}, resize {resize!r}")
    if size is None and crop is None:
        warnings.warn(
            "images are cut to 224 x 224 pixels, since neither `image_size` nor `crop` says what the model takes",
            stacklevel=5,
        )
    cut = height_and_width(crop if crop is not None else 224 if size is None else size)
    short = min(cut)
    if resize is None:
        resize = short if short <= WHOLE else round(short * 256 / 224)
    if not short <= resize:
        raise GdfqError(f"crop and resize are whole numbers, 1 <= crop <= resize; given: crop {short}, resize {resize}")
    return _ResizeAndCrop(resize, cut, interpolation)


class _ResizeAndCrop:
    """Resize, keeping the proportions, so that the image covers `crop` `(height, width)` enlarged until its short side
    is `resize`; then cut the center."""

    def __init__(self, resize: int, crop: tuple[int, int], interpolation: str):
        self.resize = resize
        self.crop = crop
        self.resampling = Image.Resampling[interpolation.upper()]

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        tall, wide = (side * self.resize // min(self.crop) for side in self.crop)
        narrow = width * tall <= height * wide
        size = (wide, wide * height // width) if narrow else (tall * width // height, tall)
        if size != image.size:
            image = image.resize(size, self.resampling)
        left, top = round((size[0] - self.crop[1]) / 2), round((size[1] - self.crop[0]) / 2)
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def __str__(self) -> str:
        height, width = self.crop
        how = self.resampling.name.lower()
        return f"short side resized to {self.resize} ({how}), center {height} x {width} cut"
