"""Whether a file does what the simulation does, in integers, and what that is worth: size and time."""

import contextlib
import copy
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gdfq.deploy.classifier import OnnxClassifier
from gdfq.deploy.integers import IntegerSimulation
from gdfq.deploy.levels import (
    EPSILON,
    LOGITS,
    LayerCheck,
    Simulation,
    compare,
    computed_levels,
    cut,
    layers_before,
)
from gdfq.deploy.runtime import Operators, Timing, imported, interleaved_time, operators, session
from gdfq.deploy.writer import Written
from gdfq.errors import GdfqError
from gdfq.graph.nodes import some
from gdfq.graph.query import rounds_biases
from gdfq.precision import products_in_tf32

FLOAT32_OF = 256
"""Images on which Q is run as it is, too; elsewhere in integers, see `gdfq.deploy.integers`."""
LEVELS_OF = 32
"""Images whose levels are compared."""
_SMALLEST = 1e-30  # logit that differences are compared with, where all of them are zero
_AT_ONCE = 8 * 224 * 224  # pixels of images that are computed together: what they give is in memory that is used again
_MOST_AT_ONCE = 64
_UNLESS = "unless session.x64quantprecision is set to 1, as it is here"


@dataclass(frozen=True)
class Argmax:
    """On how many of the images the file and the simulation say the same class, and how many classes the file says."""

    equal: int
    images: int
    classes: int

    def __str__(self) -> str:
        return f"{self.equal} of {self.images} equal ({self.equal / self.images:.2%}), {self.classes} classes"


@dataclass
class Verification:
    """What was found. What could not be is None, and `notes` says why.

    Attributes:
        file: its name.
        layers: by quantizer, its levels against the simulation's.
        logits: how far they are apart, given the simulation's levels, as a share of the largest; `LOGITS` are allowed.
        last_layer: what the logits are computed by.
        argmax: of the whole file, on `synthetic` images and on `real` ones.
        operators: what onnxruntime makes of the file.
        bytes, float_bytes: of the file, and of the float model written by torch.onnx.
        time, float_time: of one image.
        threads: that were timed.
        saturating: layers that can saturate on x64 without VNNI, unless `session.x64quantprecision` is set.
        saturated: by layer, how many codes are others on this CPU without it. All else was found with it.
        notes: what could not be found out, and what a reader has to know.
    """

    file: str
    layers: dict[str, LayerCheck] = field(default_factory=dict)
    logits: float | None = None
    last_layer: str = "logits"
    argmax: dict[str, Argmax] = field(default_factory=dict)
    operators: Operators | None = None
    bytes: int = 0
    float_bytes: int | None = None
    time: Timing | None = None
    float_time: Timing | None = None
    threads: int = 1
    saturating: list[str] = field(default_factory=list)
    saturated: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Names of the layers that compute something else than the simulation."""
        wrong = [check.name for check in self.layers.values() if check.wrong]
        return wrong + ([self.last_layer] if self.logits is not None and not self.logits <= LOGITS else [])

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts, lists, numbers and text, fit for JSON."""
        return asdict(self) | {"failed": self.failed, "epsilon": EPSILON, "logits_epsilon": LOGITS}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __str__(self) -> str:
        table = Table(box=None, show_header=False, title=f"verification of {self.file}", title_justify="left")
        table.add_column()
        table.add_column()
        for name, text in self._rows():
            table.add_row(name, text)
        out = io.StringIO()
        Console(file=out, width=120).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())

    def _rows(self) -> list[tuple[str, str]]:
        rows = self._of_levels() if self.layers else []
        rows += [("argmax", f"on {name} images {found}") for name, found in self.argmax.items()]
        if self.operators is not None:
            places = self.operators.places
            found = (f"{place.integer} of {place.total} {kind}" for kind, place in places.items())
            rows.append(("integers", ", ".join(found)))
            rows += [("in float", f"{kind}: {', '.join(p.floats)}") for kind, p in places.items() if p.floats]
            counts = self.operators.counts.items()
            rows.append(("operators", ", ".join(f"{name} {count}" for name, count in counts)))
        rows += self._of_cost()
        if self.saturating:
            rows.append(("saturation", f"possible on x64 without VNNI in {some(self.saturating)}, {_UNLESS}"))
        if self.saturated:
            here = ", ".join(f"{name} ({count:,} codes)" for name, count in self.saturated.items())
            rows.append(("SATURATES", f"on this CPU {here}, {_UNLESS}"))
        return rows + [("note", note) for note in self.notes]

    def _of_levels(self) -> list[tuple[str, str]]:
        checks = self.layers.values()
        total = sum(checks, LayerCheck(""))
        text = f"{total.codes:,} in {len(checks)} places: {total.wrong:,} wrong, {total.boundary:,} within {EPSILON:g} "
        text += "of the range of a rounding boundary" + (f" (at most {total.farthest:.1g})" if total.boundary else "")
        rows = [("levels", text)]
        rows += [("WRONG", f"{check.name}: {check.wrong:,} of {check.codes:,}") for check in checks if check.wrong]
        word = "logits" if self.logits <= LOGITS else "WRONG"
        return [*rows, (word, f"{self.last_layer}: {self.logits:.1g} of the largest apart")]

    def _of_cost(self) -> list[tuple[str, str]]:
        size = f"{self.bytes / 1e6:.3g} MB"
        if self.float_bytes:
            ratio = self.float_bytes / self.bytes
            share = f"1/{ratio:.1f} of" if ratio >= 1 else f"{1 / ratio:.1f} times"
            size += f", {share} the float model's {self.float_bytes / 1e6:.3g} MB"
        if self.time is None:
            return [("size", size)]
        time = f"{self.time} an image, {self.threads} threads"
        if self.float_time is not None:
            time += f"; {self.time.median / self.float_time.median:.2f} times the float model's {self.float_time}"
        return [("size", size), ("time", time)]


