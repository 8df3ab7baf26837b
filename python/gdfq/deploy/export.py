"""From what `quantize` has made to a file that runs in integers: written, verified, and only then there."""

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gdfq.api import Result
from gdfq.config import Config, QuantizerConfig
from gdfq.data import LabeledImages
from gdfq.deploy.verify import Verification, verify
from gdfq.deploy.writer import Normalization, Written, write
from gdfq.errors import GdfqError
from gdfq.graph import Pixels, build_teacher, capture
from gdfq.graph.nodes import some
from gdfq.graph.sizes import ImageSizes
from gdfq.graph.summary import by_reason
from gdfq.memory import images_at_once
from gdfq.methods.method import source_name
from gdfq.precision import products_in_tf32
from gdfq.registry import SOURCES
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors, write_atomically, write_text
from gdfq.target import target_of

IMAGES = 512  # that the whole file is verified on
REAL_IMAGES = 2000


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
            count: synthetic images, the most of the run's bank, or so many of its generator, or else of noise.

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
    if (folder / run_folder.IMAGES).is_file():
        bank = load_tensors(folder / run_folder.IMAGES)[0]
        yield from torch.cat([bank["held_out"], bank["images"]])[:count].split(at_once)
        return
    saved = folder / run_folder.GENERATOR
    if not saved.is_file():
        yield from (quantized.pixels.scaled(torch.randn(size, *shape, generator=random)) for size in sizes)
        return
    channels, *size = shape
    captured = replace(capture(network, tuple(size), channels), pixels=quantized.pixels)
    source = SOURCES[source_name(config)](build_teacher(captured), captured, config, device, False)
    source.generator.load_state_dict(load_tensors(saved)[0])
    yield from (source.images(size)[0] for size in sizes)


def images_of(dataset: LabeledImages, count: int = REAL_IMAGES) -> Iterator[Tensor]:
    """Batches `(N, C, H, W)` of real images to verify a file on, spread over a data set."""
    at_once = images_at_once(*dataset.preparation.shape[1:])
    chosen = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    for start in range(0, len(chosen), at_once):
        yield torch.stack([dataset.image(index) for index in chosen[start : start + at_once]])


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
        """Nested dicts, lists, numbers and text, fit for JSON."""
        floats = [asdict(entry) for entry in self.written.floats]
        verified = None if self.verification is None else self.verification.to_dict()
        return {"file": str(self.path), "stays_float": floats, "verification": verified}

    def __str__(self) -> str:
        lines = [f"written      {self.path}, {self.path.stat().st_size / 1e6:.3g} MB"]
        lines += [f"stays float  {text}" for text in by_reason(self.written.floats)]
        return "\n".join([*lines, *([str(self.verification)] if self.verification else ["not verified"])])


