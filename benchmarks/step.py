"""Time of one GDFQ iteration (a step of G and a step of Q) by several providers, interleaved in one run.

    python -m benchmarks.step --out step.json

`benchmarks/README.md` has the method; `step_providers.py` says what the providers are.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_providers import (
    CHANGES,
    DEFAULT,
    OPTIONAL,
    PRECISIONS,
    PROVIDERS,
    Task,
    new_task,
    parse_provider,
    task_of,
)
from benchmarks.step_table import table
from gdfq.errors import GdfqError
from gdfq.models import parse_model_args
from gdfq.provenance import provenance
from gdfq.run.files import write_text

# Before a turn: threads of the previous worker's OpenMP keep spinning for some milliseconds after its last region.
PAUSE = 0.05

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "ALLOC_FAILED", "ended with code -9")
# Of a provider, until the rounds are over.
NOT_YET = dict.fromkeys(("peak_memory_mb", "profiled_ms", "parts_ms", "launches"))
STUDENT_FIGURES = ("student/cross_entropy", "student/kl", "student_gradient")


@dataclass(frozen=True)
class Plan:
    """How a task is measured.

    Attributes:
        providers: names (see `parse_provider`), in the order of their turns.
        iterations: rounds, in each of which every provider has a turn.
        repeat: iterations in a turn.
        warmup: iterations before the first round.
        threads: of each provider.
        tolerance, student_tolerance: see `disagreements`.
        together: the providers warm up at the same time, else one after the other.
        patience: seconds after which a provider that is not warmed up is left out; None: no limit.
    """

    providers: tuple[str, ...]
    iterations: int
    repeat: int
    warmup: int
    threads: int
    tolerance: float
    student_tolerance: float
    together: bool = False
    patience: float | None = None


class CannotRunError(RuntimeError):
    """This machine lacks what a provider needs: the others are measured without it."""


class Worker:
    """A provider in its own process, idle except between a question and its answer.

    Args:
        tree: whose code it runs; None: this one's.
    """

    def __init__(self, provider: str, task: Task, warmup: int, threads: int, tree: Path | None = None) -> None:
        self.provider = provider
        code = [str(Path(__file__).resolve().parent.parent)] if tree is None else [f"{tree}/python", str(tree)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*code, *filter(None, sys.path)]),
            "OMP_NUM_THREADS": str(threads),
            "KINETO_LOG_LEVEL": "9",  # the profiler's own messages
        }
        if parse_provider(provider)[0] == "reference":
            environment["GDFQ_EXT"] = "reference"
        command = [sys.executable, "-m", "benchmarks.step_worker", provider, json.dumps(asdict(task)), str(warmup)]
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,  # where -m looks first
        )

    def answer(self, deadline: float | None = None) -> dict[str, Any]:
        """Wait for the next answer, until `time.monotonic` is at the deadline.

        Raises:
            RuntimeError: the worker failed or is gone; `CannotRunError` where it lacks memory or time, or is optional.
        """
        if deadline is not None:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CannotRunError(f"{self.provider}: not warmed up in time")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        return checked(self.provider, answer)

    def ask(self, question: str) -> dict[str, Any]:
        """`answer` to one line of what `step_worker.py` understands."""
        with contextlib.suppress(BrokenPipeError):  # the answer says how the process ended
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self, patience: float = 30) -> None:
        """End the process: it may finish what it is at, but for that many seconds only."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def checked(provider: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a provider's worker, if it is no error (see `Worker.answer`)."""
    error = answer.get("error")
    if error is None:
        return answer
    lacking = parse_provider(provider)[0] in OPTIONAL or any(words in error for words in OUT_OF_MEMORY)
    raise (CannotRunError if lacking else RuntimeError)(f"{provider}: {error}")


