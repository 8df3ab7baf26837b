"""What was quantized and what stayed float, and why; and the size."""

import math
from collections.abc import Container
from dataclasses import asdict, dataclass, field
from operator import attrgetter

from torch import fx

from gdfq.graph.capture import CapturedModel
from gdfq.graph.nodes import WEIGHTED, name_of, some


@dataclass(frozen=True)
class WeightEntry:
    """A layer whose weight is quantized; `parameter` is the weight's name, empty where the graph computes it."""

    name: str
    op: str
    bits: int
    parameter: str


@dataclass(frozen=True)
class ActivationEntry:
    """An activation that is quantized; `fused` names what the quantizer is one pass with."""

    name: str
    bits: int
    fused: str


@dataclass(frozen=True)
class FloatEntry:
    """Something that stayed float, and why."""

    name: str
    op: str
    reason: str


def by_reason(entries: list[FloatEntry]) -> list[str]:
    """A line for each reason: how often, and where."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(f"{entry.op}: {entry.reason}", []).append(entry.name)
    return [f"{len(where)} x {reason} ({some(where)})" for reason, where in names.items()]


@dataclass
class Summary:
    """What was quantized and what stayed float, and why. `str()` is for people, `to_dict()` for machines.

    Attributes:
        overruled: layers that were to read float and do not, since another layer reads the same activation in bits.
    """

    weights: list[WeightEntry] = field(default_factory=list)
    activations: list[ActivationEntry] = field(default_factory=list)
    stayed_float: list[FloatEntry] = field(default_factory=list)
    overruled: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"weights      {len(self.weights)} layers at {_bits(self.weights)} bits, per output channel"]
        fused = sum(entry.fused != "" for entry in self.activations)
        lines.append(
            f"activations  {len(self.activations)} at {_bits(self.activations)} bits, per tensor"
            + (f" ({fused} in one pass with their BatchNorm)" if fused else "")
        )
        lines += [f"stayed float {text}" for text in by_reason(self.stayed_float)]
        if self.overruled:
            count, names = len(self.overruled), some(self.overruled)
            lines.append(f"quantized    {count} x input set to float: another layer reads it in bits ({names})")
        return "\n".join(lines)


def _bits(entries: list[WeightEntry] | list[ActivationEntry]) -> str:
    return "/".join(str(bits) for bits in sorted({entry.bits for entry in entries})) or "-"


def size_in_bytes(captured: CapturedModel, summary: Summary) -> tuple[int, int]:
    """Bytes in float32, and with the quantized weights packed at their bits (ranges not counted): of all parameters and
    of buffers that are weights of layers. A weight that the graph computes is stored as computed, and what it alone is
    computed from is not.
    """
    graph, module = captured.module.graph, captured.module
    bits_of = {entry.name: entry.bits for entry in summary.weights}
    layers = {node: name_of(node) for node in graph.nodes if node.target in WEIGHTED and name_of(node) in bits_of}
    stored = {name: value.numel() for name, value in module.named_parameters()}
    packed: dict[str, int] = {}  # bits of each weight
    readers: dict[str, list[bool]] = {}  # of what is stored: whether each is a quantized layer that takes it as weight
    for layer, name in layers.items():
        weight = layer.args[1]
        if weight.op == "get_attr":
            stored.setdefault(weight.target, attrgetter(weight.target)(module).numel())
            packed[weight.target] = bits_of[name] * stored[weight.target]
        else:
            packed[_expression(weight)] = bits_of[name] * math.prod(map(int, weight.meta["val"].shape))
    for node in graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(node.target, []).append(_is_weight_alone(node, layers))
    floats = sum(count for name, count in stored.items() if not (name in readers and all(readers[name])))
    return 4 * sum(stored.values()), math.ceil((sum(packed.values()) + 32 * floats) / 8)


def _expression(node: fx.Node) -> str:
    """The same for the same computation on the same parameters, as at two calls of a module."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _expression)
    return str(node.target) if node.op == "get_attr" else f"{node.target}({args}, {kwargs})"


def _is_weight_alone(node: fx.Node, layers: Container[fx.Node]) -> bool:
    """Whether nothing reads the value but quantized layers, as their weight, or what is computed to be one."""
    return bool(node.users) and all(
        node not in (user.args[0], *user.args[2:])
        if user in layers
        else user.op == "call_function" and user.target not in WEIGHTED and not user.meta["of_image"]
        and _is_weight_alone(user, layers)
        for user in node.users
    )  # fmt: skip
