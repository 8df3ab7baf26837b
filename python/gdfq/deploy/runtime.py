"""What is known of onnxruntime: to open a file, to see what runs of it in integers, and to time it."""

import importlib
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from gdfq.errors import GdfqError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto
    from onnxruntime import InferenceSession

KINDS = {  # of places that a target promises to run in integers, and the operators that they are in a file
    "convolutions": ("Conv", "ConvTranspose"),
    "linear layers": ("Gemm", "MatMul"),
    "additions": ("Add", "Sum"),
    "average pools": ("AveragePool", "GlobalAveragePool", "ReduceMean"),
    "concatenations": ("Concat",),
}
INTEGER_OPERATORS = (  # a FusedConv is none: a convolution in float, with what follows it
    "QLinearConv", "QLinearConvTranspose", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearAdd", "QLinearAveragePool", "QLinearGlobalAveragePool",
    "QLinearReduceMean", "QLinearConcat",
)  # fmt: skip
_MARKS = re.compile(r"^fused |(_token_\d+)+$|_nchwc$")  # what optimization adds to a node's name
LAYERS = ("convolutions", "linear layers")
_FLOAT = 1  # onnx.TensorProto.FLOAT
_ROUNDS = (5, 200)


class Missing(GdfqError):  # noqa: N818 - it is what the message says
    """A package that only files need is not installed."""