class Workers:
    """The processes of the providers that can run, and why the others cannot. They end with the block.

    Attributes:
        skipped: why a provider was left out that lacks something.
        failed: what went wrong in a provider that should have run.
    """

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task = task
        self.plan = plan
        self.running: dict[str, Worker] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.running.values():
            worker.close(patience=0)

    def start(self) -> dict[str, dict[str, Any]]:
        """Every provider's first answer, once it is warmed up."""
        for provider in self.plan.providers if self.plan.together else ():
            self._begin(provider)
        ready = {}
        deadline = None if self.plan.patience is None else time.monotonic() + self.plan.patience
        for provider in self.plan.providers:
            if provider not in self.running:
                self._begin(provider)
            if answer := self._attempt(provider, partial(self.running[provider].answer, deadline)):
                ready[provider] = answer
        return ready

    def ask(self, question: str) -> dict[str, dict[str, Any]]:
        """The answers to one question, asked in turns. Who cannot answer is not running from then on."""
        answers = {}
        for provider, worker in list(self.running.items()):
            time.sleep(PAUSE)
            if answer := self._attempt(provider, lambda worker=worker: worker.ask(question)):
                answers[provider] = answer
        return answers

    def _begin(self, provider: str) -> None:
        self.running[provider] = Worker(provider, self.task, self.plan.warmup, self.plan.threads)

    def _attempt(self, provider: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return call()
        except RuntimeError as error:
            reasons = self.skipped if isinstance(error, CannotRunError) else self.failed
            reasons[provider] = str(error)
            self.running.pop(provider).close(patience=5)
            return None


def measure(task: Task, plan: Plan, keep: Callable[[dict[str, Any]], None] = lambda result: None) -> dict[str, Any]:
    """Run the providers in turns and return the result as JSON values.

    Args:
        task: what is trained.
        plan: how it is measured.
        keep: is given the result of the rounds so far after each of them, should there be no more.

    Raises:
        RuntimeError: no provider can run.
    """
    facts = provenance(plan.threads)
    seconds: dict[str, list[float]] = {provider: [] for provider in plan.providers}

    def result(finished: bool) -> dict[str, Any]:
        times = {provider: seconds[provider] for provider in workers.running}
        if not any(times.values()):
            raise RuntimeError("; ".join([*workers.failed.values(), *workers.skipped.values()]))
        return {
            **facts,
            "arguments": arguments_of(task, plan),
            "finished": finished,
            "providers": {provider: {**summary(times[provider], task.batch), **others[provider]} for provider in times},
            "ratio_to_ours": ratios(times),
            "disagreements": differing,
            "skipped": dict(workers.skipped),
            "failed": dict(workers.failed),
        }

    with Workers(task, plan) as workers:
        ready = workers.start()
        others = {
            provider: {"first_iteration": answer["evidence"], "backend": answer["backend"], **NOT_YET}
            for provider, answer in ready.items()
        }
        differing = disagreements(
            {provider: answer["evidence"] for provider, answer in ready.items()}, plan.tolerance,
            plan.student_tolerance, [name for name in ready if task_of(name, task).precision != "float32"],
        )  # fmt: skip
        for _ in range(plan.iterations):
            for provider, answer in workers.ask(f"run {plan.repeat}").items():
                seconds[provider].append(answer["seconds"] / plan.repeat)
            keep(result(finished=False))
        # In this order: profiles take memory.
        for provider, answer in workers.ask("memory").items():
            others[provider]["peak_memory_mb"] = round(answer["peak_mb"], 1)
        for provider, answer in workers.ask("profile").items():
            others[provider] |= answer
        return result(finished=True)


def arguments_of(task: Task, plan: Plan) -> dict[str, Any]:
    """What a result was asked for, as a JSON file gives it back."""
    return json.loads(json.dumps(asdict(task) | asdict(plan)))


def disagreements(
    evidence: dict[str, dict[str, float]], tolerance: float, student_tolerance: float, low_precision: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The figures of the providers' first iterations that are not near the first provider's.

    Args:
        evidence: provider -> figure -> value; a provider without figures is left out.
        tolerance: of the generator's figures, relative.
        student_tolerance: of the quantized model's, relative. It is wider: a last-bit difference that moves a value
            over a rounding boundary is a whole level, and moves other values over theirs in all layers that follow.
        low_precision: providers that round more than float32 does. It is of all their figures, too.

    Returns:
        Of each the `provider`, the `first` one, the `figure`, its `value`, the `expected` one and the `tolerance`.
    """
    evidence = {provider: figures for provider, figures in evidence.items() if figures}
    first, expected = next(iter(evidence.items()), ("", {}))
    found = []
    for provider, figures in evidence.items():
        for name, value in figures.items():
            wide = name in STUDENT_FIGURES or not {first, provider}.isdisjoint(low_precision)
            allowed = student_tolerance if wide else tolerance
            # A KL below 1e-5 is a difference of float32 logarithms and mostly rounding. NaN does not pass.
            if not abs(value - expected[name]) <= allowed * max(abs(expected[name]), 1e-5):
                found.append(
                    {"provider": provider, "first": first, "figure": name, "value": value, "expected": expected[name],
                     "tolerance": allowed}
                )  # fmt: skip
    return found


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
        "--precision", choices=PRECISIONS, default="float32",
        help="of convolutions and matrix products, for all providers whose names do not say it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--iterations", type=int, default=8, help="rounds, in each of which every provider has a turn")
    timed, before = "iterations timed together in a turn", "iterations before the first round"
    parser.add_argument("--repeat", type=int, default=10 if on_gpu else 1, help=f"{timed} (here: %(default)s)")
    parser.add_argument("--warmup", type=int, default=10 if on_gpu else 2, help=f"{before} (here: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--together", action="store_true", help="warm up all providers at the same time, where there are the cores"
    )
    parser.add_argument(
        "--patience", type=float, metavar="SECONDS",
        help="leave out a provider that is not warmed up by then (default: no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--providers", nargs="+", type=provider_name, default=list(DEFAULT), metavar="NAME",
        help=f"of {', '.join(PROVIDERS)}, each also with {', '.join(CHANGES)} behind it (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.01, help="of G's first losses and gradient, relative")
    parser.add_argument("--student-tolerance", type=float, default=0.1, help="the same of Q's (default: %(default)s)")


def provider_name(text: str) -> str:
    """For argparse."""
    try:
        parse_provider(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def check_counts(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where an option that counts something is below one."""
    for name in ("batch", "iterations", "repeat", "warmup", "threads", "image_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed is 1 or more")


def plan_from(args: argparse.Namespace) -> Plan:
    return Plan(
        tuple(dict.fromkeys(args.providers)), args.iterations, args.repeat, args.warmup, args.threads, args.tolerance,
        args.student_tolerance, args.together, args.patience,
    )  # fmt: skip


def task_from(args: argparse.Namespace) -> Task:
    model_arguments = parse_model_args(args.model_arg)
    if args.classes is not None:
        model_arguments["num_classes"] = args.classes
    return new_task(
        args.model, args.image_size, model_arguments, args.preset, bits=args.bits, batch=args.batch,
        precision=args.precision,
    )  # fmt: skip


def end_on_sigterm() -> None:
    """Let a SIGTERM end the program like an exception, so that no worker is left behind."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice, and the workers are being ended
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)

    def keep(result: dict[str, Any]) -> None:
        if args.out is not None:
            write_text(args.out, json.dumps(result, indent=2) + "\n")

    try:
        result = measure(task_from(args), plan_from(args), keep)
    except (RuntimeError, GdfqError) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    keep(result)
    print(table(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
