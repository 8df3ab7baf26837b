"""Labelled images for measuring accuracy (and for the fine-tuning baseline, which is allowed to see data).

Quantizing needs none of this. Every data set yields `(image, label)`: a normalised float32 image `(C, H, W)` and an
int.
"""

import gzip
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

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
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = ("test", "train")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class LabelledImages(Dataset):
    """What `load_dataset` returns.

    `labels` is an int64 tensor `(N,)`; `classes` holds one name per class; item i is `(image, label)` with the image
    a normalised float32 tensor `(C, H, W)`.
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


class StoredImages(LabelledImages):
    """Images that lie in memory as one uint8 tensor `(N, C, H, W)`."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], mean: Any, std: Any):
        super().__init__(labels, classes, *_normalisation(mean, std, images.shape[1]))
        self.images = images

    def pixels(self, index: int) -> torch.Tensor:
        return self.images[index]


class ImageFolder(LabelledImages):
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
        super().__init__(labels, classes, *_normalisation(mean, std, 3))
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


def load_dataset(spec: str | Path, kind: str | None = None, **options: Any) -> LabelledImages:
    """The labeled images at `spec`.

    Args:
        spec: a folder (or a `.npz` file), or the words `fashion-mnist` for the test images that come with the
            package (`./fashion-mnist` is a folder of that name).
        kind: one of the kinds below; None looks at what the folder holds.
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
            (256), then the centre `crop` x `crop` (224) is cut; `interpolation` is `bilinear` (the default),
            `bicubic`, `lanczos`, `nearest`, `box` or `hamming`. Mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225).

    Raises `GdfqError` for a missing folder, a layout that is none of these, truncated or malformed files, labels
    outside the kind's classes and options that the kind does not have. An image file that cannot be decoded is named
    when it is asked for.
    """
    if kind is not None and kind not in KINDS:
        raise GdfqError(f"unknown kind of data {kind!r}; the kinds are {', '.join(KINDS)}")
    if str(spec) == "fashion-mnist" and kind in (None, "fashion-mnist"):
        path, kind = Path(__file__).parent / "demo", "fashion-mnist"
    else:
        path = Path(spec).expanduser()
    if not path.exists():
        raise GdfqError(f"no such folder: {path}; give a folder with data, or fashion-mnist for the built-in images")
    kind = kind or _infer_kind(path)
    reader, allowed = KINDS[kind]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise GdfqError(f"{', '.join(unknown)}: no option of {kind} data; its options are {', '.join(allowed)}")
    return reader(path, **options)


def _infer_kind(path: Path) -> str:
    if any(_find_idx(path, split) for split in SPLITS):
        return "fashion-mnist"
    for kind in CIFAR_CLASSES:
        if any(_find_cifar(path, kind, split) for split in SPLITS):
            return kind
    archives = _find_archives(path)
    if archives:
        return "cifar10" if int(_read_archive(archives[0])["labels"].max(initial=0)) < 10 else "cifar100"
    if path.is_dir() and _class_folders(path):
        return "folder"
    raise GdfqError(
        f"{path} holds no data that is known here; looked for t10k-images-idx3-ubyte[.gz] (fashion-mnist), test_batch "
        "or test_batch.bin (cifar10), test and train or test.bin (cifar100), test.npz (a JPEG archive), and one "
        "sub-folder per class (folder)"
    )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise GdfqError(f"split is {' or '.join(SPLITS)}, not {split!r}")


def _normalisation(mean: Any, std: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _checked_labels(labels: Any, count: int, classes: Sequence[str], where: Path) -> torch.Tensor:
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    if labels.shape != (count,):
        raise GdfqError(f"{where} holds {count} images but {labels.numel()} labels")
    if count == 0:
        raise GdfqError(f"{where} holds no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(classes):
        raise GdfqError(f"{where} holds labels {low}..{high}; allowed: 0..{len(classes) - 1}")
    return labels


# --- Fashion-MNIST


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


def _find_idx(path: Path, split: str) -> tuple[Path, Path] | None:
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


def _fashion_mnist(
    path: Path, split: str = "test", mean: Any = FASHION_MNIST_MEAN, std: Any = FASHION_MNIST_STD
) -> StoredImages:
    _check_split(split)
    files = _find_idx(path, split)
    if files is None:
        prefix = "t10k" if split == "test" else "train"
        raise GdfqError(
            f"{path} lacks {prefix}-images-idx3-ubyte[.gz] or {prefix}-labels-idx1-ubyte[.gz]; Fashion-MNIST is at "
            "https://github.com/zalandoresearch/fashion-mnist and in Debian's package dataset-fashion-mnist"
        )
    images = read_idx(files[0])
    if images.dim() != 3:
        raise GdfqError(f"{files[0]} holds an array of shape {tuple(images.shape)}, not images (N, H, W)")
    labels = _checked_labels(read_idx(files[1]), len(images), FASHION_MNIST_CLASSES, files[1])
    return StoredImages(images[:, None], labels, FASHION_MNIST_CLASSES, mean, std)


# --- CIFAR

CIFAR_PYTHON = {
    "cifar10": {"test": ("test_batch",), "train": tuple(f"data_batch_{number}" for number in range(1, 6))},
    "cifar100": {"test": ("test",), "train": ("train",)},
}
CIFAR_SUBFOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
CIFAR_CLASSES = {"cifar10": CIFAR10_CLASSES, "cifar100": tuple(str(number) for number in range(100))}


def _find_cifar(path: Path, kind: str, split: str) -> list[Path]:
    """The python or binary files of `split`, all or none, in `path` or in the folder that the archive unpacks to."""
    names = CIFAR_PYTHON[kind][split]
    for folder in (path, *(path / name for name in CIFAR_SUBFOLDERS[kind])):
        for suffix in ("", ".bin"):
            files = [folder / f"{name}{suffix}" for name in names]
            if all(file.is_file() for file in files):
                return files
    return []


def _find_archives(path: Path) -> list[Path]:
    candidates = [path] if path.suffix == ".npz" else [path / "test.npz", path / "train.npz"]
    return [file for file in candidates if file.is_file()]


def _cifar(kind: str, path: Path, split: str = "test", mean: Any = CIFAR_MEAN, std: Any = CIFAR_STD) -> StoredImages:
    _check_split(split)
    classes = CIFAR_CLASSES[kind]
    archive = path if path.suffix == ".npz" else path / f"{split}.npz"
    files = _find_cifar(path, kind, split)
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
    return StoredImages(images, _checked_labels(labels, len(images), classes, path), classes, mean, std)


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


def _read_archive(path: Path) -> dict[str, np.ndarray]:
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
    arrays = _read_archive(path)
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


# --- a folder of images


def _class_folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _folder(
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
    folders = _class_folders(path)
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
    """Resize the short side to `resize`, keeping the proportions, then cut the centre `crop` x `crop`."""

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


KINDS: dict[str, tuple[Callable[..., LabelledImages], tuple[str, ...]]] = {
    "fashion-mnist": (_fashion_mnist, ("split", "mean", "std")),
    "cifar10": (partial(_cifar, "cifar10"), ("split", "mean", "std")),
    "cifar100": (partial(_cifar, "cifar100"), ("split", "mean", "std")),
    "folder": (_folder, ("resize", "crop", "mean", "std", "interpolation")),
}
