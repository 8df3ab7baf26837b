"""What accuracy does GDFQ reach in so many seconds?

    python -m benchmarks.accuracy_in_time --seconds 150 --cifar FOLDER --run RUN --out accuracy.json

A ResNet-20 is quantized to W4A4 with as many iterations as fit: one is measured, the schedule is laid out for the time
that is left, the run (`gdfq quantize`, as users start it) is ended with SIGTERM if it is still going then, and what it
has saved is evaluated. FOLDER holds CIFAR-10's test images and a network for them, see `benchmarks/gpu_prepare.sh`;
without it the built-in demonstration's network and images are taken.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.step_providers import trainer_of
from benchmarks.step_worker import synchronize
from gdfq.config import Config
from gdfq.data import LabeledImages, load_dataset
from gdfq.evaluate import evaluate
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.models import load_model
from gdfq.provenance import describe, provenance
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import load_checkpoint
from gdfq.run.files import load_tensors, write_text

RECIPE = "examples/cifar10_short.toml"
# How the carried network's training images were normalized.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMPORTS = 6  # seconds that a process needs before its first line of ours
EVALUATION = 20  # seconds kept back for it, a quarter of all at most
SAVING = 30  # seconds that a run may take to end
STOPPED = 130  # exit code after a stop that saved
PLANNED = 0.9  # of the time: graphs are captured and epochs end with an evaluation


@dataclass(frozen=True)
class Subject:
    """A trained network with its test images, and what tells `gdfq quantize` of it."""

    name: str
    network: nn.Module
    images: LabeledImages
    arguments: tuple[str, ...]

    @property
    def image_size(self) -> int:
        return self.images.pixels(0).shape[-1]


def subject(cifar: Path | None) -> Subject:
    if cifar is None:
        model, weights, images = "gdfq.demo:teacher", None, load_dataset("fashion-mnist")
        name = "the demonstration's ResNet-20, Fashion-MNIST"
    else:
        model, weights = "examples/custom_resnet20.py:resnet20", cifar / "resnet20.safetensors"
        images, name = load_dataset(cifar / "test.npz", mean=MEAN, std=STD), "ResNet-20, CIFAR-10"
    arguments = ("--model", model, *(("--weights", str(weights)) if weights else ()))
    return Subject(name, load_model(model, weights), images, arguments)


def milliseconds_of_an_iteration(what: Subject, batch: int, device: str) -> float:
    """Of alternate training, where both networks learn: the longest kind."""
    captured = capture(what.network, what.image_size, device=device)
    trainer, _ = trainer_of(captured, build_teacher(captured), RECIPE, batch, {})
    warmup, iterations = (3, 5) if device == "cpu" else (20, 100)
    for count in (warmup, iterations):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            trainer.step()
        synchronize()
    return (time.perf_counter() - start) / iterations * 1e3


def train(what: Subject, run: Path, seconds: float, settings: dict[str, Any]) -> int:
    """`gdfq quantize` into `run`, stopped after `seconds`, though not before it has begun; returns its exit code."""
    options = [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "gdfq", "quantize", *what.arguments, "--image-size", str(what.image_size)]
    process = subprocess.Popen([*command, "--preset", RECIPE, *options, "--out", str(run)])
    end = time.monotonic() + seconds
    try:
        while process.poll() is None and (time.monotonic() < end or not last_entry(run)):
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(SAVING)
    finally:
        process.kill()


def last_entry(run: Path) -> dict[str, Any]:
    """Of the run's log; empty before the first."""
    try:
        return json.loads((run / run_folder.LOG).read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}


def evaluated(what: Subject, run: Path, count: int | None, device: str) -> dict[str, Any]:
    """Accuracy of the float network and of the quantized one as the run's checkpoint holds it."""
    path = run / run_folder.CHECKPOINT
    state = load_checkpoint(path, json.loads(load_tensors(path)[1]["identity"]))
    captured = capture(what.network, what.image_size, device=device)
    student, _ = build_quantized(captured, Config.load(run / run_folder.CONFIG).quantizer)
    student.load_state_dict(state["trainer"]["student"])
    images = what.images if count is None else Subset(what.images, range(count))
    models = {"float": what.network, "quantized": student}
    top1 = {name: evaluate(model, images, device=device).top1 for name, model in models.items()}
    return {"iterations": state["trainer"]["iteration"], "seconds": state["seconds"], "top1": top1}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy_in_time", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--cifar", type=Path, help="folder with test.npz and resnet20.safetensors")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--images", type=int, help="evaluate on so many only")
    parser.add_argument("--run", type=Path, required=True, help="new folder for the run")
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    begun = time.monotonic() - IMPORTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = provenance(torch.get_num_threads())
    what = subject(args.cifar)
    milliseconds = milliseconds_of_an_iteration(what, args.batch, device)
    starting = time.monotonic() - begun  # the run, too, needs this long before its first iteration
    left = args.seconds - starting - min(EVALUATION, args.seconds / 4)
    epochs = Config.load(RECIPE).schedule.epochs
    planned = epochs * max(1, int(PLANNED * (left - starting) * 1e3 / milliseconds / epochs))
    settings = {"schedule.iterations": planned // epochs, "schedule.batch_size": args.batch}
    settings |= {"run.log_every": max(1, planned // 100), "run.checkpoint_every": planned}  # a stop saves, too
    result |= {"subject": what.name, "ms_per_iteration": milliseconds, "planned_iterations": planned, **settings}
    print(f"{what.name}: {milliseconds:.2f} ms an iteration of batch {args.batch}, {planned} fit", flush=True)
    write_text(args.out, json.dumps(result, indent=1) + "\n")

    result["exit_code"] = train(what, args.run, left, settings)
    result["how"] = last_entry(args.run).get("iterations")
    result |= evaluated(what, args.run, args.images, device)
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(
        f"{what.name}, W4A4: top-1 {result['top1']['quantized']:.2f}%, float {result['top1']['float']:.2f}%, after "
        f"{result['iterations']} of {planned} iterations of batch {args.batch} in {result['seconds']:.0f} s "
        f"({result['how']}), exit code {result['exit_code']}\n{describe(result)}"
    )
    return 0 if result["exit_code"] in (0, STOPPED) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no run outlives this process
    sys.exit(main())
