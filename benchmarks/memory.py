"""Does memory grow while GDFQ trains? Runs the trainer on a small network and looks at the process's size.

    python -m benchmarks.memory --iterations 1000

Exit code 1 if it grew by more than --limit-mb between iteration --from-iteration, when everything has been allocated
once, and the end.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.images.generator import generator
from gdfq.images.noise import gaussian_images
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text
from gdfq.train.trainer import Trainer

MB = 1e6


class SmallNet(nn.Module):
    """Three convolutions with BN and ReLU, a residual sum and a linear layer: 3 x 8 x 8 images."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = self.block(3, 16)
        self.inner = self.block(16, 16)
        self.last = self.block(16, 32)
        self.classifier = nn.Linear(32, num_classes)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x):
        x = self.stem(x)
        x = self.last(x + self.inner(x))
        return self.classifier(x.mean((2, 3)))


def new_trainer(iterations: int, batch: int) -> Trainer:
    """A trainer for `iterations` in all, in epochs of 10: one for ranges, one of warm-up, then alternate training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    captured = capture(SmallNet().eval(), image_size=8, device=device)
    schedule = {"epochs": -(-iterations // 10), "iterations": 10, "range_epochs": 1, "warmup_epochs": 2}
    schedule |= {"batch_size": batch, "range_batches": 4, "milestones": []}
    settings = {f"schedule.{name}": value for name, value in schedule.items()} | {"run.held_out_images": 32}
    config = Config.load("cifar", {"method": "gdfq"} | settings)
    student, _ = build_quantized(captured, config.quantizer)
    calibrate(student, gaussian_images(captured.image_shape, 2 * batch, batch, 0, device))
    teacher = build_teacher(captured)
    return Trainer(teacher, student, generator(teacher, captured, config, device), config)


def measure(
    trainer: Trainer,
    every: int,
    from_iteration: int,
    after_iteration: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train to the end and return the samples and the growth.

    Args:
        trainer: new.
        every: iterations between two samples.
        from_iteration: where growth is counted from; at least two samples must follow it.
        after_iteration: something else to do in the loop (a test plants a leak here).
    """
    samples: list[dict[str, float]] = []

    def look() -> None:
        after_iteration()
        if trainer.iteration % every:
            return
        trainer.read_metrics()
        gc.collect()  # what is unreachable is no leak
        samples.append({"iteration": trainer.iteration, **memory_mb()})

    trainer.run(look)
    counted = [sample for sample in samples if sample["iteration"] >= from_iteration]
    if len(counted) < 2:
        raise GdfqError(
            f"{trainer.iteration} iterations, sampled every {every}, leave {len(counted)} samples from iteration "
            f"{from_iteration} on and growth needs two; run more iterations"
        )
    first, last = counted[0], counted[-1]
    growth = {name: last[name] - first[name] for name in first if name != "iteration"}
    thousands = (last["iteration"] - first["iteration"]) / 1000
    return {
        "samples": samples,
        "from_iteration": first["iteration"],
        "to_iteration": last["iteration"],
        "growth_mb": growth,
        "growth_mb_per_1000_iterations": {name: value / thousands for name, value in growth.items()},
    }


def memory_mb() -> dict[str, float]:
    """Memory that the process holds, paged out or not, and, on a GPU, what torch has allocated there.

    Pages of files are left out: the kernel drops and reads them again as it likes.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {"process_mb": sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap")) * 1024 / MB}
    if torch.cuda.is_available():
        sizes["gpu_mb"] = torch.cuda.memory_allocated() / MB
    return sizes


def exceeded(growth: dict[str, float], limit_mb: float) -> list[str]:
    """In words, which memory grew by more than the limit."""
    return [
        f"{name.removesuffix('_mb')} grew by {value:.1f} MB, allowed are {limit_mb:g} MB"
        for name, value in growth.items()
        if value > limit_mb
    ]


def report(result: dict[str, Any]) -> str:
    names = list(result["growth_mb"])
    lines = [describe(result), "", "iteration " + " ".join(f"{name:>10}" for name in names)]
    lines += [
        f"{sample['iteration']:9} " + " ".join(f"{sample[name]:10.1f}" for name in names)
        for sample in result["samples"]
    ]
    for name in names:
        lines.append(
            f"{name.removesuffix('_mb')} grew by {result['growth_mb'][name]:.2f} MB between iterations "
            f"{result['from_iteration']} and {result['to_iteration']}: "
            f"{result['growth_mb_per_1000_iterations'][name]:.2f} MB per 1000 iterations"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=1000, help="rounded up to tens (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="iterations between two samples (default: %(default)s)")
    parser.add_argument("--from-iteration", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--limit-mb", type=float, default=8.0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(arguments)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts = {**provenance(torch.get_num_threads()), "arguments": values}
    try:
        growth = measure(new_trainer(args.iterations, args.batch), args.every, args.from_iteration)
    except GdfqError as error:
        parser.error(str(error))
    result = {**facts, **growth, "exceeded": exceeded(growth["growth_mb"], args.limit_mb)}
    print(report(result))
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    for problem in result["exceeded"]:
        print(problem, file=sys.stderr)
    return 1 if result["exceeded"] else 0


if __name__ == "__main__":
    sys.exit(main())
