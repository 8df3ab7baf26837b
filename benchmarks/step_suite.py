"""The step benchmark over networks and batches: the paper's, with random weights from pytorchcv.

    python -m benchmarks.step_suite --out DIR
    python -m benchmarks.step_suite --out DIR --resume                                      # goes on where it stopped
    python -m benchmarks.step_suite --out DIR --image-size 96 --batch 2 --iterations 3      # small enough for a CPU

A cell is a network and a batch. Its result, DIR/CELL.json, is what `benchmarks.step` writes; suite.json, suite.txt and
suite.png are made of all of them. Exit code 1 if a cell, or a provider in it, failed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import step, step_table
from benchmarks.ops.output import save_measured
from benchmarks.step_providers import Task, new_task
from gdfq.errors import GdfqError
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text
from gdfq.run.pictures import new_figure

IMAGENET = (16, 64)


@dataclass(frozen=True)
class Network:
    """A model of pytorchcv with its preset, and the batches that it is measured at."""

    model: str
    preset: str
    batches: tuple[int, ...]


NETWORKS = {
    "resnet18": Network("pytorchcv:resnet18", "imagenet", IMAGENET),
    "resnet20": Network("pytorchcv:resnet20_cifar10", "cifar", (200,)),
    "resnet50": Network("pytorchcv:resnet50", "imagenet", IMAGENET),
    "mobilenetv2": Network("pytorchcv:mobilenetv2_w1", "imagenet", IMAGENET),
    "bn_vgg16": Network("pytorchcv:bn_vgg16", "imagenet", IMAGENET),
    "inceptionv3": Network("pytorchcv:inceptionv3", "imagenet", IMAGENET),
}


def cells(args: argparse.Namespace) -> Iterator[tuple[str, Task]]:
    """Names and tasks, the most important first: every network at its first batch, then at the next."""
    networks = {name: NETWORKS[name] for name in args.networks}
    batches = {name: network.batches if args.batch is None else (args.batch,) for name, network in networks.items()}
    for place in range(max(map(len, batches.values()))):
        for name, network in networks.items():
            if place < len(batches[name]):
                batch = batches[name][place]
                yield (
                    f"{name}-batch{batch}",
                    new_task(
                        network.model, args.image_size, preset=network.preset, bits=args.bits, batch=batch,
                        precision=args.precision,
                    ),
                )  # fmt: skip


class Suite:
    """The cells' results as they come, written to a folder after every round of a cell.

    Attributes:
        cells: results of `step.measure` by the cell's name.
        failed, left_out: why there is none.
    """

    def __init__(self, plan: step.Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.facts = provenance(plan.threads)
        self.cells: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def keep(self, name: str, task: Task) -> bool:
        """Take a cell from its file, if that is there, whole, and of these arguments and this commit."""
        try:
            result = json.loads(self._path(name).read_text())
            wanted = {"arguments": step.arguments_of(task, self.plan), "gdfq_commit": self.facts["gdfq_commit"]}
            wanted |= {"finished": True, "failed": {}}
            if {name: result[name] for name in wanted} != wanted:
                return False
        except (OSError, ValueError, KeyError):
            return False
        self.cells[name] = result
        return True

    def measure(self, name: str, task: Task) -> None:
        self._path(name).unlink(missing_ok=True)  # should this one fail, an older one is not its result

        def write_result(result: dict[str, Any]) -> None:
            self.cells[name] = result
            write_text(self._path(name), json.dumps(result, indent=2) + "\n")
            self.write()

        try:
            result = step.measure(task, self.plan, write_result)
        except (RuntimeError, GdfqError) as error:
            self.failed[name] = str(error)
            self.write()
        else:
            write_result(result)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def write(self) -> None:
        result = {**self.facts, "cells": self.cells, "failed": self.failed, "left_out": self.left_out}
        write_text(self.folder / "suite.json", json.dumps(result, indent=2) + "\n")
        write_text(self.folder / "suite.txt", self.table() + "\n")

    def table(self) -> str:
        lines = [describe(self.facts)]
        for name, result in self.cells.items():
            lines += ["", f"{name}: {step_table.heading(result)}", *step_table.rows(result)]
        lines.append("")
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += [f"failed: {name}: {reason}" for name, reason in self.failed.items()]
        return "\n".join(lines).rstrip()

    def draw(self) -> None:
        """`suite.png`: of every cell with `ours`, the providers' times divided by ours, and the floor. Other floors
        (`floor@bfloat16`) are in the table only.

        Raises:
            GdfqError: there is no matplotlib.
        """
        drawn = {name: result for name, result in self.cells.items() if result["ratio_to_ours"]}
        if not drawn:
            return
        measured = set().union(*(result["ratio_to_ours"] for result in drawn.values()))
        providers = [name for name in self.plan.providers if name in measured]
        bars = [name for name in providers if name.partition("@")[0] != "floor"]
        width = 0.8 / len(bars)
        figure = new_figure(figsize=(max(8, (0.4 + 0.3 * len(bars)) * len(drawn)), 4.5))
        axes = figure.subplots()
        for number, provider in enumerate(bars):
            heights = {
                place + (number - (len(bars) - 1) / 2) * width: result["ratio_to_ours"][provider]
                for place, result in enumerate(drawn.values())
                if provider in result["ratio_to_ours"]
            }
            drawn_bars = axes.bar(list(heights), list(heights.values()), width, label=provider, color=f"C{number}")
            axes.bar_label(drawn_bars, [f"{height:.2f}" for height in heights.values()], fontsize=6, padding=1)
        floors = {
            place: result["ratio_to_ours"]["floor"]
            for place, result in enumerate(drawn.values())
            if "floor" in result["ratio_to_ours"]
        }
        if floors:
            starts, ends = [place - 0.45 for place in floors], [place + 0.45 for place in floors]
            axes.hlines(list(floors.values()), starts, ends, colors="black", linewidth=1.5, label="floor", zorder=3)
        labels = [
            f"{name.replace('-', chr(10))}\nours {result['providers']['ours']['ms']['median']:.3g} ms"
            for name, result in drawn.items()
        ]
        axes.set_xticks(range(len(drawn)), labels, fontsize=7)
        axes.set_ylabel("time / time of ours")
        axes.legend(fontsize=7, ncols=min(7, len(providers)), loc="upper center", bbox_to_anchor=(0.5, -0.16))
        save_measured(figure, self.folder / "suite.png", "Time of one iteration, divided by that of ours", self.facts)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_suite", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="in this order (default: all)"
    )
    parser.add_argument("--image-size", type=int, help="of all networks (default: their own)")
    parser.add_argument("--batch", type=int, help="of all networks (default: 200 for resnet20, else 16 and then 64)")
    parser.add_argument("--resume", action="store_true", help="keep what was measured with these arguments and commit")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell later (default: no limit)")
    # In eight bits, all is computed that four need, and a value tipped over a rounding boundary counts a 16th: deep
    # networks with random weights amplify that beyond what the agreement of the providers allows.
    step.add_plan_arguments(parser, bits=8)
    args = parser.parse_args(arguments)
    step.check_counts(parser, args)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    suite = Suite(step.plan_from(args), args.out)
    end = time.monotonic() + 60 * args.minutes
    for name, task in cells(args):
        if args.resume and suite.keep(name, task):
            continue
        if time.monotonic() > end:
            suite.left_out[name] = f"the {args.minutes:g} minutes were up"
            continue
        suite.measure(name, task)
        print(f"{name}: {suite.failed.get(name, 'measured')}", file=sys.stderr, flush=True)
    suite.write()
    print(suite.table())
    try:
        suite.draw()
    except GdfqError as error:  # the figures are there
        print(error, file=sys.stderr)
    return 1 if suite.failed or any(result["failed"] for result in suite.cells.values()) else 0


if __name__ == "__main__":
    step.end_on_sigterm()
    sys.exit(main())
