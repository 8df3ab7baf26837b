"""One iteration of this tree and of another one (a worktree of an older commit, built in place), in turns.

    python -m benchmarks.step_of_trees OTHER --rounds 20

Says how much longer an iteration takes here: the median over the rounds of the ratio within a round.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.step import Worker
from benchmarks.step_providers import new_task

HERE = Path(__file__).parents[1]
WARMUP = 3


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
    task = new_task(args.model, batch=args.batch)
    workers = [Worker(args.provider, task, WARMUP, args.threads, tree.absolute()) for tree in (args.other, HERE)]
    for worker in workers:
        worker.answer()
    rounds = []
    for number in range(args.rounds):
        order = workers if number % 2 else workers[::-1]
        seconds = {worker: worker.ask(f"run {args.iterations}")["seconds"] / args.iterations for worker in order}
        rounds.append([seconds[worker] for worker in workers])
    for worker in workers:
        worker.close()
    other, here = (1e3 * statistics.median(values) for values in zip(*rounds, strict=True))
    ratios = sorted(here / other for other, here in rounds)
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"other {other:.1f} ms, here {here:.1f} ms an iteration; here / other: median {quartiles[1]:.3f}, "
        f"quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {args.rounds} rounds in turns"
    )


if __name__ == "__main__":
    main()
