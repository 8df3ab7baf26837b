"""Time of one GDFQ iteration (a step of G and a step of Q) by several providers, interleaved in one run.

    python -m benchmarks.step --out step.json

`benchmarks/README.md` has the method; `step_providers.py` says what the providers are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_providers import DEFAULT, PROVIDERS, Task
from gdfq.bench.provenance import describe, provenance
from gdfq.errors import GdfqError
from gdfq.files import write_text
from gdfq.models import parse_model_args

# Before a turn: threads of the previous worker's OpenMP keep spinning for some milliseconds after its last region.
PAUSE = 0.05

STUDENT_FIGURES = ("student_cross_entropy", "kl", "student_gradient")


class Worker:
    """A provider in its own process, idle except between a question and its answer."""

    def __init__(self, provider: str, task: Task, warmup: int, threads: int) -> None:
        self.provider = provider
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": str(threads),
        }
        if provider == "reference":
            environment["GDFQ_EXT"] = "reference"
        command = [sys.executable, "-m", "benchmarks.step_worker", provider, json.dumps(asdict(task)), str(warmup)]
        self.process = subprocess.Popen(
            [*command, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            RuntimeError: the worker reported an error or is gone.
        """
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"{self.provider}: {answer['error']}")
        return answer

    def ask(self, question: str) -> dict[str, Any]:
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(
    task: Task, providers: list[str], iterations: int, repeat: int, warmup: int, threads: int,
    tolerance: float, student_tolerance: float,
) -> dict[str, Any]:  # fmt: skip
    """Run the providers in turns and return the result as JSON values.

    Raises:
        AssertionError: the providers' first losses or gradients disagree: their mathematics is not the same.
        RuntimeError: a provider other than `compile` failed.
    """
    facts = provenance(threads)
    workers: dict[str, Worker] = {}
    ready: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    try:
        for provider in providers:  # one after the other: nobody's compilation disturbs anybody's warm-up
            worker = workers[provider] = Worker(provider, task, warmup, threads)
            try:
                ready[provider] = worker.answer()
            except RuntimeError as error:
                if provider != "compile":
                    raise
                skipped[provider] = str(error)
                workers.pop(provider).close()
        evidence = {name: answer["evidence"] for name, answer in ready.items()}
        check_agreement(evidence, tolerance, student_tolerance)
        seconds: dict[str, list[float]] = {provider: [] for provider in workers}
        for _ in range(iterations):
            for provider, worker in workers.items():
                time.sleep(PAUSE)
                seconds[provider].append(worker.ask(f"run {repeat}")["seconds"] / repeat)
        peaks = {provider: worker.ask("memory")["peak_mb"] for provider, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    return {
        **facts,
        "arguments": {
            **asdict(task), "providers": providers, "iterations": iterations, "repeat": repeat, "warmup": warmup,
            "threads": threads, "tolerance": tolerance, "student_tolerance": student_tolerance,
        },
        "providers": {
            provider: {
                **summary(times, task.batch),
                "peak_memory_mb": round(peaks[provider], 1),
                "first_iteration": ready[provider]["evidence"],
                "backend": ready[provider]["backend"],
            }
            for provider, times in seconds.items()
        },
        "ratio_to_ours": ratios(seconds),
        "skipped": skipped,
    }  # fmt: skip


def check_agreement(evidence: dict[str, dict[str, float]], tolerance: float, student_tolerance: float) -> None:
    """Every figure of every provider's first iteration is near the first provider's.

    Args:
        evidence: provider -> figure -> value; a provider without figures is left out.
        tolerance: of the generator's figures, relative.
        student_tolerance: of the quantized model's, relative. It is wider: a last-bit difference that moves a value
            over a rounding boundary is a whole level, and moves other values over theirs in all layers that follow.

    Raises:
        AssertionError: names the provider and the figure.
    """
    evidence = {provider: figures for provider, figures in evidence.items() if figures}
    first, expected = next(iter(evidence.items()), ("", {}))
    for provider, figures in evidence.items():
        for name, value in figures.items():
            allowed = student_tolerance if name in STUDENT_FIGURES else tolerance
            # A KL below 1e-5 is a difference of float32 logarithms and mostly rounding. NaN does not pass.
            if not abs(value - expected[name]) <= allowed * max(abs(expected[name]), 1e-5):
                raise AssertionError(
                    f"{provider} does not compute what {first} does: {name} of the first iteration is {value!r} and "
                    f"{expected[name]!r}, tolerance {allowed}, relative"
                )


def summary(seconds: list[float], batch: int) -> dict[str, Any]:
    milliseconds = torch.tensor(seconds, dtype=torch.float64) * 1e3
    p20, median, p80 = milliseconds.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {
        "ms": {"median": median, "p20": p20, "p80": p80},
        "samples_ms": milliseconds.tolist(),
        "images_per_second": batch / median * 1e3,
    }


def ratios(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over the rounds of a provider's time divided by that of `ours` in the same round."""
    if "ours" not in seconds:
        return {}
    return {
        provider: statistics.median(a / b for a, b in zip(times, seconds["ours"], strict=True))
        for provider, times in seconds.items()
    }


def table(result: dict[str, Any]) -> str:
    arguments, on_gpu = result["arguments"], result["machine"]["device"] != "cpu"
    lines = [
        f"One iteration, {arguments['model']}, batch {arguments['batch']}, preset {arguments['preset']}, "
        f"W{arguments['bits']}A{arguments['bits']}, {arguments['iterations']} rounds of {arguments['repeat']}",
        describe(result),
        "",
        f"{'provider':19} {'median ms':>10} {'p20':>9} {'p80':>9} {'images/s':>9} "
        f"{'peak GPU MB' if on_gpu else 'peak RSS MB':>12} {'/ ours':>7}",
    ]
    for provider, row in result["providers"].items():
        ratio = result["ratio_to_ours"].get(provider)
        lines.append(
            f"{provider:19} {row['ms']['median']:10.2f} {row['ms']['p20']:9.2f} {row['ms']['p80']:9.2f} "
            f"{row['images_per_second']:9.1f} {row['peak_memory_mb']:12.0f} "
            + (f"{ratio:7.2f}" if ratio is not None else f"{'-':>7}")
        )
    lines += [f"skipped: {reason}" for reason in result["skipped"].values()]
    lines += ["", "first iteration: CE and BNS of G, CE and KL of Q, norms of the gradients of G and Q"]
    for provider, row in result["providers"].items():
        if row["first_iteration"]:
            lines.append(f"{provider:19} " + "  ".join(f"{value:11.6g}" for value in row["first_iteration"].values()))
    if "ours" in result["providers"]:
        lines += ["", f"ours: {result['providers']['ours']['backend']}"]
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, or what `gdfq quantize` takes (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="height and width; needed where the model does not say it")
    parser.add_argument("--classes", type=int, help="handed to the model as num_classes")
    parser.add_argument("--model-arg", action="append", default=[], metavar="NAME=VALUE", help="handed to the model")
    parser.add_argument("--preset", help="default: cifar for images up to 64 pixels, else imagenet")
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=8, help="rounds, in each of which every provider has a turn")
    timed, before = "iterations timed together in a turn", "iterations before the first round"
    parser.add_argument("--repeat", type=int, default=10 if on_gpu else 1, help=f"{timed} (here: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10 if on_gpu else 2, help=f"{before} (here: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), default=list(DEFAULT), help="default: all but "
        + ", ".join(sorted(set(PROVIDERS) - set(DEFAULT))),
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.01, help="of G's first losses and gradient, relative")
    parser.add_argument("--student-tolerance", type=float, default=0.1, help="the same of Q's (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(arguments)
    for name in ("batch", "iterations", "repeat", "warmup", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; allowed is 1 or more")
    return args


def task_from(args: argparse.Namespace) -> Task:
    model_arguments = parse_model_args(args.model_arg)
    if args.classes is not None:
        model_arguments["num_classes"] = args.classes
    if args.image_size is not None and args.model.startswith("pytorchcv:"):
        model_arguments.setdefault("in_size", (args.image_size, args.image_size))
    small = args.model == "demo" or "cifar" in args.model if args.image_size is None else args.image_size <= 64
    preset = args.preset or ("cifar" if small else "imagenet")
    return Task(args.model, args.image_size, tuple(model_arguments.items()), preset, args.bits, args.batch)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        result = measure(
            task_from(args), args.providers, args.iterations, args.repeat, args.warmup, args.threads,
            args.tolerance, args.student_tolerance,
        )  # fmt: skip
    except (AssertionError, RuntimeError, GdfqError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
