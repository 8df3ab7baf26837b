"""A table for people: our figures beside the paper's, and which of the paper's orderings hold."""

import itertools
import statistics
from typing import Any

from gdfq.reproduce.tables import Cell, Published

OFFLINE_NOTE = """Offline: in place of the paper's networks and images, the ResNet-20 and the Fashion-MNIST test
images that the package ships, with the preset `offline`. Only 10,000 real images are shipped: FT and calibration have
the first 5,000, top-1 is measured on the other 5,000. The paper's figures are those of its own networks, in the order
of its table.
"""
COLUMNS = (
    "cell", "data", "network", "row", "bits", "float", "top-1", "published", "gap", "published gap",
    "top-1 at the data-free choice", "seconds",
)  # fmt: skip


# --- facts, as JSON values ---------------------------------------------------------------------------------------


def facts(cell: Cell) -> dict[str, Any]:
    """What a cell is."""
    return {
        "network": cell.network.key, "title": cell.network.title, "data": cell.network.data,
        "row": cell.row, "method": cell.method, "bits": cell.bits,
    }  # fmt: skip


def published(figure: Published) -> dict[str, Any]:
    """A figure of the paper, `gap` is what the float network has more."""
    return {
        "network": figure.network.key, "top1": figure.top1, "spread": figure.spread, "float": figure.float_top1,
        "gap": round(figure.float_top1 - figure.top1, 2),
    }  # fmt: skip


def summary(records: list[dict]) -> dict[str, Any] | None:
    """Over the seeds of a cell: mean and standard deviation of top-1 (percent; None for one seed), the float network's
    top-1, the gap between them, means of the top-1 at the data-free choice (None without training) and of the seconds.
    None where there are no results.
    """
    if not records:
        return None
    top1 = [record["top1"]["quantized"] for record in records]
    chosen = [record["top1"]["choice"] for record in records if "choice" in record["top1"]]
    float_top1 = statistics.mean(record["top1"]["float"] for record in records)
    return {
        "top1": statistics.mean(top1),
        "spread": statistics.stdev(top1) if len(top1) > 1 else None,
        "float": float_top1,
        "gap": float_top1 - statistics.mean(top1),
        "choice": statistics.mean(chosen) if chosen else None,
        "seconds": statistics.mean(record["seconds"] for record in records),
    }


def orderings(cells: list[dict]) -> list[dict]:
    """For each two rows of one network and bit width, whether ours are in the paper's order.

    Pairs that the paper has in different orders (on networks that are one network here) are left out.

    Args:
        cells: entries of `gdfq.reproduce.grid.Grid.result`.

    Returns:
        `network`, `bits`, the row that is `higher` in the paper, the one that is `lower`, our means of both in `ours`,
        and `holds`: True or False where every seed of one row is above all of the other's, else None.
    """
    found = []
    for first, second in itertools.combinations([cell for cell in cells if cell["results"]], 2):
        order = _published_order(first, second)
        if order is None or (first["network"], first["bits"]) != (second["network"], second["bits"]):
            continue
        higher, lower = (first, second) if order else (second, first)
        above, below = ([result["top1"]["quantized"] for result in cell["results"]] for cell in (higher, lower))
        holds = True if min(above) > max(below) else False if max(above) < min(below) else None
        found.append(
            {
                "network": first["network"], "bits": first["bits"],
                "higher": higher["row"], "lower": lower["row"], "holds": holds,
                "ours": [statistics.mean(above), statistics.mean(below)],
            }
        )  # fmt: skip
    return found


def _published_order(first: dict, second: dict) -> bool | None:
    """Whether the paper has the first above the second; None if it does not say, or says both."""
    theirs = {figure["network"]: figure["top1"] for figure in second["published"]}
    signs = {
        figure["top1"] > theirs[figure["network"]]
        for figure in first["published"]
        if figure["network"] in theirs and figure["top1"] != theirs[figure["network"]]
    }
    return signs.pop() if len(signs) == 1 else None