@products_in_tf32(False)
def verify(
    student: nn.Module,
    written: Written,
    path: str | Path,
    images: Iterable[Tensor],
    *,
    real_images: Iterable[Tensor] | None = None,
    float_model: nn.Module | None = None,
    threads: int | None = None,
    seconds: float = 3.0,
) -> Verification:
    """Check a file against Q, from which it was written.

    Args:
        student: Q; it is not changed.
        written: what the file holds, and where the codes of Q's quantizers are in it.
        path: the file.
        images: synthetic batches `(N, C, H, W)`, as Q takes them. On the first `LEVELS_OF` images all levels are
            compared, on all of them the class.
        real_images: more of them, for the class alone.
        float_model: what was quantized, to compare size and time with.
        threads: of onnxruntime, default: as many as PyTorch's.
        seconds: about how long time is taken.

    Raises:
        GdfqError: onnxruntime refuses the file; there are no images.
    """
    path = Path(path)
    result = Verification(path.name, bytes=path.stat().st_size, threads=threads or torch.get_num_threads())
    try:
        imported("onnx"), imported("onnxruntime")
    except GdfqError as error:
        result.notes.append(f"not verified: {error}")
        return result
    file = OnnxClassifier(path, threads=result.threads)
    student = _on_cpu(student)
    batches = list(_parts(images))
    if not batches:
        raise GdfqError("there are no images to verify the file on")
    result.operators = operators(path, {layer.node for layer in written.layers})
    _check_levels(result, student, written, file, torch.cat(batches)[:LEVELS_OF])
    simulation = IntegerSimulation(student).run if rounds_biases(student) else student
    result.argmax["synthetic"] = _argmax(simulation, file, batches)
    if real_images is not None:
        result.argmax["real"] = _argmax(simulation, file, _parts(real_images))
    few = _parts([torch.cat(batches)[:FLOAT32_OF]])
    result.argmax["synthetic, Q's sums in float32,"] = _argmax(student, file, few)
    _compare_with_float(result, file, float_model, batches[0][:1], seconds)
    result.saturating = [layer.name for layer in written.layers if layer.can_saturate]
    return result


