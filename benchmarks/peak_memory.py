"""Peak memory of one iteration by batch, with activations kept for backward and with them computed again there.

    python -m benchmarks.peak_memory --out DIR
    python -m benchmarks.peak_memory --out DIR --networks resnet18 --batches 4 8 16

DIR/peak_memory.json has the figures. On a CPU the peak is the whole process, Python and torch included, and memory that
is freed goes back to the system at once, which takes time: times are those of `benchmarks.step`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import step
from benchmarks.step_providers import Task, new_task
from benchmarks.step_suite import NETWORKS
from gdfq.errors import GdfqError
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

PROVIDERS = ("ours", "ours-checkpointing")
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}  # of glibc, in bytes


def measure(networks: list[str], batches: list[int], image_size: int | None, threads: int) -> dict[str, Any]:
    """MB by network, batch and provider, one process at a time.

    Raises:
        RuntimeError: one cannot be measured.
    """
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in networks}
    for name in networks:
        for batch in batches:
            print(f"{name}, batch {batch}", file=sys.stderr, flush=True)
            task = new_task(NETWORKS[name].model, image_size, preset=NETWORKS[name].preset, batch=batch)
            found[name][batch] = {provider: _peak(provider, task, threads) for provider in PROVIDERS}
    return {**provenance(threads), "peak_memory_mb": found}


def _peak(provider: str, task: Task, threads: int) -> float:
    plan = step.Plan((provider,), 1, repeat=1, warmup=2, threads=threads, tolerance=0.0, student_tolerance=0.0)
    return step.measure(task, plan)["providers"][provider]["peak_memory_mb"]


def table(result: dict[str, Any]) -> str:
    lines = [describe(result)]
    for name, batches in result["peak_memory_mb"].items():
        lines += ["", f"{name}, MB", f"{'batch':>6} {'kept':>8} {'again':>8} {'saved':>8}"]
        for batch, peaks in batches.items():
            kept, again = (peaks[provider] for provider in PROVIDERS)
            lines.append(f"{batch:6} {kept:8.0f} {again:8.0f} {kept - again:8.0f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peak_memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "resnet18"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32], help="default: 4 8 16 32")
    parser.add_argument("--image-size", type=int, help="default: what the network says")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    os.environ.update(RETURN_FREED_MEMORY)
    try:
        result = measure(args.networks, args.batches, args.image_size, args.threads)
        print(table(result))
        write_text(args.out / "peak_memory.json", json.dumps(result, indent=2) + "\n")
    except (RuntimeError, GdfqError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    step.end_on_sigterm()
    sys.exit(main())
