"""What was quantized and what stayed float, and why; and the size."""

import math
from dataclasses import asdict, dataclass, field

from gdfq.graph.capture import CapturedModel
from gdfq.graph.nodes import some


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
        by_reason: dict[str, list[str]] = {}
        for entry in self.stayed_float:
            by_reason.setdefault(f"{entry.op}: {entry.reason}", []).append(entry.name)
        lines += [f"stayed float {len(names)} x {reason} ({some(names)})" for reason, names in by_reason.items()]
        if self.overruled:
            count, names = len(self.overruled), some(self.overruled)
            lines.append(f"quantized    {count} x input set to float: another layer reads it in bits ({names})")
        return "\n".join(lines)


def _bits(entries: list[WeightEntry] | list[ActivationEntry]) -> str:
    return "/".join(str(bits) for bits in sorted({entry.bits for entry in entries})) or "-"


def size_in_bytes(captured: CapturedModel, summary: Summary) -> tuple[int, int]:
    """Bytes of the parameters in float32 and with the quantized weights packed at their bits (ranges not counted)."""
    parameters = {name: value.numel() for name, value in captured.module.named_parameters()}
    bits = {entry.parameter: entry.bits for entry in summary.weights}
    return 4 * sum(parameters.values()), math.ceil(sum(n * bits.get(name, 32) for name, n in parameters.items()) / 8)
