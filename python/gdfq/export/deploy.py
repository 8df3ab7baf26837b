"""From what `quantize` has made to a file that is verified to run in integers: written, checked, and only then there."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.api import Result
from gdfq.config import Config, QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.export.verify import Verification
from gdfq.export.writer import Written
from gdfq.graph import Pixels, build_teacher, capture
from gdfq.graph.sizes import ImageSizes
from gdfq.memory import images_at_once
from gdfq.registry import SOURCES
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors

IMAGES = 512  # that the whole file is verified on


class NotTheSame(GdfqError):  # noqa: N818 - it is what was found
    """The file computes something else than the simulation. The message names the layers; no file was left."""


@dataclass
class Quantized:
    """A quantized model and what is known of it: what a file is made of.

    Attributes:
        student: Q.
        config: how it was quantized.
        pixels: what its images are like, as it takes them.
        images: synthetic batches `(N, C, H, W)` that the file is verified on.
        float_model: what was quantized, to compare the file with; None where it is not there.
    """

    student: fx.GraphModule
    config: QuantizerConfig
    pixels: Pixels
    images: Iterable[Tensor]
    float_model: nn.Module | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return next(module.shape for module in self.student.modules() if isinstance(module, ImageSizes))

    @classmethod
    def of_result(cls, result: Result, float_model: nn.Module | None = None) -> "Quantized":
        """What `quantize` has returned; the images are those that Q was not trained on."""
        report = result.report
        return cls(result.model, report.config.quantizer, report.pixels, result.held_out_images, float_model)

    @classmethod
    def of_run(cls, folder: str | Path, network: nn.Module, count: int = IMAGES) -> "Quantized":
        """What is in the folder of a run.

        Args:
            network: the model that was quantized.
            count: synthetic images, of the run's generator, or else noise.

        Raises:
            GdfqError: the run has not ended, or its model does not fit the network.
        """
        folder = Path(folder)
        if not (folder / run_folder.REPORT).is_file():
            raise GdfqError(f"{folder} has no result yet: go on with the run, gdfq quantize --resume {folder}")
        config = Config.load(folder / run_folder.CONFIG)
        student = run_folder.load_quantized(folder / run_folder.MODEL, network)
        pixels = Pixels(**json.loads((folder / run_folder.REPORT).read_text())["pixels"])
        quantized = cls(student, config.quantizer, pixels, (), network)
        quantized.images = _images_of_run(folder, network, config, quantized, count)
        return quantized


def _images_of_run(
    folder: Path, network: nn.Module, config: Config, quantized: Quantized, count: int
) -> Iterator[Tensor]:
    shape, device = quantized.image_shape, torch.device("cpu")
    random = torch.Generator().manual_seed(config.run.seed)
    at_once = images_at_once(*shape[1:])
    sizes = [min(at_once, count - start) for start in range(0, count, at_once)]
    saved = folder / run_folder.GENERATOR
    if not saved.is_file():
        yield from (quantized.pixels.scaled(torch.randn(size, *shape, generator=random)) for size in sizes)
        return
    channels, *size = shape
    captured = capture(network, tuple(size), channels)
    source = SOURCES[config.images.source](build_teacher(captured), captured, config, device, False)
    source.generator.load_state_dict(load_tensors(saved)[0])
    yield from (source.images(size)[0] for size in sizes)


@dataclass
class Exported:
    """What `export` returns.

    Attributes:
        path: the file.
        written: what is in it.
        verification: what was found; None where nothing was verified.
    """

    path: Path
    written: Written
    verification: Verification | None

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        floats = [vars(entry) for entry in self.written.floats]
        verified = None if self.verification is None else self.verification.to_dict()
        return {"file": str(self.path), "stays_float": floats, "verification": verified}

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for entry in self.written.floats:
            by_reason.setdefault(f"{entry.op}: {entry.reason}", []).append(entry.name)
        lines = [f"written      {self.path}, {self.path.stat().st_size / 1e6:.3g} MB"]
        lines += [f"stays float  {len(names)} x {reason} ({some(names)})" for reason, names in by_reason.items()]
        return "\n".join([*lines, *([str(self.verification)] if self.verification else ["not verified"])])