def imported(package: str) -> ModuleType:
    """`onnx` or `onnxruntime`.

    Raises:
        Missing: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        what = "not installed" if error.name == package else f"installed, but does not import ({error})"
        raise Missing(f"{package} is {what}: this needs `pip install gdfq[export]`") from error


def session(
    model: "ModelProto | str | Path",
    *,
    optimized: str | Path | None = None,
    x64quantprecision: bool = True,
    threads: int | None = None,
) -> "InferenceSession":
    """Open a model on the CPU.

    Args:
        model: it, or the file that it is in.
        optimized: a path, where the graph is written as onnxruntime runs it.
        x64quantprecision: whether sums of products are right on x64 without VNNI, too, where pairs of products of 8
            bits otherwise saturate in 16 bits. It changes nothing elsewhere.
        threads: of one operator; default: onnxruntime's own choice.

    Raises:
        GdfqError: onnxruntime is not installed; the file is missing, no ONNX file, of an opset or an IR version that
            this onnxruntime does not take, or refused for another reason, which is given.
    """
    runtime = imported("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone: an optimized graph that is written is warned of
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if x64quantprecision:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if isinstance(model, str | Path):
        if not Path(model).is_file():
            raise GdfqError(f"no such file: {model}")
        name, content = str(model), str(model)
    else:
        name, content = "the model", model.SerializeToString()
    try:
        return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no common type
        raise GdfqError(_refusal(name, error, runtime.__version__)) from error


def _refusal(name: str, error: Exception, version: str) -> str:
    text = " ".join(str(error).split())
    if any(words in text for words in ("INVALID_PROTOBUF", "does not have a graph", "No graph was found")):
        return f"{name} is no ONNX file, or only a part of one: copy or export it again"
    opset = re.search(r"Opset (\d+) is under development.*domain (\S+) is till opset (\d+)", text)
    if opset:
        given, domain, known = opset.groups()
        advice = f"onnxruntime {version} knows those up to {known}: take a newer one, or an older opset"
        return f"{name} has opset {given} of {domain}, but {advice}"
    ir = re.search(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)", text)
    if ir:
        advice = f"onnxruntime {version} reads those up to {ir[2]}: take a newer one"
        return f"{name} is of ONNX's IR version {ir[1]}, but {advice}"
    return f"onnxruntime {version} refuses {name}: {text.removeprefix('[ONNXRuntimeError] : ')}"


def run(
    session: "InferenceSession", feed: dict[str, np.ndarray], names: Sequence[str] | None = None
) -> list[np.ndarray]:
    """What the outputs `names` (default: all) are for the inputs `feed`.

    Raises:
        GdfqError: onnxruntime refuses these inputs, with its reason.
    """
    try:
        return session.run(names, feed)
    except Exception as error:
        text = " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ")
        raise GdfqError(f"onnxruntime does not run the model: {text}") from error


@dataclass(frozen=True)
class Place:
    """The places of one kind in a model.

    Attributes:
        integer: how many run in integers.
        total: how many there are.
        floats: the names of the others.
    """

    integer: int
    total: int
    floats: tuple[str, ...]


@dataclass(frozen=True)
class Operators:
    """What onnxruntime makes of a model.

    Attributes:
        counts: operators of the optimized graph, by type, the most frequent first.
        places: by kind, the keys of `KINDS`, those that the model has.
    """

    counts: dict[str, int]
    places: dict[str, Place]

    @property
    def layers(self) -> Place:
        """Convolutions and linear layers together."""
        found = [self.places[kind] for kind in LAYERS if kind in self.places]
        floats = tuple(name for place in found for name in place.floats)
        return Place(sum(place.integer for place in found), sum(place.total for place in found), floats)

    @property
    def integers(self) -> dict[str, int]:
        """Of `counts`, what runs in integers."""
        return {name: count for name, count in self.counts.items() if name in INTEGER_OPERATORS}


def operators(model: "ModelProto | str | Path", layers: Collection[str] | None = None) -> Operators:
    """Optimize a model as onnxruntime does to run it, and see what became of its places.

    Args:
        model: it, or the file that it is in.
        layers: nodes that are convolutions and linear layers; None: all of such operators.

    Nodes are told by their names, which onnxruntime keeps: no two of `model` may have the same.

    Raises:
        GdfqError: as `session`.
    """
    onnx = imported("onnx")
    model = _named(onnx.load(model) if isinstance(model, str | Path) else model)
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(model, optimized=optimized)
        found = onnx.load(optimized).graph.node
    integer = {_MARKS.sub("", node.name) for node in found if node.op_type in INTEGER_OPERATORS}
    names: dict[str, list[str]] = {}
    values = values_of(model)
    for node in model.graph.node:
        kind = next((kind for kind, of_kind in KINDS.items() if node.op_type in of_kind), None)
        is_other = layers is not None and kind in LAYERS and node.name not in layers
        if kind and not is_other and _is_place(node, values):
            names.setdefault(kind, []).append(node.name)
    places = {}
    for kind in KINDS:
        if kind in names:
            floats = tuple(name for name in names[kind] if name not in integer)
            places[kind] = Place(len(names[kind]) - len(floats), len(names[kind]), floats)
    return Operators(dict(Counter(node.op_type for node in found).most_common()), places)


def _named(model: "ModelProto") -> "ModelProto":
    """A copy in which nodes without a name have that of their first output, or one like it where that is taken."""
    result = type(model)()
    result.CopyFrom(model)
    taken = {node.name for node in result.graph.node}
    for node in result.graph.node:
        if not node.name:
            node.name = node.output[0]
            while node.name in taken:
                node.name += "'"
            taken.add(node.name)
    return result


def values_of(model: "ModelProto") -> dict[str, "ValueInfoProto"]:
    """Types and shapes of a model's inputs, outputs and computed tensors, by name."""
    graph = imported("onnx").shape_inference.infer_shapes(model).graph
    return {value.name: value for value in [*graph.input, *graph.value_info, *graph.output]}


def _is_place(node: "NodeProto", values: "dict[str, ValueInfoProto]") -> bool:
    """Whether a node computes with numbers, not shapes; of additions, that of two computed tensors."""
    numbers = [name for name in node.input if name in values and values[name].type.tensor_type.elem_type == _FLOAT]
    return len(numbers) >= (2 if node.op_type in KINDS["additions"] else 1)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median, and the first and third quartile as its spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


def interleaved_time(calls: Sequence[Callable[[], Any]], seconds: float = 3.0) -> list[Timing]:
    """How long each of `calls` takes, one after the other in every round, so that all see the same machine.

    Args:
        calls: what is timed; each is called three times before.
        seconds: about how long all of it may take; 5 to 200 rounds.
    """
    for call in calls:
        for _ in range(3):
            call()
    taken: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    least, most = _ROUNDS
    for number in range(most):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for call, times in zip(calls, taken, strict=True):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return [Timing(q[1], q[0], q[2]) for q in (statistics.quantiles(times, n=4) for times in taken)]
