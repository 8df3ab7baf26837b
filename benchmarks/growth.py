"""How the cost of one iteration of `ours`, time and peak memory, grows with what is trained.

    python -m benchmarks.growth --out DIR

From one starting point (a ResNet-20 on 32 x 32 images) one thing grows at a time: the batch, the image, the depth, the
number of classes. Every point is a process of its own. DIR/growth.json has the figures, growth.png four panels.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pytorchcv.models.resnet_cifar import CIFARResNet
from torch import nn

from benchmarks import step
from benchmarks.ops.output import save_measured
from benchmarks.step_providers import Task
from gdfq.errors import GdfqError
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text
from gdfq.run.pictures import new_figure

DEPTHS = (20, 56, 110)
CLASSES = (10, 100, 1000, 10000)


def resnet(depth: int, num_classes: int, image_size: int) -> nn.Module:
    """pytorchcv's ResNet for CIFAR: `depth` is 6n + 2 layers, for any number of classes (its names allow 10 or 100)."""
    if depth < 8 or depth % 6 != 2:
        raise GdfqError(f"depth is {depth}; allowed are 8, 14, 20, 26 and so on, 6n + 2")
    channels = [[width] * (depth // 6) for width in (16, 32, 64)]
    return CIFARResNet(channels, 16, False, num_classes=num_classes, in_size=(image_size, image_size))


def tasks(batch: int, image_size: int, depths: tuple[int, ...], classes: tuple[int, ...]) -> dict[str, dict[int, Task]]:
    """By axis and value; the point where all axes meet is in each of them.

    Args:
        batch, image_size: of the starting point; their axes hold half and twice that, too, and four times the batch.
        depths, classes: the values of these axes, the starting point first.
    """
    start = {"depth": depths[0], "num_classes": classes[0], "image_size": image_size}

    def task(batch: int = batch, **changes: int) -> Task:
        arguments = start | changes
        return Task("benchmarks.growth:resnet", arguments["image_size"], tuple(arguments.items()), batch=batch)

    return {
        "batch": {value: task(batch=value) for value in (batch // 2, batch, 2 * batch, 4 * batch)},
        "image size": {value: task(image_size=value) for value in (image_size // 2, image_size, 2 * image_size)},
        "depth": {value: task(depth=value) for value in depths},
        "classes": {value: task(num_classes=value) for value in classes},
    }


def measure(axes: dict[str, dict[int, Task]], plan: step.Plan) -> dict[str, Any]:
    """What `step.measure` says of `ours` at every point, as JSON values. A point on several axes is measured once.

    Raises:
        RuntimeError: a point cannot be measured.
    """
    facts = provenance(plan.threads)
    done: dict[Task, dict[str, Any]] = {}
    for axis, points in axes.items():
        for value, task in points.items():
            if task not in done:
                print(f"{axis} {value}", file=sys.stderr, flush=True)
                done[task] = step.measure(task, plan)
    return {
        **facts,
        "axes": {
            axis: [
                {"value": value, "arguments": done[task]["arguments"], **done[task]["providers"]["ours"]}
                for value, task in points.items()
            ]
            for axis, points in axes.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    lines = [describe(result)]
    for axis, points in result["axes"].items():
        lines += ["", f"{axis:10} {'median ms':>10} {'p20':>9} {'p80':>9} {'images/s':>9} {'peak MB':>9}"]
        lines += [
            f"{point['value']:10} {point['ms']['median']:10.2f} {point['ms']['p20']:9.2f} {point['ms']['p80']:9.2f} "
            f"{point['images_per_second']:9.1f} {point['peak_memory_mb']:9.0f}"
            for point in points
        ]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels: time with p20 to p80 on the left, peak memory on the right, both from zero.

    Raises:
        GdfqError: there is no matplotlib.
    """
    figure = new_figure(figsize=(10, 7))
    for axes, (axis, points) in zip(figure.subplots(2, 2).flat, result["axes"].items(), strict=True):
        values = [point["value"] for point in points]
        p20, median, p80 = ([point["ms"][name] for point in points] for name in ("p20", "median", "p80"))
        axes.fill_between(values, p20, p80, color="C0", alpha=0.2)
        axes.plot(values, median, "o-", color="C0")
        memory = axes.twinx()
        peaks = [point["peak_memory_mb"] for point in points]
        memory.plot(values, peaks, "s--", color="C1")
        if axis == "classes":
            axes.set_xscale("log")
        for side, label, color, heights in (
            (axes, "ms an iteration", "C0", p80), (memory, "peak memory, MB", "C1", peaks)
        ):  # fmt: skip
            side.set_ylim(0, 1.1 * max(heights))
            side.set_ylabel(label, color=color)
        axes.set_xlabel({"image size": "height and width of the image, pixels"}.get(axis, axis))
    save_measured(figure, path, "One iteration of training, ResNet: time and peak memory", result)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--batch", type=int, default=16, help="of the starting point (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=32, help="of the starting point (default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="default: 20 56 110")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="default: 10 100 1000 10000")
    parser.add_argument("--iterations", type=int, default=5, help="timed at every point (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    # Half the batch and half the image are points, too.
    for name, least in (("batch", 4), ("image_size", 16), ("iterations", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed is {least} or more")
    axes = tasks(args.batch, args.image_size, tuple(args.depths), tuple(args.classes))
    plan = step.Plan(
        ("ours",), args.iterations, repeat=1, warmup=2, threads=args.threads, tolerance=0.0, student_tolerance=0.0
    )
    try:
        result = measure(axes, plan)
        print(table(result))
        write_text(args.out / "growth.json", json.dumps(result, indent=2) + "\n")
        draw(result, args.out / "growth.png")
    except (RuntimeError, GdfqError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    step.end_on_sigterm()
    sys.exit(main())
