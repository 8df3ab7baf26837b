"""A run for people (table, pictures) and for machines (JSON, CSV)."""

import csv
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.ops.case import DIRECTIONS
from benchmarks.ops.operations import PROVIDERS
from gdfq.provenance import describe
from gdfq.run.files import write_text
from gdfq.run.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUT = ("on", "dtype", "layout")
WIDTH = 200
EXPLANATION = (
    "Microseconds, median over the rounds, cold cache. For ours: p20 to p80, bandwidth, its share of a copy's; the\n"
    "time of the best peer divided by that of ours, on a cold and on a warm cache (more than 1: ours is faster)."
)


def table(result: dict[str, Any]) -> str:
    """A table for each input, with a line for each operation and direction: the providers' medians on a cold cache,
    then ours against the memory and the best peer."""
    text = io.StringIO()
    console = Console(file=text, width=WIDTH, color_system=None, highlight=False)
    console.print(EXPLANATION, soft_wrap=True)
    inputs: dict[tuple, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        inputs.setdefault(tuple(row[name] for name in INPUT), []).append(row)
    for names, rows in inputs.items():
        console.print("\n" + ", ".join(filter(None, names)))
        console.print(input_table(rows))
    notes = [f"{where}: {reason}" for where, reason in result["notes"].items()]
    notes += [f"left out: {what}: {reason}" for what, reason in result["left_out"].items()]
    notes += [f"failed: {failure}" for failure in result["failed"]]
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([*lines, *notes, f"ours: {result['backend']}", describe(result)])


def input_table(rows: list[dict[str, Any]]) -> Table:
    by_name = {(row["op"], row["direction"], row["cache"], row["provider"]): row for row in rows}
    providers = [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]
    lines = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("operation", "direction", *providers, "p20..p80", "GB/s", "of copy", "best peer", "/ ours", "warm"):
        words = name in ("operation", "direction", "best peer")
        lines.add_column(name, justify="left" if words else "right", no_wrap=True)
    previous = None
    for operation, direction in dict.fromkeys((row["op"], row["direction"]) for row in rows):
        cold = {name: by_name.get((operation, direction, "cold", name)) for name in providers}
        warm = by_name.get((operation, direction, "warm", "ours"))
        times = [microseconds(row["median_us"]) if row else "" for row in cold.values()]
        name = "" if operation == previous else operation
        lines.add_row(name, direction, *times, *summary(cold.get("ours"), warm))
        previous = operation
    return lines


def microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def summary(ours: dict[str, Any] | None, warm: dict[str, Any] | None) -> list[str]:
    if ours is None or warm is None:
        return [""] * 6
    share, best = ours["share_of_copy"], ours["best_peer"]
    return [
        f"{microseconds(ours['p20_us'])}..{microseconds(ours['p80_us'])}",
        f"{ours['gb_per_s']:.1f}" if ours["bytes"] else "",
        f"{share:.0%}" if share is not None else "",
        best or "",
        f"{ours['best_peer_over_this']:.2f}" if best else "",
        f"{warm['best_peer_over_this']:.2f}" if best else "",
    ]


OVERVIEW = (
    "Of ours: microseconds, median over the rounds, cold cache; share of a copy's bandwidth. Then the time of\n"
    "torch.compile and that of the best peer, divided by that of ours (more than 1: ours is faster)."
)


def overview(result: dict[str, Any]) -> str:
    """What the table says of ours in a quarter of its size: all directions of an operation are in one line."""
    cold = [row for row in result["rows"] if row["cache"] == "cold"]
    by_name = {(case_of(row), row["direction"], row["provider"]): row for row in cold}
    titles = [f"{name + ' us':>12}{'copy':>6}{'compile':>9}{'best':>6}" for name in DIRECTIONS]
    lines, previous = [OVERVIEW, "", f"{'':28}{''.join(titles)}"], None
    for case in dict.fromkeys(map(case_of, cold)):
        *names, operation = case
        if names != previous:
            lines.append(", ".join(filter(None, names)))
            previous = names
        cells = [
            overview_cells(*(by_name.get((case, direction, name)) for name in ("ours", "compile")))
            for direction in DIRECTIONS
        ]
        lines.append(f"  {operation:26}{''.join(cells)}".rstrip())
    lines += [f"left out: {what}: {reason}" for what, reason in result["left_out"].items()]
    lines += [f"failed: {failure}" for failure in result["failed"]]
    return "\n".join([*lines, f"ours: {result['backend']}", describe(result)])


def case_of(row: dict[str, Any]) -> tuple[str | None, ...]:
    return (*(row[name] for name in INPUT), row["op"])


def overview_cells(ours: dict[str, Any] | None, compiled: dict[str, Any] | None) -> str:
    if ours is None:
        return f"{'':33}"
    share, best = ours["share_of_copy"], ours["best_peer_over_this"]
    over_compile = compiled["over_ours"] if compiled else None
    return (
        f"{microseconds(ours['median_us']):>12}" + ("     -" if share is None else f"{share:6.0%}")
        + ("        -" if over_compile is None else f"{over_compile:9.2f}")
        + ("     -" if best is None else f"{best:6.2f}")
    )  # fmt: skip


def write(result: dict[str, Any], folder: Path) -> None:
    """`results.json` and `results.csv` in `folder`, both with what the figures were measured on, and `results.txt`, the
    `overview`."""
    write_text(folder / "results.json", json.dumps(result, indent=1) + "\n")
    facts = {
        "device": result["machine"]["device"], "driver": result["machine"]["driver"], "cpu": result["machine"]["cpu"],
        "threads": result["threads"], "torch": result["torch"], "commit": result["gdfq_commit"]["hash"],
        "dirty": result["gdfq_commit"]["dirty"],
    }  # fmt: skip
    text = io.StringIO()
    if result["rows"]:
        writer = csv.DictWriter(text, [*result["rows"][0], *facts], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | facts for row in result["rows"])
    write_text(folder / "results.csv", text.getvalue())
    write_text(folder / "results.txt", overview(result) + "\n")


def draw(result: dict[str, Any], folder: Path) -> None:
    """`speedup.png` and `bandwidth.png` in `folder`.

    Raises:
        GdfqError: there is no matplotlib.
    """
    cold = [row for row in result["rows"] if row["cache"] == "cold"]
    operations = list(dict.fromkeys(row["op"] for row in cold))
    providers = [name for name in PROVIDERS if any(row["provider"] == name for row in cold)]
    if not cold:
        return
    peers = [name for name in providers if name != "ours"]
    figure = new_figure(figsize=(11, 1.2 + 0.16 * len(operations) * (len(peers) + 1)))
    axes = figure.subplots()
    for index, peer in enumerate(peers):
        means = {op: geometric_mean(over_ours(cold, op, peer)) for op in operations}
        drawn = {place: mean for place, mean in enumerate(means.values()) if mean is not None}
        places = [place + (index - (len(peers) - 1) / 2) * 0.8 / len(peers) for place in drawn]
        widths = [mean - 1 for mean in drawn.values()]  # bars begin at 1, to the right where ours is faster
        bars = axes.barh(places, widths, 0.8 / len(peers), left=1, label=peer)
        axes.bar_label(bars, [f"{mean:.2g}" for mean in drawn.values()], fontsize=6, padding=2)
    axes.set(yticks=range(len(operations)), yticklabels=operations, xscale="log", xlabel="time / time of ours")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    if peers:
        axes.legend(fontsize=7)
    title = "Forward and backward, cold cache: geometric mean over layers, types and layouts"
    save_measured(figure, folder / "speedup.png", title, result)

    columns = min(4, len(operations))
    rows = math.ceil(len(operations) / columns)
    figure = new_figure(figsize=(3.2 * columns, 0.8 + 2.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, operation in zip(grid.flat, operations, strict=False):
        for number, name in enumerate(providers):
            points = sorted(
                (row["megabytes"], row["share_of_copy"])
                for row in cold
                if (row["op"], row["provider"], row["direction"]) == (operation, name, "forward")
            )
            axes.plot(*zip(*points, strict=True) if points else ([], []), ".", color=f"C{number}", label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(operation, fontsize=8)
        axes.set_xlabel("MB of the operand", fontsize=7)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(operations) :]:
        axes.axis("off")
    grid[0, 0].set_ylabel("share of a copy's bandwidth", fontsize=7)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="lower right", fontsize=7)
    title = "Forward, cold cache: bytes that must move per second, against a copy of the operand"
    save_measured(figure, folder / "bandwidth.png", title, result)


def save_measured(figure: "Figure", path: Path, title: str, facts: dict[str, Any]) -> None:
    """Write the figure as PNG, with its title and what it was measured on (see `gdfq.provenance`)."""
    subtitle = describe(facts).replace("\n", "; ")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def over_ours(rows: list[dict[str, Any]], operation: str, provider: str) -> list[float]:
    """The provider's time divided by ours of all cases, in the widest direction that the operation has."""
    found = {
        direction: [
            row["over_ours"]
            for row in rows
            if (row["op"], row["provider"], row["direction"]) == (operation, provider, direction)
            and row["over_ours"] is not None
        ]
        for direction in DIRECTIONS
    }
    return found["both"] or found["forward"]


def geometric_mean(values: list[float]) -> float | None:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None
