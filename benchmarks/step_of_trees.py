"""One iteration of this tree and of another one (a worktree of an older commit, built in place), in turns.

    python -m benchmarks.step_of_trees OTHER --rounds 20

Says how much longer an iteration takes here: the median over the rounds of the ratio within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.step_providers import new_task

HERE = Path(__file__).parents[1]
WARMUP = 3


class Worker:
    """`benchmarks.step_worker` of a tree."""

    def __init__(self, tree: Path, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((f"{tree}/python", str(tree)))}
        command = [sys.executable, "-m", "benchmarks.step_worker", *arguments]
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}")
        return json.loads(line)

    def seconds(self, iterations: int) -> float:
        assert self.process.stdin is not None
        print(f"run {iterations}", file=self.process.stdin, flush=True)
        return self.answer()["seconds"] / iterations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other tree")
    parser.add_argument("--model", default="demo", help="as for benchmarks.step; default: %(default)s")
    parser.add_argument("--provider", default="ours", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=2, help="in a round; default: %(default)s")
    args = parser.parse_args()
    task = json.dumps(asdict(new_task(args.model, batch=args.batch)))
    arguments = [args.provider, task, str(WARMUP), str(args.threads)]
    workers = [Worker(tree.absolute(), arguments) for tree in (args.other, HERE)]
    for worker in workers:
        worker.answer()
    rounds = []
    for number in range(args.rounds):
        order = workers if number % 2 else workers[::-1]
        seconds = {worker: worker.seconds(args.iterations) for worker in order}
        rounds.append([seconds[worker] for worker in workers])
    other, here = (1e3 * statistics.median(values) for values in zip(*rounds, strict=True))
    ratios = sorted(here / other for other, here in rounds)
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"other {other:.1f} ms, here {here:.1f} ms an iteration; here / other: median {quartiles[1]:.3f}, "
        f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {args.rounds} rounds in turns"
    )


if __name__ == "__main__":
    main()