@products_in_tf32(False)
def export(
    quantized: "Result | Quantized",
    path: str | Path,
    *,
    input: Literal["float", "uint8"] = "float",
    normalization: Normalization | None = None,
    integer_only: bool = False,
    verified: bool = True,
    float_model: nn.Module | None = None,
    real_images: Iterable[Tensor] | None = None,
    classes: Sequence[str] | None = None,
    threads: int | None = None,
    opset: int = 21,
    overwrite: bool = False,
) -> Exported:
    """Write a quantized model as an ONNX file for integer runtimes, and verify that it computes what Q does.

    The file (see `gdfq.deploy.writer.write`) and what was found, as JSON of the same name, are there when all has gone
    well, and neither of them otherwise.

    Args:
        quantized: what `quantize` has returned, or more generally what is to be written.
        path: of the file, ending in .onnx.
        input: what the file takes: images as the model takes them, or pixels, uint8 of 0..255, that it normalizes.
        normalization: how pixels are normalized; kept in the file, and needed for `uint8` unless the images' bounds
            say it (those of a timm model).
        integer_only: whether it is an error that something stays float.
        verified: whether to verify. It needs onnxruntime.
        float_model: what was quantized, to compare size and time with.
        real_images: batches `(N, C, H, W)` as the model takes them, on which the file is tried, too.
        classes: their names, kept in the file.
        threads: of onnxruntime; default: PyTorch's.
        opset: of ONNX.
        overwrite: whether a file may be there already.

    Raises:
        NotTheSame: a layer of the file computes something else than Q.
        GdfqError: `onnx` or `onnxruntime` is not installed; what `write` and `verify` raise; a file is there already,
            or cannot be written; with `integer_only`, what stays float.
    """
    if isinstance(quantized, Result):
        quantized = Quantized.of_result(quantized, float_model)
    path = Path(path)
    if path.suffix != ".onnx":
        raise GdfqError(f"{path}: the name of an ONNX file ends in .onnx")
    if path.exists() and not overwrite:
        raise GdfqError(f"{path} is there already: choose another name, or say that it may be replaced (--overwrite)")
    normalization = normalization or _of_bounds(quantized.pixels)
    if input == "uint8" and normalization is None:
        raise GdfqError(
            "how pixels are normalized is not known: give the mean and the standard deviation of pixels in 0..1 "
            "(--pixel-mean and --pixel-std, as 0.485,0.456,0.406 and 0.229,0.224,0.225)"
        )
    student = copy.deepcopy(quantized.student).cpu().eval()
    written = write(
        student, quantized.image_shape, pixels=normalization if input == "uint8" else None,
        metadata=_metadata(quantized, normalization, classes), opset=opset,
    )  # fmt: skip
    if integer_only and written.floats:
        raise GdfqError(_stays_float([f"{entry.name} ({entry.op}): {entry.reason}" for entry in written.floats]))
    verification: Verification | None = None

    def write_and_verify(file: Path) -> None:
        nonlocal verification
        file.write_bytes(written.model.SerializeToString())
        if verified:
            try:
                verification = verify(
                    student, written, file, quantized.images, real_images=real_images,
                    float_model=quantized.float_model, threads=threads,
                )  # fmt: skip
            except GdfqError as error:
                raise GdfqError(str(error).replace(str(file), str(path))) from error
            verification.file = path.name
            if verification.failed:
                layers = some(verification.failed)
                raise NotTheSame(
                    f"the file computes something else than Q in {layers}; it was not kept\n{verification}"
                )
            if integer_only and verification.operators is not None:
                places = verification.operators.places.values()
                floats = [name for place in places for name in place.floats]
                if floats:
                    raise GdfqError(_stays_float(floats))

    write_atomically(path, write_and_verify)
    exported = Exported(path, written, verification)
    write_text(path.with_suffix(".json"), json.dumps(exported.to_dict(), indent=2) + "\n")
    return exported


def _stays_float(what: list[str]) -> str:
    return "\n".join(["not all of it can run in integers. What stays float:", *(f"  {line}" for line in what)])


def _of_bounds(pixels: Pixels) -> Normalization | None:
    """How black and white became the bounds of a pixel, where they are known to have."""
    if not pixels.black_to_white:
        return None
    pairs = list(zip(pixels.low, pixels.high, strict=True))
    mean, std = [-low / (high - low) for low, high in pairs], [1 / (high - low) for low, high in pairs]
    return Normalization([round(value, 6) for value in mean], [round(value, 6) for value in std])


def _metadata(
    quantized: Quantized, normalization: Normalization | None, classes: Sequence[str] | None
) -> dict[str, str]:
    from gdfq import __version__

    config = quantized.config
    about = {
        "gdfq": __version__,
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "input_bits": config.input_bits,
        "layers": {name: bits.model_dump() for name, bits in config.layers.items()},
        "target": target_of(config).name,
    }
    if normalization is not None:
        about |= {"mean": list(normalization.mean), "std": list(normalization.std)}
    if classes is not None:
        about["classes"] = list(classes)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
