"""One provider in a process of its own, for `step.py`: runs iterations when told to, one command a line on stdin.

    run N -> {"seconds": S}    N iterations, timed together, the device finished
    memory -> {"peak_mb": M}   highest memory since the warm-up: the process's, or on a GPU what torch allocated
    profile -> {...}           what `benchmarks.parts.measure` gives

Answers are JSON, a line each.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import parts
from benchmarks.step_providers import Task, new_provider, task_of
from gdfq.precision import products_in_tf32

PROFILED = 3  # iterations


def main() -> None:
    provider, arguments, warmup, threads = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    # Answers have stdout for themselves: whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch.set_num_threads(threads)
    arguments["model_arguments"] = tuple((name, value) for name, value in arguments["model_arguments"])
    task = Task(**arguments)
    try:
        with products_in_tf32(task_of(provider, task).precision == "tf32"):
            serve(provider, task, warmup, answer)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        raise


def serve(provider: str, task: Task, warmup: int, answer: Callable[..., None]) -> None:
    """Warm up, answer with the figures of the first iteration, and then to every line."""
    subject = new_provider(provider, task)
    timed(subject, 1)
    evidence = subject.evidence()
    timed(subject, warmup - 1)
    reset_peak()
    answer(evidence=evidence, backend=subject.backend())
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "run":
            answer(seconds=timed(subject, int(count)))
        elif command == "memory":
            answer(peak_mb=peak_mb())
        else:
            answer(**parts.measure(subject.step, PROFILED, subject.networks))


def timed(subject: Any, iterations: int) -> float:
    """Seconds that the iterations take until the device has finished them."""
    synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        subject.step()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets Linux's high-water mark to the present size
    except OSError as error:
        print(f"peak memory includes set-up and warm-up: {error}", file=sys.stderr)


def peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