def _parts(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches `(N, C, H, W)`, on the CPU in float32, a few images at a time."""
    for batch in batches:
        if len(batch):
            height, width = batch.shape[2:]
            count = max(1, min(_MOST_AT_ONCE, _AT_ONCE // (height * width)))
            yield from batch.detach().cpu().float().split(count)


def _on_cpu(model: nn.Module) -> nn.Module:
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    return model if on_cpu else copy.deepcopy(model).cpu()


def _check_levels(
    result: Verification, student: nn.Module, written: Written, file: OnnxClassifier, images: Tensor
) -> None:
    model = cut(written.model, written.codes)
    plain, precise = (session(model, x64quantprecision=way, threads=result.threads) for way in (False, True))
    simulation = Simulation(student, written.codes)
    names = layers_before(written.model, written.codes)
    result.last_layer = names["logits"]
    apart = []
    for part in _parts([images]):
        part, feed = as_file_takes(file, part)
        levels, logits = simulation.levels(part)
        computed, of_file = computed_levels(precise, levels, written.codes, feed)
        for name, check in compare(simulation, part, levels, computed, names).items():
            result.layers[name] = result.layers[name] + check if name in result.layers else check
        apart.append(float((of_file - logits).abs().max() / logits.abs().max().clamp_min(_SMALLEST)))
        otherwise, _ = computed_levels(plain, levels, written.codes, feed)
        for name, found in computed.items():
            differing = int((found != otherwise[name]).sum())
            if differing:
                result.saturated[names[name]] = result.saturated.get(names[name], 0) + differing
    result.logits = max(apart)
    ours, whole = operators(model).integers, result.operators.integers
    if ours != whole:
        result.notes.append(f"levels were compared in {_listed(ours)}, but the whole file runs {_listed(whole)}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def as_file_takes(file: OnnxClassifier, images: Tensor) -> tuple[Tensor, dict]:
    """Images `(N, C, H, W)` as Q and as the file take them: where that is pixels, Q gets what they are normalized."""
    if not file.takes_pixels:
        return images, file.feed(images)
    mean, std = (torch.tensor(json.loads(file.metadata[name])).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255)
    return (pixels / 255 - mean) / std, file.feed(pixels)


@torch.inference_mode()
def _argmax(simulation: Callable[[Tensor], Tensor], file: OnnxClassifier, batches: Iterable[Tensor]) -> Argmax:
    equal = count = 0
    classes: set[int] = set()
    for batch in batches:
        images, feed = as_file_takes(file, batch)
        (given,) = feed.values()
        said = file(torch.from_numpy(given).float()).argmax(1)
        equal += int((simulation(images).argmax(1) == said).sum())
        classes.update(said.tolist())
        count += len(images)
    return Argmax(equal, count, len(classes))


def _compare_with_float(
    result: Verification, file: OnnxClassifier, float_model: nn.Module | None, image: Tensor, seconds: float
) -> None:
    image, feed = as_file_takes(file, image)
    calls = [lambda: file.session.run(None, feed)]
    with tempfile.TemporaryDirectory() as folder:
        if float_model is not None:
            path = Path(folder) / "float.onnx"
            try:
                write_float(float_model, image, path)
                other = session(path, threads=result.threads)
                result.float_bytes = path.stat().st_size
                calls.append(lambda: other.run(None, {"images": image.numpy()}))
            except Exception as error:  # torch.onnx's: the float model is there to compare with, no more
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                result.notes.append(f"not compared with the float model, which torch.onnx does not write: {reason}")
        result.time, *others = interleaved_time(calls, seconds)
        result.float_time = next(iter(others), None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to the standard output, from C++ either."""
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


def write_float(model: nn.Module, image: Tensor, path: Path) -> None:
    """`torch.onnx.export` of the float model, for any batch, by the exporter that needs no other package."""
    with warnings.catch_warnings(), _silent():  # where it fails, it prints the graph
        warnings.simplefilter("ignore")
        torch.onnx.export(
            copy.deepcopy(model).cpu().eval(), (image,), path, dynamo=False, input_names=["images"],
            output_names=["logits"], dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
        )  # fmt: skip
