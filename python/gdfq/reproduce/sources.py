"""Where the networks and images of a table come from, and what to say where one is not there."""

import fcntl
import hashlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from gdfq.data import load_dataset
from gdfq.demo import test_set
from gdfq.errors import GdfqError
from gdfq.methods import Data
from gdfq.models import load_model
from gdfq.registry import METHODS
from gdfq.reproduce.tables import SHIPPED, Cell, Network

PYTORCHCV_CACHE = Path("~/.torch/models")
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
LAYOUTS = {
    "cifar10": "the python version (data_batch_1 to data_batch_5 and test_batch) or the binary version of CIFAR-10, "
    "from https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "the python version (train and test) or the binary version of CIFAR-100, "
    "from https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet": "val/ and, for FT and calibration, train/, each with one folder of images for each of the 1000 classes "
    "(n01440764 to n15075141), from https://image-net.org",
}
SHIPPED_FOR_TRAINING = 5000  # of the 10,000 images that the package ships


class Sources:
    """Networks and images of a table's cells.

    Args:
        data: `{"cifar10": folder}`, keys from `cifar10`, `cifar100` and `imagenet`.
        weights: `{network key: file}` for networks that pytorchcv is not to be asked for.
    """

    def __init__(self, data: Mapping[str, Path] | None = None, weights: Mapping[str, Path] | None = None) -> None:
        self.data = dict(data or {})
        self.weights = dict(weights or {})
        self.digest = cache(self.digest)
        self.test_images = cache(self.test_images)
        self.training_images = cache(self.training_images)

    # --- networks ---

    def arguments(self, network: Network) -> tuple[str, Path | None, dict[str, Any]]:
        """Spec, weights and keyword arguments of `load_model`."""
        if network == SHIPPED:
            return network.model, None, {}
        weights = self.weights.get(network.key)
        return network.model, weights, {"pretrained": True} if weights is None else {}

    def teacher(self, network: Network) -> nn.Module:
        """The trained network, in eval mode; pytorchcv downloads what it does not find.

        Raises:
            GdfqError: it cannot be had, and what to put where.
        """
        spec, weights, options = self.arguments(network)
        try:
            # pytorchcv talks of its download, and two of the same file at a time would spoil it.
            with redirect_stdout(sys.stderr), _one_process_at_a_time() if self.to_download(network) else nullcontext():
                return load_model(spec, weights, **options)
        except GdfqError as error:
            if not options:
                raise
            raise GdfqError(f"{self._how_to_get_weights(network)} ({error})") from error

    def digest(self, network: Network) -> str | None:
        """Of the user's weights file; None for pytorchcv's and the shipped weights, which have but one content."""
        weights = self.weights.get(network.key)
        if weights is None:
            return None
        with open(weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # --- images ---

    def test_images(self, network: Network) -> Dataset:
        """For top-1.

        Raises:
            GdfqError: they are not there, not in a known layout, or not of the network's classes.
        """
        if network == SHIPPED:
            images = test_set()
            return Subset(images, range(SHIPPED_FOR_TRAINING, len(images)))
        return self._read(network, "test")

    def training_images(self, network: Network) -> Dataset:
        """For fine-tuning and calibration; errors as those of `test_images`."""
        if network == SHIPPED:
            return Subset(test_set(), range(SHIPPED_FOR_TRAINING))
        return self._read(network, "train")

    def _read(self, network: Network, split: str) -> Dataset:
        if network.data not in self.data:
            raise GdfqError(self._how_to_get_images(network))
        folder = self.data[network.data]
        if network.data != "imagenet":
            return load_dataset(folder, network.data, split=split)
        part = folder / ("val" if split == "test" else "train")
        if not part.is_dir():
            raise GdfqError(f"{folder} has no folder {part.name}; {self._how_to_get_images(network)}")
        resize = math.ceil(network.image_size / 0.875)  # as pytorchcv evaluates
        images = load_dataset(part, "folder", crop=network.image_size, resize=resize)
        if len(images.classes) != CLASSES[network.data]:
            raise GdfqError(
                f"{part} holds {len(images.classes)} classes, but {network.key} knows {CLASSES[network.data]}: labels "
                f"would not fit; {self._how_to_get_images(network)}"
            )
        return images

    # --- what is missing ---

    def check(self, cells: Iterable[Cell]) -> None:
        """Open everything that the user gave for `cells`, so that what is wrong with it is said before anything runs.

        Raises:
            GdfqError: weights that cannot be read or do not fit, or test images that are not there.
        """
        for network in dict.fromkeys(cell.network for cell in cells):
            if network.data in self.data or network == SHIPPED:
                self.test_images(network)
            if network.key in self.weights:
                self.teacher(network)

    def missing_images(self, cell: Cell) -> list[str]:
        """What images the cell lacks, and what to put where."""
        try:
            self.test_images(cell.network)
            if METHODS[cell.method].data is not Data.NONE:
                self.training_images(cell.network)
        except GdfqError as error:
            return [str(error)]
        return []

    def to_download(self, network: Network) -> str | None:
        """What to say of weights that are not on this machine yet; None where they are."""
        if not self.arguments(network)[2] or pytorchcv_file(network).is_file():
            return None
        return self._how_to_get_weights(network)

    def _how_to_get_weights(self, network: Network) -> str:
        file = pytorchcv_file(network)
        return (
            f"no weights of {network.key}: put {file.name} into {PYTORCHCV_CACHE} (pytorchcv downloads it to there if "
            f"it can), or give a safetensors file or state dict of the same architecture: --weights {network.key}=FILE"
        )

    def _how_to_get_images(self, network: Network) -> str:
        return f"give the images of {network.data} as --data {network.data}=FOLDER, holding {LAYOUTS[network.data]}"


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """Of those that share pytorchcv's folder."""
    folder = PYTORCHCV_CACHE.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".gdfq.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def pytorchcv_file(network: Network) -> Path:
    """Where pytorchcv keeps the network's weights."""
    from pytorchcv.models.model_store import get_model_name_suffix_data

    error, digest, _ = get_model_name_suffix_data(network.key)
    return PYTORCHCV_CACHE.expanduser() / f"{network.key}-{error}-{digest[:8]}.pth"


def named_paths(option: str, items: Iterable[str], names: Iterable[str]) -> dict[str, Path]:
    """`["cifar10=FOLDER"]` as `{"cifar10": Path("FOLDER")}`; `["FOLDER"]` alone stands for the only one of `names`.

    Raises:
        GdfqError: another name, none where there are several, one that is given twice, or a path that does not exist.
    """
    known = list(dict.fromkeys(names))
    paths: dict[str, Path] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals and len(known) == 1:
            name, text = known[0], item
        if name not in known or not text:
            raise GdfqError(f"{option} {item}: it must be NAME=PATH, and NAME one of {', '.join(known)}")
        if name in paths:
            raise GdfqError(f"{option}: {name} is given twice; leave one of them out")
        paths[name] = Path(text).expanduser()
        if not paths[name].exists():
            raise GdfqError(f"{option} {item}: there is no {paths[name]}")
    return paths
