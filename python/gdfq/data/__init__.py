"""Labeled images for measuring accuracy (and for the fine-tuning baseline, which is allowed to see data).

Quantizing needs none of this. Every data set yields `(image, label)`: a normalized float32 image `(C, H, W)` and an
int.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gdfq.data.cifar import CIFAR10_CLASSES, CIFAR_CLASSES, cifar, find_archives, find_cifar, read_archive
from gdfq.data.folder import ImageFolder, UnlabeledFolder, class_folders, folder, image_files
from gdfq.data.idx import (
    FASHION_MNIST_CLASSES,
    FASHION_MNIST_MEAN,
    FASHION_MNIST_STD,
    fashion_mnist,
    find_idx,
    read_idx,
)
from gdfq.data.images import SPLITS, LabeledImages, Preparation, Size, StoredImages
from gdfq.errors import GdfqError

__all__ = [
    "CIFAR10_CLASSES",
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_MEAN",
    "FASHION_MNIST_STD",
    "ImageFolder",
    "LabeledImages",
    "Preparation",
    "StoredImages",
    "UnlabeledFolder",
    "find_data",
    "load_dataset",
    "read_idx",
]


def load_dataset(
    spec: str | Path,
    kind: str | None = None,
    *,
    image_size: Size = None,
    channels: int | None = None,
    labeled: bool = True,
    **options: Any,
) -> LabeledImages:
    """The labeled images at `spec`; their `preparation` says what was done to them.

    Args:
        spec: a folder (or a `.npz` file), or the words `fashion-mnist` for the test images that come with the
            package (`./fashion-mnist` is a folder of that name).
        kind: one of the kinds below; None looks at what the folder holds.
        image_size: that the model takes, pixels or `(height, width)`; default: the data's own, of a folder 224.
        channels: that the model takes, 1 or 3; default: the data's own, of a folder 3.
        labeled: False for images alone, of a folder that needs no classes then: an item is the image.
        options: `mean` and `std`, of pixels scaled to 0..1, are one number or one per channel. Further options belong
            to a kind.

    Kinds:
        `fashion-mnist`: idx files, plain or `.gz`, named as Fashion-MNIST and MNIST name them. `split` is `test` (the
            default, files `t10k-...`) or `train`. Mean 0.2860, std 0.3530.
        `cifar10`, `cifar100`: the python version (`test_batch`, `data_batch_1`.., or `test`, `train`), the binary
            version (`*.bin`), or a JPEG archive: `test.npz` and `train.npz` with the arrays `jpeg` (uint8, all JPEG
            files one after another), `offsets` (N + 1 integers; image i is `jpeg[offsets[i]:offsets[i + 1]]`) and
            `labels` (N integers). `split` is `test` (the default) or `train`; a single `.npz` file has none. Mean
            (0.4914, 0.4822, 0.4465), std (0.2023, 0.1994, 0.2010).
        `folder`: one sub-folder per class, classes numbered in sorted order. The short side is resized to `resize`
            (default: `crop` up to 64 pixels, beyond them `crop` * 256 / 224), then the center `crop` x `crop` (default:
            `image_size`) is cut; `interpolation` is `bilinear` (the default),
            `bicubic`, `lanczos`, `nearest`, `box` or `hamming`. Mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225).

    Raises `GdfqError` for a missing folder, a layout that is none of these, truncated or malformed files, labels
    outside the kind's classes and options that the kind does not have. An image file that cannot be decoded is named
    when it is asked for.
    """
    path, kind = find_data(spec, kind)
    reader, allowed = KINDS[kind]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise GdfqError(f"{', '.join(unknown)}: no option of {kind} data; its options are {', '.join(allowed)}")
    if kind == "folder":
        options["labeled"] = labeled
    return reader(path, image_size, channels, **options)


def find_data(spec: str | Path, kind: str | None = None) -> tuple[Path, str]:
    """Path and kind of the data that `load_dataset` reads; errors as there."""
    if kind is not None and kind not in KINDS:
        raise GdfqError(f"unknown kind of data {kind!r}; the kinds are {', '.join(KINDS)}")
    if str(spec) == "fashion-mnist" and kind in (None, "fashion-mnist"):
        return Path(__file__).parents[1] / "demo", "fashion-mnist"
    path = Path(spec).expanduser()
    if not path.exists():
        raise GdfqError(f"no such folder: {path}; give a folder with data, or fashion-mnist for the built-in images")
    return path, kind or _infer_kind(path)


def _infer_kind(path: Path) -> str:
    if any(find_idx(path, split) for split in SPLITS):
        return "fashion-mnist"
    for kind in CIFAR_CLASSES:
        if any(find_cifar(path, kind, split) for split in SPLITS):
            return kind
    archives = find_archives(path)
    if archives:
        return "cifar10" if int(read_archive(archives[0])["labels"].max(initial=0)) < 10 else "cifar100"
    if path.is_dir() and (class_folders(path) or image_files(path.iterdir())):
        return "folder"
    raise GdfqError(
        f"{path} holds no data that is known here; looked for t10k-images-idx3-ubyte[.gz] (fashion-mnist), test_batch "
        "or test_batch.bin (cifar10), test and train or test.bin (cifar100), test.npz (a JPEG archive), and one "
        "sub-folder per class (folder)"
    )


KINDS: dict[str, tuple[Callable[..., LabeledImages], tuple[str, ...]]] = {
    "fashion-mnist": (fashion_mnist, ("split", "mean", "std")),
    "cifar10": (partial(cifar, "cifar10"), ("split", "mean", "std")),
    "cifar100": (partial(cifar, "cifar100"), ("split", "mean", "std")),
    "folder": (folder, ("resize", "crop", "mean", "std", "interpolation")),
}
