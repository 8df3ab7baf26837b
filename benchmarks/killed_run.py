"""Does a run that is killed go on as if nothing had happened?

    python -m benchmarks.killed_run --runs FOLDER --out killed_run.json

A ResNet-18 with random weights is quantized at 224 pixels, twice from the same seed (`gdfq quantize`, as users start
it). One of the two runs is killed (SIGKILL) in the middle and resumed. Exit code 1 if what both end with differs.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy_in_time import last_entry
from benchmarks.step_providers import new_model, new_task
from gdfq.provenance import describe, provenance
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors, write_text

EPOCHS = 4  # one of ranges, one of warm-up, two of training
# Resumed runs end bit for bit the same where PyTorch's libraries compute the same each time, which they do if asked to.
GDFQ = "import torch; torch.backends.cudnn.deterministic = True; from gdfq.cli import main; main()"
TOLERANCE = 1e-3


def resnet18() -> nn.Module:
    """Random weights, the same every time, with BN statistics of Gaussian images."""
    return new_model(new_task("pytorchcv:resnet18"))


def quantize(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", GDFQ, "quantize", *arguments])


def beginning(args: argparse.Namespace, run: Path) -> list[str]:
    """What starts a run."""
    iterations = args.iterations // EPOCHS
    settings = {
        "schedule.epochs": EPOCHS, "schedule.iterations": iterations, "schedule.batch_size": args.batch,
        "schedule.range_epochs": 1, "schedule.warmup_epochs": 2, "schedule.range_batches": 2,
        "schedule.milestones": [3], "student.learning_rate": 1e-4, "run.held_out_images": 2 * args.batch,
        "run.log_every": 1, "run.checkpoint_every": args.iterations // 2, "method": "gdfq",
    }  # fmt: skip
    model = ("--model", args.model, "--image-size", str(args.image_size), "--preset", "imagenet")
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    return [*model, *options, "--out", str(run)]


def kill_in_the_middle(process: subprocess.Popen, run: Path, iteration: int) -> int:
    """Kill the run once it has done so many iterations; returns the last that its log knows.

    Raises:
        RuntimeError: it ended before.
    """
    while last_entry(run).get("iteration", 0) < iteration:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with code {process.returncode} before it could be killed")
        time.sleep(0.02)
    process.kill()
    process.wait()
    return last_entry(run)["iteration"]


def difference(one: Path, other: Path) -> tuple[bool, float]:
    """Whether the tensors of two checkpoints are equal, and the largest difference relative to its tensor's largest."""
    (tensors, _), (others, _) = (load_tensors(run / run_folder.CHECKPOINT) for run in (one, other))
    assert tensors.keys() == others.keys()
    equal = all(torch.equal(value, others[name]) for name, value in tensors.items())
    relative = [
        (value - others[name]).abs().max() / others[name].abs().max().clamp(min=1e-12)
        for name, value in tensors.items()
        if value.is_floating_point() and value.numel()
    ]
    return equal, torch.stack(relative).max().item()  # NaN if one of them is


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.killed_run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="benchmarks.killed_run:resnet18", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=200, help="of a run, a multiple of 4")
    parser.add_argument("--runs", type=Path, required=True, help="folder for the two runs")
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    result: dict[str, Any] = provenance(torch.get_num_threads())
    whole, killed = args.runs / "whole", args.runs / "killed"
    processes = [quantize(*beginning(args, run)) for run in (whole, killed)]
    try:
        last = kill_in_the_middle(processes[1], killed, args.iterations * 5 // 8)
        print(f"killed after iteration {last} of {args.iterations}", flush=True)
        processes.append(quantize("--resume", str(killed)))
        codes = [processes[0].wait(), processes[2].wait()]
    finally:
        for process in processes:
            process.kill()
    ends = [last_entry(run)["iteration"] for run in (whole, killed)]
    equal, largest = difference(whole, killed)
    result |= {"killed_after": last, "exit_codes": codes, "iterations": ends, "equal": equal, "difference": largest}
    result |= {"model": args.model, "image_size": args.image_size, "batch": args.batch}
    result["how"] = last_entry(killed)["iterations"]
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    same = "bit for bit the same" if equal else f"up to {largest:.2g} of a tensor's largest value apart"
    print(
        f"{args.model}, {args.image_size} pixels, batch {args.batch} ({result['how']}): killed after iteration "
        f"{last}, resumed, ended at {ends[1]} of {ends[0]}, exit codes {codes}; {same}\n{describe(result)}"
    )
    return 0 if codes == [0, 0] and ends[0] == ends[1] == args.iterations and largest <= TOLERANCE else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run outlives this process
    sys.exit(main())
