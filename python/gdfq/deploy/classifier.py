"""An ONNX file as a model: images in, logits out, computed by onnxruntime on the CPU."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gdfq.deploy.runtime import run, session
from gdfq.errors import GdfqError

if TYPE_CHECKING:
    from onnx import ModelProto

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxClassifier(nn.Module):
    """What `gdfq.evaluate` can measure of a file: any classifier of images `(N, C, H, W)`, not only this package's.

    A file that takes uint8 takes pixels as a camera gives them: here they are 0 to 255 in float32.

    Args:
        model: the file, or what is in it.
        threads: see `gdfq.deploy.runtime.session`.

    Attributes:
        in_size: height and width that the file takes; None where it takes several.
        channels: that it takes.
        classes: how many logits it gives; None where the file does not say.
        takes_pixels: whether its images are uint8.
        normalization: `mean` and `std` of pixels scaled to 0..1, as the file says that its images are to be
            normalized; empty where it does not say.

    Raises:
        GdfqError: as `session`; or the model does not take one batch of images with the channels first.
    """

    def __init__(self, model: "ModelProto | str | Path", *, threads: int | None = None) -> None:
        super().__init__()
        self.name = str(model) if isinstance(model, str | Path) else "the model"
        self.session = session(model, threads=threads)
        self.input = self._image_input()
        self.batch, self.channels, *size = (n if isinstance(n, int) else None for n in self.input.shape)
        self.in_size = None if None in size else tuple(size)
        self.takes_pixels = self.input.type == "tensor(uint8)"
        self.classes = next((n for n in self.session.get_outputs()[0].shape[1:] if isinstance(n, int)), None)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        stated = {name: json.loads(self.metadata[name]) for name in ("mean", "std") if name in self.metadata}
        self.normalization: dict[str, Any] = {"mean": 0.0, "std": 1 / 255} if self.takes_pixels else stated

    def _image_input(self) -> Any:
        inputs = self.session.get_inputs()
        described = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
        if len(inputs) != 1 or inputs[0].type not in _TYPES or len(inputs[0].shape) != 4:
            raise GdfqError(
                f"{self.name} is no classifier of images: it takes {described or 'nothing'}, and one batch "
                "(N, C, H, W) of float or uint8 is what is measured here"
            )
        if inputs[0].shape[3] in (1, 3) and inputs[0].shape[1] not in (1, 3):
            raise GdfqError(
                f"{self.name} takes images with the channels last ({described}): export it anew, with (N, C, H, W)"
            )
        return inputs[0]

    def feed(self, images: Tensor) -> dict[str, np.ndarray]:
        """Images `(N, C, H, W)` float32 as the session takes them.

        Raises:
            GdfqError: the file takes pixels, and these are none.
        """
        if self.takes_pixels:
            pixels = images.round()  # they come as x / 255 / (1 / 255)
            if not bool((((images - pixels).abs() < 1e-3) & (pixels >= 0) & (pixels <= 255)).all()):
                raise GdfqError(
                    f"{self.name} takes pixels, whole numbers of 0 to 255, and normalizes them itself, but these "
                    "images are normalized already: leave out mean and std"
                )
            images = pixels
        return {self.input.name: np.ascontiguousarray(images.numpy(), dtype=_TYPES[self.input.type])}

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, classes)` of images `(N, C, H, W)`, float32. A file for batches of one size gets such."""
        feed = self.feed(images.cpu())
        name = self.session.get_outputs()[0].name
        (given,) = feed.values()
        size = self.batch or len(given)
        found = []
        for start in range(0, len(given), size):
            part = given[start : start + size]
            missing = [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1)
            found.append(run(self.session, {self.input.name: np.pad(part, missing)}, [name])[0][: len(part)])
        return torch.from_numpy(np.concatenate(found)).float()
