"""Banks of images in files: a run's own, written part by part while it is made, and those that later runs take.

A file is safetensors: `images` `(N, C, H, W)` and `held_out`, which nothing is trained on, as they were before the
transforms, and metadata that say what they were made for and how.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import CapturedModel, Teacher
from gdfq.images.bank import Bank
from gdfq.memory import images_at_once
from gdfq.provenance import versions
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors, save_tensors

FORMAT = "1"
HELD_OUT = 8  # of a file that does not say which images are held out, the last of so many


def keep(bank: Bank, folder: Path, captured: CapturedModel, source: str) -> None:
    """Let `bank` write its parts into the run's folder as it makes them, and read those that are there. With the last
    one all become one file.

    Args:
        captured: whose images they are.
        source: that makes them. Parts of another source, network, seed or of other settings are made anew.
    """
    about = {
        "weights": captured.digest,
        "image_shape": list(captured.image_shape),
        "pixels": [list(values) for values in (captured.pixels.mean, captured.pixels.std)] if captured.pixels else None,
        "source": source,
        "seed": bank.config.run.seed,
        "settings": bank.settings,
        "parts": bank.parts,
    }
    bank.kept = _Kept(bank.parts, folder, about)


class _Kept:
    """Parts in files of a folder."""

    def __init__(self, parts: int, folder: Path, about: dict[str, Any]) -> None:
        self.parts = parts
        self.folder = folder
        self.metadata = {"format": FORMAT, "made": json.dumps(about, sort_keys=True)}
        self.whole: list[Tensor] = []

    def find(self, part: int) -> Tensor | None:
        self.whole = self.whole or self._read_whole()
        if self.whole:
            return self.whole[part]
        images = self._read(self._path(part)).get("images")
        if images is not None:
            self._join()
        return images

    def leave(self, part: int, images: Tensor) -> None:
        self._write(self._path(part), {"images": images})
        self._join()

    def _read_whole(self) -> list[Tensor]:
        """All parts of the finished file, the one that is held out last; none where it is not there."""
        found = self._read(self.folder / run_folder.IMAGES)
        if not found:
            return []
        self._remove_parts()
        return [*found["images"].tensor_split(self.parts), found["held_out"]]

    def _join(self) -> None:
        """Make one file of the parts, if all are there."""
        paths = [self._path(part) for part in range(self.parts + 1)]
        if all(path.exists() for path in paths):
            found = [self._read(path).get("images") for path in paths]
            parts = [images for images in found if images is not None]  # those of other settings are still to be made
            if len(parts) == len(found):
                *images, held_out = parts
                self._write(self.folder / run_folder.IMAGES, {"images": torch.cat(images), "held_out": held_out})
                self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.folder.glob(run_folder.IMAGES_PART.format("*")):
            path.unlink()

    def _path(self, part: int) -> Path:
        return self.folder / run_folder.IMAGES_PART.format(part)

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Nothing where there is no file, or one of other settings."""
        tensors, metadata = load_tensors(path) if path.exists() else ({}, {})
        same = all(metadata.get(name) == value for name, value in self.metadata.items())
        return tensors if same else {}

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        save_tensors(path, tensors, self.metadata | {"gdfq": versions()["gdfq"]})


def stored_bank(
    path: str | Path, teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device
) -> Bank:
    """The bank in a file. A warning says if it was made for another network.

    Raises:
        GdfqError: there is no such file, it is broken or no bank, its images are not the model's in shape, too few, or
            not finite.
    """
    tensors, metadata = load_tensors(path)
    if "images" not in tensors:
        raise GdfqError(
            f"{path} is a safetensors file and no bank of images: it has no tensor 'images' (N, C, H, W). "
            f"{run_folder.IMAGES} in the folder of a run is one, see the setting images.source"
        )
    stored = [tensors[name] for name in ("images", "held_out") if name in tensors]
    for images in stored:
        _check(path, images, captured.image_shape)
    images, *stored_apart = stored
    few = -(-len(images) // HELD_OUT)
    images, held_out = (images, *stored_apart) if stored_apart else images.split([len(images) - few, few])
    if not len(images) or not len(held_out):
        raise GdfqError(f"{path} holds too few images: one to train on and one that is held out are the least")
    made = json.loads(metadata["made"]) if "made" in metadata else {}
    if made.get("weights", captured.digest) != captured.digest:
        warnings.warn(
            f"{path}: its images were made for a network with other weights; the report says how well they fit",
            stacklevel=2,
        )
    at_once = images_at_once(*captured.image_shape[1:])
    number = made.get("parts", -(-len(images) // at_once))
    parts = [*images.float().tensor_split(number), held_out.float()]
    return Bank(teacher, captured.image_shape, config, device, parts.__getitem__, number)


def _check(path: str | Path, images: Tensor, shape: tuple[int, int, int]) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise GdfqError(
            f"{path}: a bank's images are a float tensor (N, C, H, W), normalized as the model was trained; here they "
            f"are {images.dtype} of shape {tuple(images.shape)}"
        )
    if tuple(images.shape[1:]) != shape:
        raise GdfqError(
            f"{path} holds images of shape {tuple(images.shape[1:])}, the model takes {shape} (channels, height, "
            "width): take a bank that was made for it, or leave images.file out, and one is made"
        )
    if not images.isfinite().all():
        raise GdfqError(f"{path} holds an image with NaN or Inf: leave it out, or leave images.file out")