def machine(provenance: dict) -> str:
    """What the figures of a `provenance()` were measured on, in a line."""
    device, commit = provenance["machine"], provenance["gdfq_commit"]
    hardware = device["cpu"] if device["device"] == "cpu" else f"{device['device']}, host {device['cpu']}"
    changed = " with uncommitted changes" if commit["dirty"] else ""
    return (
        f"{hardware}, {device['cores']} cores, {provenance['threads']} threads, torch {provenance['torch']}, "
        f"gdfq {(commit['hash'] or 'of unknown commit')[:12]}{changed}"
    )


# --- text --------------------------------------------------------------------------------------------------------


def describe(cell: Cell) -> str:
    """A cell in a few words."""
    return f"{cell.network.title} on {cell.network.data}, {cell.row}, {_bits(cell.bits)}"


def cells(numbers: list[int]) -> str:
    """`cells 1, 2, 5`."""
    return f"{'cell' if len(numbers) == 1 else 'cells'} {', '.join(map(str, numbers))}"


def listing(listed: dict) -> str:
    """`gdfq.reproduce.grid.Grid.listing` for people."""
    lines = [f"{listed['table']}: {listed['title']}"]
    for cell in listed["cells"]:
        seeds = f", finished: seeds {', '.join(map(str, cell['finished_seeds']))}" if cell["finished_seeds"] else ""
        lines.append(f"{cell['number']:4}  {cell['network']:22} {_bits(cell['bits'])}  {cell['row']}{seeds}")
    lines += [f"missing for {cells(numbers)}: {reason}" for reason, numbers in listed["lacking"].items()]
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The page for a table, from `gdfq.reproduce.grid.Grid.result`."""
    number = result["table"].removeprefix("table")
    parts = [f"# Table {number} of the paper: {result['title']}\n"]
    if result["offline"]:
        parts.append(OFFLINE_NOTE)
    parts.append(table(COLUMNS, [_row(cell) for cell in result["cells"]]))
    settings = "".join(f", {key} = {value}" for key, value in result["settings"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    parts.append(
        "Top-1 in percent, of the last epoch; gap: what the float network has more. "
        f"Seeds {seeds}{'; mean ± standard deviation' if len(result['seeds']) > 1 else ''}. "
        f"Scale {result['scale']:g}{settings}. Seconds: of the quantization, without measuring top-1.\n"
    )
    if result["missing"]:
        parts.append(f"Not all there yet: {cells(result['missing'])}.\n")
    parts += [f"Measured on {line}.\n" for line in result["machines"]]
    parts.append(_orderings(result["orderings"]))
    return "\n".join(parts)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(cell: dict) -> list[str]:
    found, paper = cell["summary"], cell["published"]
    ours = [""] * 5
    if found:
        choice = "" if found["choice"] is None else f"{found['choice']:.2f}"
        top1 = _with_spread(found["top1"], found["spread"])
        ours = [f"{found['float']:.2f}", top1, f"{found['gap']:.2f}", choice, f"{found['seconds']:.0f}"]
    float_top1, top1, gap, choice, seconds = ours
    return [
        str(cell["number"]), cell["data"], cell["title"], cell["row"], _bits(cell["bits"]), float_top1, top1,
        "; ".join(_with_spread(figure["top1"], figure["spread"]) for figure in paper), gap,
        "; ".join(f"{figure['gap']:.2f}" for figure in paper), choice, seconds,
    ]  # fmt: skip


def _with_spread(mean: float, spread: float | None) -> str:
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def _bits(bits: int) -> str:
    return f"W{bits}A{bits}"


def _orderings(found: list[dict]) -> str:
    if not found:
        return "No two rows to compare yet.\n"
    verdicts = {True: "in the paper's order", False: "in the opposite order", None: "undecided"}
    counts = ", ".join(f"{sum(pair['holds'] is holds for pair in found)} {words}" for holds, words in verdicts.items())
    lines = [f"Of {len(found)} pairs of rows of one network and bit width: {counts}.\n"]
    lines += [
        f"- {pair['network']}, {_bits(pair['bits'])}: {pair['higher']} above {pair['lower']} in the paper; here "
        f"{verdicts[pair['holds']]}, {pair['ours'][0]:.2f} and {pair['ours'][1]:.2f}\n"
        for pair in found
        if pair["holds"] is not True
    ]
    return "\n".join(lines[:1]) + ("\n" if lines[1:] else "") + "".join(lines[1:])
