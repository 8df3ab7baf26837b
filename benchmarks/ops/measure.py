"""Which cases a run has, and measuring them: in every round each provider has one turn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import gdfq_ext
from benchmarks.ops import peers
from benchmarks.ops.case import DTYPES, LAYOUTS, Case, Problem
from benchmarks.ops.operations import OPERATIONS, PROVIDERS, disagreement
from benchmarks.ops.peers import first_line
from benchmarks.ops.shapes import LAYERS, Shape, default_shapes
from benchmarks.ops.timing import Clock, clock_for, warm_up
from gdfq.errors import GdfqError
from gdfq.provenance import provenance

CACHES = ("cold", "warm")
# How fast the memory is: a copy of the largest operand, timed in the same rounds.
COPY = "copy"
# A case whose rounds take longer than this in all has fewer of them.
LONGEST_SECONDS, FEWEST_ROUNDS = 3.0, 5


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    device: str
    operations: tuple[str, ...]
    providers: tuple[str, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rounds: int
    minutes: float | None
    """No case is begun later than this."""


@dataclass(frozen=True)
class Item:
    """One case of a plan, in names."""

    operation: str
    shape: Shape
    dtype: str
    layout: str


def plan(
    *, device: str = "auto", operations: Sequence[str] = (), providers: Sequence[str] = (), dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (), layers: Sequence[str] = (), megabytes: Sequence[float] = (), rounds: int | None = None,
    minutes: float | None = None, full: bool = False,
) -> Plan:  # fmt: skip
    """A plan from what the user asks for; nothing asked for means the usual choice for the device.

    Raises:
        GdfqError: a name is not known, a number is out of range, or there is no such device.
    """
    for kind, given, known in (
        ("op", operations, OPERATIONS), ("provider", providers, PROVIDERS), ("dtype", dtypes, DTYPES),
        ("layout", layouts, LAYOUTS), ("layer", layers, LAYERS),
    ):  # fmt: skip
        for name in given:
            if name not in known:
                raise GdfqError(f"--{kind} {name} is not known; allowed are {', '.join(known)}")
    for name, number in [("rounds", rounds), ("minutes", minutes), *(("mb", size) for size in megabytes)]:
        if number is not None and not number > 0:
            raise GdfqError(f"--{name} is {number}; allowed is a number above 0")
    device = checked_device(device)
    on_gpu = device != "cpu"
    everything = on_gpu or full
    shapes = default_shapes(on_gpu, full)
    if layers or megabytes:
        shapes = [
            Shape(layer, size)
            for size in megabytes or dict.fromkeys(shape.megabytes for shape in shapes)
            for layer in layers or dict.fromkeys(shape.layer for shape in shapes)
        ]
    return Plan(
        device,
        tuple(operations or OPERATIONS),
        tuple(name for name in PROVIDERS if name in (providers or PROVIDERS)),
        tuple(dtypes or (DTYPES if everything else ["fp32"])),
        tuple(layouts or (LAYOUTS if everything else ["nchw"])),
        tuple(shapes),
        rounds or (30 if on_gpu else 15),
        minutes,
    )


def checked_device(name: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as `cpu` or `cuda:N`, a device that is there."""
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise GdfqError(f"--device {name} is not known; allowed are auto, cpu, cuda and cuda:N")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        found = torch.cuda.device_count() or "none"
        raise GdfqError(f"--device {name} is not there: PyTorch finds {found} of this kind; use --device cpu")
    return name if kind == "cpu" else f"cuda:{index or 0}"


def items(what: Plan) -> list[Item]:
    """The cases in order, all types of a shape one after the other. What does not depend on a property of the input is
    measured once."""
    result: dict[tuple, Item] = {}
    for layout in what.layouts:
        for shape in what.shapes:
            for dtype in what.dtypes:
                for name in what.operations:
                    operation = OPERATIONS[name]
                    item = Item(name, shape, dtype if operation.low_precision else "fp32", layout)
                    key = (name, operation.fixed or shape, item.dtype, layout if operation.layouts else None)
                    if name == "fake_quantize_weight":
                        key = (name, LAYERS[shape.layer][0], item.dtype)
                    result.setdefault(key, item)
    return list(result.values())


