"""Fashion-MNIST and MNIST: idx files."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gdfq.data.images import Size, StoredImages, check_split, checked_labels
from gdfq.errors import GdfqError

FASHION_MNIST_MEAN, FASHION_MNIST_STD = 0.2860, 0.3530
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(path: str | Path) -> torch.Tensor:
    """The array of unsigned bytes in an idx file, plain or gzip: uint8, in the shape that the file states.

    Raises `GdfqError` when the file is missing, is no idx file, holds another type than unsigned bytes, or has more
    or fewer bytes than its shape needs.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise GdfqError(f"no such file: {path}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise GdfqError(f"{path} is truncated or damaged ({error}); copy it again") from error
    except OSError as error:
        raise GdfqError(f"cannot read {path}: {error.strerror or error}") from error
    # Two zero bytes, the type (8: unsigned byte), the number of dimensions, then each size as 4 bytes, big-endian.
    if len(content) < 4 or content[:2] != b"\0\0":
        raise GdfqError(f"{path} is no idx file: it does not begin with two zero bytes")
    if content[2] != 8:
        raise GdfqError(f"{path} holds idx type 0x{content[2]:02x}; only unsigned bytes (0x08) are read")
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise GdfqError(
            f"{path} states the shape {shape} but holds {max(0, len(content) - header)} bytes of data; it is truncated "
            "or damaged, copy it again"
        )
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy())


def find_idx(path: Path, split: str) -> tuple[Path, Path] | None:
    """The images' and the labels' file of `split`, in `path` or where torchvision puts them."""
    prefix = "t10k" if split == "test" else "train"
    for folder in (path, path / "FashionMNIST" / "raw"):
        found = [
            next((file for suffix in ("", ".gz") if (file := folder / f"{prefix}-{name}{suffix}").is_file()), None)
            for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
        ]
        if all(found):
            return found[0], found[1]
    return None


def fashion_mnist(
    path: Path,
    size: Size = None,
    channels: int | None = None,
    split: str = "test",
    mean: Any = FASHION_MNIST_MEAN,
    std: Any = FASHION_MNIST_STD,
) -> StoredImages:
    check_split(split)
    files = find_idx(path, split)
    if files is None:
        prefix = "t10k" if split == "test" else "train"
        raise GdfqError(
            f"{path} lacks {prefix}-images-idx3-ubyte[.gz] or {prefix}-labels-idx1-ubyte[.gz]; Fashion-MNIST is at "
            "https://github.com/zalandoresearch/fashion-mnist and in Debian's package dataset-fashion-mnist"
        )
    images = read_idx(files[0])
    if images.dim() != 3:
        raise GdfqError(f"{files[0]} holds an array of shape {tuple(images.shape)}, not images (N, H, W)")
    labels = checked_labels(read_idx(files[1]), len(images), FASHION_MNIST_CLASSES, files[1])
    return StoredImages(images[:, None], labels, FASHION_MNIST_CLASSES, mean, std, size, channels)
