"""CIFAR-10 and CIFAR-100: the python and the binary version, and archives of JPEG files."""

import io
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gdfq.data.folder import UNREADABLE_IMAGE
from gdfq.data.images import Size, StoredImages, check_split, checked_labels, of_channels
from gdfq.errors import GdfqError

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR_PYTHON = {
    "cifar10": {"test": ("test_batch",), "train": tuple(f"data_batch_{number}" for number in range(1, 6))},
    "cifar100": {"test": ("test",), "train": ("train",)},
}
CIFAR_SUBFOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
CIFAR_CLASSES = {"cifar10": CIFAR10_CLASSES, "cifar100": tuple(str(number) for number in range(100))}


def find_cifar(path: Path, kind: str, split: str) -> list[Path]:
    """The python or binary files of `split`, all or none, in `path` or in the folder that the archive unpacks to."""
    names = CIFAR_PYTHON[kind][split]
    for folder in (path, *(path / name for name in CIFAR_SUBFOLDERS[kind])):
        for suffix in ("", ".bin"):
            files = [folder / f"{name}{suffix}" for name in names]
            if all(file.is_file() for file in files):
                return files
    return []


def find_archives(path: Path) -> list[Path]:
    candidates = [path] if path.suffix == ".npz" else [path / "test.npz", path / "train.npz"]
    return [file for file in candidates if file.is_file()]


def cifar(
    kind: str,
    path: Path,
    size: Size = None,
    channels: int | None = None,
    split: str = "test",
    mean: Any = None,
    std: Any = None,
) -> StoredImages:
    mean = of_channels(CIFAR_MEAN, channels) if mean is None else mean
    std = of_channels(CIFAR_STD, channels) if std is None else std
    check_split(split)
    classes = CIFAR_CLASSES[kind]
    archive = path if path.suffix == ".npz" else path / f"{split}.npz"
    files = find_cifar(path, kind, split)
    if files:
        parts = [_read_cifar_file(file, kind) for file in files]
    elif archive.is_file():
        parts = [_decode_archive(archive)]
    else:
        names = ", ".join(CIFAR_PYTHON[kind][split])
        raise GdfqError(
            f"{path} lacks the {split} images of {kind}; looked for {names}, the same with .bin, and {split}.npz"
        )
    images = torch.cat([images for images, _ in parts])
    labels = np.concatenate([np.asarray(labels, dtype=np.int64) for _, labels in parts])
    labels = checked_labels(labels, len(images), classes, path)
    return StoredImages(images, labels, classes, mean, std, size, channels)


def _read_cifar_file(path: Path, kind: str) -> tuple[torch.Tensor, Any]:
    """Images uint8 `(N, 3, 32, 32)` and labels of one batch file, binary or pickled."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GdfqError(f"cannot read {path}: {error.strerror or error}") from error
    if path.suffix == ".bin":
        label_bytes = 1 if kind == "cifar10" else 2  # CIFAR-100 puts the coarse label before the fine one
        record = label_bytes + 3072
        if not content or len(content) % record:
            raise GdfqError(
                f"{path} holds {len(content)} bytes, not a multiple of {record}; it is truncated or no {kind} file"
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
        pixels, labels = records[:, label_bytes:], records[:, label_bytes - 1]
    else:
        pixels, labels = _unpickle_cifar(path, content, "labels" if kind == "cifar10" else "fine_labels")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), labels


class _PickledArray:
    """Stands in for numpy.ndarray while unpickling: keeps what was stored and runs nothing of numpy."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran, self.content = state

    def bytes_array(self) -> np.ndarray:
        if self.type.code not in (b"u1", "u1") or self.fortran:
            raise ValueError(f"an array of type {self.type.code}, not of unsigned bytes in C order")
        return np.frombuffer(self.content, dtype=np.uint8).reshape(self.shape)


class _PickledType:
    """Stands in for numpy.dtype while unpickling."""

    def __init__(self, code: bytes | str, *_: Any):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        pass


class _CifarUnpickler(pickle.Unpickler):
    """Reads containers, numbers, text, bytes and arrays of bytes; refuses every other name a pickle may call."""

    ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledType,
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),
        # How Python 3 writes bytes for Python 2.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR files never need") from None


def _unpickle_cifar(path: Path, content: bytes, labels_key: str) -> tuple[np.ndarray, Any]:
    try:
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        return batch["data"].bytes_array().reshape(-1, 3072), batch[labels_key]
    except KeyError as error:
        raise GdfqError(f"{path} has no entry {error}; it is no CIFAR file of this kind") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise GdfqError(f"{path} is truncated or is no CIFAR batch file ({type(error).__name__}: {error})") from error


def read_archive(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a JPEG archive, checked to fit one another."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("jpeg", "offsets", "labels")}
    except KeyError as error:
        raise GdfqError(f"{path} is no JPEG archive, which holds jpeg, offsets and labels: {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise GdfqError(f"{path} is truncated or is no .npz file ({error})") from error
    jpeg, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
    integers = all(np.issubdtype(array.dtype, np.integer) and array.ndim == 1 for array in arrays.values())
    if not integers or jpeg.dtype != np.uint8 or len(offsets) != len(labels) + 1:
        raise GdfqError(f"{path} is no JPEG archive: jpeg (uint8), offsets (N + 1) and labels (N) do not fit together")
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise GdfqError(f"{path} is damaged: its offsets do not rise from 0 to the {len(jpeg)} bytes it holds")
    return arrays


def _decode_archive(path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Images uint8 `(N, 3, H, W)`, all of one size, and labels `(N,)`."""
    arrays = read_archive(path)
    jpeg, offsets = arrays["jpeg"], arrays["offsets"]
    images = []
    for index in range(len(offsets) - 1):
        try:
            with Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes())) as image:
                images.append(np.array(image.convert("RGB")))
        except UNREADABLE_IMAGE as error:
            raise GdfqError(f"cannot decode image {index} of {path}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise GdfqError(f"image {index} of {path} has another size than image 0; a JPEG archive has one size")
    if not images:
        raise GdfqError(f"{path} holds no images")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), arrays["labels"]