class Run:
    """The measurements of a plan so far."""

    def __init__(self, what: Plan) -> None:
        self.plan = what
        if what.device != "cpu":
            torch.cuda.set_device(what.device)
        self.facts = provenance(torch.get_num_threads())
        if what.device == "cpu":
            self.facts["machine"]["device"] = "cpu"
        self.rows: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        """What has no figure -> why."""
        self.notes: dict[str, str] = {}
        """Operation and provider -> what that provider computes otherwise."""
        self.failed: list[str] = []
        """Cases that ended in an error; the others are measured all the same."""
        self.libraries = []
        for library in [name for name in what.providers if name in peers.LIBRARIES]:
            reason = peers.why_missing(library)
            if reason is None:
                self.libraries.append(library)
            else:
                self.left_out[library] = reason

    def measure(self) -> Iterator[Item]:
        """Measures case after case; gives each after its rows are there."""
        start, clock = time.monotonic(), clock_for(self.plan.device)
        wanted = items(self.plan)
        for index, item in enumerate(wanted):
            if self.plan.minutes is not None and time.monotonic() - start > 60 * self.plan.minutes:
                self.left_out["the rest"] = f"{len(wanted) - index} of {len(wanted)} cases: the time was up"
                return
            try:
                self._measure(item, clock)
            except Exception as error:
                where = f"{item.operation}, {item.shape.layer} {item.shape.megabytes:g} MB, {item.dtype}, {item.layout}"
                self.failed.append(f"{where}: {first_line(error)}")
            yield item

    def _measure(self, item: Item, clock: Clock) -> None:
        dtype, operation = DTYPES[item.dtype], OPERATIONS[item.operation]
        problem = Problem(
            item.shape.of(dtype.itemsize), dtype, LAYOUTS[item.layout], self.plan.device, tuple(self.libraries)
        )
        case = operation.build(problem)
        providers = [name for name in self.plan.providers if name in case.providers]
        for name in list(providers):
            reason = self._unfit(case, name, operation.directions, dtype)
            if reason is not None:
                self.left_out.setdefault(f"{name} of {item.operation}, {item.dtype}", reason)
                providers.remove(name)
            elif name in case.other_gradient:
                self.notes[f"{name} of {item.operation}"] = case.other_gradient[name]
        source = torch.ones(case.operand_bytes, dtype=torch.uint8, device=self.plan.device)
        target = torch.empty_like(source)
        for direction in operation.directions:
            calls = {name: case.run(name, direction) for name in providers}
            calls[COPY] = lambda: target.copy_(source)
            seconds = turns(calls, clock, self.plan.rounds)
            self.rows += self._rows(item, case, direction, seconds)

    def _unfit(self, case: Case, provider: str, directions: Sequence[str], dtype: torch.dtype) -> str | None:
        """Why the provider cannot be measured here, or None."""
        if provider == "ours":
            return None
        try:
            reasons = [disagreement(case, provider, name, dtype) for name in directions if name != "backward"]
            return next(filter(None, reasons), None)
        except Exception as error:  # a type, layout or device that a library does not know
            return first_line(error)

    def _rows(
        self, item: Item, case: Case, direction: str, seconds: dict[tuple[str, str], list[float]]
    ) -> Iterator[dict[str, Any]]:
        moved, operation = case.bytes_of(direction), OPERATIONS[item.operation]
        shape = item.shape.of(DTYPES[item.dtype].itemsize)
        for cache in CACHES:
            medians = {name: median(times) for (name, where), times in seconds.items() if where == cache}
            copy_bandwidth = 2 * case.operand_bytes / medians.pop(COPY)
            for name, middle in medians.items():
                times = seconds[name, cache]
                rivals = {other: medians[other] for other in medians if other != name}
                best = min(rivals, key=rivals.get, default=None)
                yield {
                    "op": item.operation,
                    "on": operation.fixed or f"{item.shape.layer} {item.shape.megabytes:g} MB",
                    "shape": None if operation.fixed else "x".join(map(str, shape)),
                    "megabytes": case.operand_bytes / 1e6,
                    "dtype": item.dtype,
                    "layout": item.layout if operation.layouts else None,
                    "direction": direction,
                    "cache": cache,
                    "provider": name,
                    "rounds": len(times),
                    "median_us": middle * 1e6,
                    "p20_us": quantile(times, 0.2) * 1e6,
                    "p80_us": quantile(times, 0.8) * 1e6,
                    "bytes": moved,
                    "gb_per_s": moved / middle / 1e9,
                    "copy_gb_per_s": copy_bandwidth / 1e9,
                    "share_of_copy": moved / middle / copy_bandwidth if moved else None,
                    "best_peer": best,
                    "best_peer_over_this": ratio(seconds[best, cache], times) if best else None,
                    "over_ours": ratio(times, seconds["ours", cache]) if "ours" in medians else None,
                }

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            **self.facts,
            "backend": gdfq_ext.backend_report().cause,
            "plan": asdict(self.plan),
            "left_out": self.left_out,
            "failed": self.failed,
            "notes": self.notes,
            "rows": self.rows,
        }


def turns(calls: dict[str, Any], clock: Clock, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of one call by (provider, cache), a value per round, in each of which every provider has a turn."""
    subjects = {name: warm_up(clock, call) for name, call in calls.items()}
    seconds: dict[tuple[str, str], list[float]] = {(name, cache): [] for cache in CACHES for name in calls}
    start = time.monotonic()
    for index in range(rounds):
        if index >= FEWEST_ROUNDS and time.monotonic() - start > LONGEST_SECONDS:
            break
        pending = {
            (name, cache): clock.turn(subject, cold=cache == "cold")
            for cache in CACHES
            for name, subject in subjects.items()
        }
        clock.finish()
        for key, value in pending.items():
            seconds[key].append(value())
    return seconds


def quantile(values: Sequence[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median over the rounds of one time divided by another of the same round: a machine that slows down slows both."""
    return median([value / other for value, other in zip(values, others, strict=True)])
