"""README's table of operations from the results.csv of several runs of `python -m benchmarks.ops`, cold cache, float32.

    python -m benchmarks.ops.runs results.csv run2.csv run3.csv

Time of others divided by ours, median over the runs (lowest to highest), forward and backward, or forward where there
is nothing else.
"""

import csv
import statistics
import sys
from pathlib import Path

from benchmarks.ops.operations import PROVIDERS


def ratios(paths: list[Path]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Operation -> direction -> provider -> a ratio for every run."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for path in paths:
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["cache"] == "cold" and row["dtype"] == "fp32" and row["provider"] != "ours" and row["over_ours"]:
                    of_direction = found.setdefault(row["op"], {}).setdefault(row["direction"], {})
                    of_direction.setdefault(row["provider"], []).append(float(row["over_ours"]))
    return found


def table(paths: list[Path]) -> str:
    """Markdown; what not every run has is left out."""
    others = [provider for provider in PROVIDERS if provider != "ours"]
    lines = ["| | " + " | ".join(others) + " |", "| --- " * (len(others) + 1) + "|"]
    for op, directions in ratios(paths).items():
        direction = "both" if "both" in directions else "forward"
        cells = [directions[direction].get(provider, []) for provider in others]
        if any(len(cell) == len(paths) for cell in cells):
            name = f"`{op}`" if direction == "both" else f"`{op}`, {direction}"
            lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


if __name__ == "__main__":
    print(table([Path(name) for name in sys.argv[1:]]))
