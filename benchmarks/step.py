"""Time of one GDFQ iteration (a step of G and a step of Q) by several providers, interleaved in one run.

    python -m benchmarks.step --out step.json

`benchmarks/README.md` has the method; `step_providers.py` says what the providers are.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.parts import PARTS
from benchmarks.step_providers import DEFAULT, OPTIONAL, PROVIDERS, Task, new_task
from gdfq.bench.provenance import describe, provenance
from gdfq.config import RunConfig
from gdfq.errors import GdfqError
from gdfq.files import write_text
from gdfq.models import parse_model_args

# Before a turn: threads of the previous worker's OpenMP keep spinning for some milliseconds after its last region.
PAUSE = 0.05

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "ALLOC_FAILED", "ended with code -9")
STUDENT_FIGURES = ("student_cross_entropy", "kl", "student_gradient")


@dataclass(frozen=True)
class Plan:
    """How a task is measured.

    Attributes:
        providers: names, in the order of their turns.
        iterations: rounds, in each of which every provider has a turn.
        repeat: iterations in a turn.
        warmup: iterations before the first round.
        threads: of each provider.
        tolerance, student_tolerance: see `check_agreement`.
    """

    providers: tuple[str, ...]
    iterations: int
    repeat: int
    warmup: int
    threads: int
    tolerance: float
    student_tolerance: float


class CannotRunError(RuntimeError):
    """This machine lacks what a provider needs: the others are measured without it."""


class Worker:
    """A provider in its own process, idle except between a question and its answer."""

    def __init__(self, provider: str, task: Task, warmup: int, threads: int) -> None:
        self.provider = provider
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": str(threads),
            "KINETO_LOG_LEVEL": "9",  # the profiler's own messages
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
            RuntimeError: the worker failed or is gone; `CannotRunError` where it lacks memory or is optional.
        """
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        return checked(self.provider, answer)

    def ask(self, question: str) -> dict[str, Any]:
        """`answer` to one line of what `step_worker.py` understands."""
        with contextlib.suppress(BrokenPipeError):  # the answer says how the process ended
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def checked(provider: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a provider's worker, if it is no error (see `Worker.answer`)."""
    error = answer.get("error")
    if error is None:
        return answer
    lacking = provider in OPTIONAL or any(words in error for words in OUT_OF_MEMORY)
    raise (CannotRunError if lacking else RuntimeError)(f"{provider}: {error}")


class Workers:
    """The processes of the providers that can run, and why the others cannot."""

    def __init__(self) -> None:
        self.running: dict[str, Worker] = {}
        self.skipped: dict[str, str] = {}

    def start(self, provider: str, task: Task, plan: Plan) -> dict[str, Any] | None:
        """The new worker's first answer; None where it cannot run."""
        self.running[provider] = Worker(provider, task, plan.warmup, plan.threads)
        return self._attempt(provider, self.running[provider].answer)

    def ask(self, provider: str, question: str) -> dict[str, Any] | None:
        """`Worker.ask`; None where the worker cannot go on, and from then on it is not running."""
        return self._attempt(provider, lambda: self.running[provider].ask(question))

    def _attempt(self, provider: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return call()
        except CannotRunError as error:
            self.skipped[provider] = str(error)
            self.running.pop(provider).close()
            return None

    def close(self) -> None:
        for worker in self.running.values():
            worker.close()


def measure(task: Task, plan: Plan) -> dict[str, Any]:
    """Run the providers in turns and return the result as JSON values.

    Raises:
        AssertionError: the providers' first losses or gradients disagree: their mathematics is not the same.
        RuntimeError: a provider failed for another reason than `CannotRunError`, or none can run.
    """
    facts = provenance(plan.threads)
    workers = Workers()
    try:
        # One after the other: nobody's compilation disturbs anybody's warm-up.
        ready = {provider: workers.start(provider, task, plan) for provider in plan.providers}
        evidence = {provider: answer["evidence"] for provider, answer in ready.items() if answer}
        check_agreement(evidence, plan.tolerance, plan.student_tolerance)
        seconds: dict[str, list[float]] = {provider: [] for provider in workers.running}
        for _ in range(plan.iterations):
            for provider in list(workers.running):
                time.sleep(PAUSE)
                if answer := workers.ask(provider, f"run {plan.repeat}"):
                    seconds[provider].append(answer["seconds"] / plan.repeat)
        # In this order: profiles take memory.
        memory = {provider: workers.ask(provider, "memory") for provider in list(workers.running)}
        profiles = {provider: workers.ask(provider, "profile") for provider in list(workers.running)}
        seconds = {provider: seconds[provider] for provider in workers.running}
    finally:
        workers.close()
    if not seconds:
        raise RuntimeError("; ".join(workers.skipped.values()))
    return {
        **facts,
        "arguments": arguments_of(task, plan),
        "providers": {
            provider: {
                **summary(times, task.batch),
                "peak_memory_mb": round(memory[provider]["peak_mb"], 1),
                **profiles[provider],
                "first_iteration": ready[provider]["evidence"],
                "backend": ready[provider]["backend"],
            }
            for provider, times in seconds.items()
        },
        "ratio_to_ours": ratios(seconds),
        "skipped": workers.skipped,
    }


def arguments_of(task: Task, plan: Plan) -> dict[str, Any]:
    """What a result was asked for, as a JSON file gives it back."""
    return json.loads(json.dumps(asdict(task) | asdict(plan)))


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
    arguments = result["arguments"]
    lines = [f"One iteration, {heading(arguments)}", describe(result), "", *rows(result)]
    lines += ["", "first iteration: CE and BNS of G, CE and KL of Q, norms of the gradients of G and Q"]
    for provider, row in result["providers"].items():
        if row["first_iteration"]:
            lines.append(f"{provider:19} " + "  ".join(f"{value:11.6g}" for value in row["first_iteration"].values()))
    if "ours" in result["providers"]:
        lines += ["", f"ours: {result['providers']['ours']['backend']}"]
    return "\n".join(lines)


def heading(arguments: dict[str, Any]) -> str:
    """What was measured, in words."""
    size = f", {arguments['image_size']} pixels" if arguments["image_size"] else ""
    return (
        f"{arguments['model']}{size}, batch {arguments['batch']}, preset {arguments['preset']}, "
        f"W{arguments['bits']}A{arguments['bits']}, {arguments['precision']}, "
        f"{arguments['iterations']} rounds of {arguments['repeat']}"
    )


def rows(result: dict[str, Any]) -> list[str]:
    """Lines of text: times, memory and launches of every provider, then the parts of those that have them."""
    on_gpu = result["machine"]["device"] != "cpu"
    memory, launches = ("peak GPU MB", "kernels") if on_gpu else ("peak RSS MB", "leaf calls")
    lines = [
        f"{'provider':19} {'median ms':>10} {'p20':>9} {'p80':>9} {'images/s':>9} {memory:>12} {launches:>10} "
        f"{'/ ours':>7}"
    ]
    for provider, row in result["providers"].items():
        ratio = result["ratio_to_ours"].get(provider)
        count = next(iter((row["launches"] or {}).values()), None)
        lines.append(
            f"{provider:19} {row['ms']['median']:10.2f} {row['ms']['p20']:9.2f} {row['ms']['p80']:9.2f} "
            f"{row['images_per_second']:9.1f} {row['peak_memory_mb']:12.0f} "
            + (f"{count:10.0f} " if count is not None else f"{'-':>10} ")
            + (f"{ratio:7.2f}" if ratio is not None else f"{'-':>7}")
        )
    lines += [f"skipped: {reason}" for reason in result["skipped"].values()]
    lines += ["", f"{'parts, ms, profiled':19} " + "".join(f"{part:>12}" for part in PARTS) + f"{'sum':>10}{'of':>10}"]
    for provider, row in result["providers"].items():
        if row["parts_ms"]:
            times = row["parts_ms"].values()
            lines.append(
                f"{provider:19} " + "".join(f"{value:12.2f}" for value in times)
                + f"{sum(times):10.2f}{row['profiled_ms']:10.2f}"
            )  # fmt: skip
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, or what `gdfq quantize` takes (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="height and width; needed where the model does not say it")
    parser.add_argument("--classes", type=int, help="handed to the model as num_classes")
    parser.add_argument("--model-arg", action="append", default=[], metavar="NAME=VALUE", help="handed to the model")
    parser.add_argument("--preset", help="default: cifar for images up to 64 pixels, else imagenet")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    add_plan_arguments(parser, bits=4)
    args = parser.parse_args(arguments)
    check_counts(parser, args)
    return args


def add_plan_arguments(parser: argparse.ArgumentParser, bits: int) -> None:
    """The options that do not say what network is measured."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--bits", type=int, default=bits, help="of weights and activations (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=get_args(RunConfig.model_fields["precision"].annotation), default="float32",
        help="of convolutions and matrix products, for all providers (default: %(default)s)",
    )  # fmt: skip
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


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where an option that counts something is below one."""
    for name in ("batch", "iterations", "repeat", "warmup", "threads", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed is 1 or more")


def plan_from(args: argparse.Namespace) -> Plan:
    return Plan(
        tuple(args.providers), args.iterations, args.repeat, args.warmup, args.threads, args.tolerance,
        args.student_tolerance,
    )  # fmt: skip


def task_from(args: argparse.Namespace) -> Task:
    model_arguments = parse_model_args(args.model_arg)
    if args.classes is not None:
        model_arguments["num_classes"] = args.classes
    return new_task(
        args.model, args.image_size, model_arguments, args.preset, bits=args.bits, batch=args.batch,
        precision=args.precision,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        result = measure(task_from(args), plan_from(args))
    except (AssertionError, RuntimeError, GdfqError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
