"""What does an iteration of GDFQ cost on several ranks: its time against one process, and what they exchange?

    python -m benchmarks.ranks --out ranks.json
    python -m benchmarks.ranks --ranks 1 2 4 --model pytorchcv:resnet18 --image-size 224 --batch 16 --out ranks.json

Every number of ranks is a group of processes (gloo, on the CPU) that share the same batch. All groups are there from
the beginning and wait except in their turn: in each round each does --repeat iterations. Bytes are those that one rank
hands over, by what for; a ring of n ranks sends 2 (n - 1) / n of them over each rank's line.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step_providers import Task, new_task, new_trainer
from gdfq import ranks
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

WARMUP = 3


def be_rank(rank: int, count: int, folder: str, task: Task, threads: int, orders: Connection) -> None:
    """Do as many iterations as each order says, until one says none; answer with seconds, bytes and exchanges."""
    torch.set_num_threads(threads)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{count}", rank=rank, world_size=count)
    with ranks.one_run():
        trainer = new_trainer(task)
        for _ in range(WARMUP):
            trainer.step()
        orders.send(trainer.read_metrics())
        while repeat := orders.recv():
            before = Counter(ranks.traffic), Counter(ranks.exchanges)
            start = time.perf_counter()
            for _ in range(repeat):
                trainer.step()
            seconds = time.perf_counter() - start
            orders.send((seconds, ranks.traffic - before[0], ranks.exchanges - before[1]))


class Group:
    """So many ranks, each a process.

    Attributes:
        metrics: after the warm-up.
    """

    def __init__(self, count: int, folder: str, task: Task, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=be_rank, args=(rank, count, folder, task, threads, there), daemon=True)
            process.start()
            there.close()  # so that reading fails when the process is gone
            self.pipes.append(here)
            self.processes.append(process)
        self.metrics, *_ = [pipe.recv() for pipe in self.pipes]

    def run(self, repeat: int) -> list[tuple[float, Counter[str], Counter[str]]]:
        for pipe in self.pipes:
            pipe.send(repeat)
        return [pipe.recv() for pipe in self.pipes]

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)
        for process in self.processes:
            process.join()


def measure(task: Task, counts: list[int], rounds: int, repeat: int, threads: int) -> dict[str, Any]:
    """Of each number of ranks: milliseconds of an iteration by round, bytes and exchanges of one, metrics."""
    with tempfile.TemporaryDirectory() as folder:
        groups = {count: Group(count, folder, task, threads) for count in counts}
        times: dict[int, list[float]] = {count: [] for count in counts}
        last: dict[int, Any] = {}
        for _ in range(rounds):
            for count, group in groups.items():
                answers = group.run(repeat)
                times[count].append(1000 * max(seconds for seconds, *_ in answers) / repeat)
                last[count] = answers[0]
        for group in groups.values():
            group.end()
    return {
        str(count): {
            "ms": times[count],
            "bytes": {what: number / repeat for what, number in last[count][1].items()},
            "exchanges": {what: number / repeat for what, number in last[count][2].items()},
            "metrics": groups[count].metrics,
        }
        for count in counts
    }


def table(result: dict[str, Any]) -> str:
    lines = [describe(result), f"{'ranks':>5} {'median ms':>10} {'p20':>9} {'p80':>9} {'/ one':>6}"]
    alone = next(iter(result["ranks"].values()))["ms"]
    for count, group in result["ranks"].items():
        p20, median, p80 = (statistics.quantiles(group["ms"], n=10)[place] for place in (1, 4, 7))
        ratio = statistics.median(own / one for own, one in zip(group["ms"], alone, strict=True))
        lines.append(f"{count:>5} {median:10.1f} {p20:9.1f} {p80:9.1f} {ratio:6.2f}")
    for count, group in result["ranks"].items():
        for what, number in group["bytes"].items():
            times = group["exchanges"][what]
            lines.append(f"{count:>5} ranks: {number / 1e3:10.1f} KB in {times:g} exchanges an iteration, {what}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="the first is compared to; default: 1 2")
    parser.add_argument("--model", default="demo", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, help="default: what the model says")
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeat", type=int, default=2, help="iterations in a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(arguments)
    if min(args.ranks) < 1 or args.batch < max(args.ranks) or args.rounds < 2 or args.repeat < 1:
        parser.error("allowed are --ranks from 1 to --batch, --rounds from 2, --repeat from 1")
    task = new_task(args.model, args.image_size, batch=args.batch)
    measured = measure(task, args.ranks, args.rounds, args.repeat, args.threads)
    result = {**provenance(args.threads), "model": args.model, "batch": args.batch, "ranks": measured}
    print(table(result))
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
