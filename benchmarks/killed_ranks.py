"""Is more lost than the work since the last checkpoint when ranks are killed at random moments?

    python -m benchmarks.killed_ranks --kills 50 --out killed_ranks.json

A small network with random weights is trained by GDFQ: once by one process without a disturbance; and by one or two
processes (gloo) of which a random one is killed (SIGKILL) a random time after all have joined, over and over. Each time
the others have to end by themselves with a message that names it, the checkpoint has to load, and the run goes on with
a random number of processes. A run that comes to its end is compared with the undisturbed one, and another begins.
Exit code 1 if a rank did not end, did not name the one that was gone, if more was lost, or if results are further apart
than --tolerance.
"""

import argparse
import functools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.tensorboard  # once for all ranks
from torch import nn

from benchmarks.accuracy_in_time import last_entry
from benchmarks.step_providers import fit_batch_norm
from gdfq import ranks
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import CapturedModel, build_quantized, build_teacher, capture
from gdfq.methods.method import Task
from gdfq.methods.training import source_of, train
from gdfq.provenance import describe, provenance
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import load_checkpoint
from gdfq.run.files import load_tensors, write_text

PATIENCE = 60.0  # seconds in which the others have to end
CHECKPOINT_EVERY = 5
PROCESSES = multiprocessing.get_context("fork")  # the network is captured once for all


@functools.cache
def network() -> CapturedModel:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    return capture(fit_batch_norm(model, 8), 8)


def settings(iterations: int) -> Config:
    return Config.load("cifar", {
        "method": "gdfq", "schedule.epochs": 4, "schedule.iterations": iterations // 4, "schedule.batch_size": 9,
        "schedule.range_epochs": 1, "schedule.warmup_epochs": 2, "schedule.range_batches": 2,
        "schedule.milestones": [3], "run.held_out_images": 18, "run.log_every": 1, "run.device": "cpu",
        "run.checkpoint_every": CHECKPOINT_EVERY,
    })  # fmt: skip


def be_rank(rank: int, count: int, session: Path, run: Path, iterations: int) -> None:
    """Be a rank of a run that begins, or goes on if there is a checkpoint; how it ended goes to a file."""
    torch.set_num_threads(1)
    if count > 1:
        method, timeout = f"file://{session}/group", timedelta(minutes=5)
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=count, timeout=timeout)
    config, captured = settings(iterations), network()
    try:
        with ranks.one_run():
            (session / f"{rank}.joined").touch()
            folder = run if ranks.is_first() else None
            student, _ = build_quantized(captured, config.quantizer)
            task = Task(
                captured, build_teacher(captured), student, config, torch.device("cpu"), folder, True, False, None, None
            )
            train(task, source_of(task, "generator"), config)
        words = "finished"
    except GdfqError as error:
        words = str(error)
    write_text(session / f"{rank}.txt", words)


class Session:
    """So many ranks that go on with a run.

    Args:
        folder: for what they leave, new.
    """

    def __init__(self, count: int, folder: Path, run: Path, iterations: int) -> None:
        folder.mkdir(parents=True)
        run.mkdir(exist_ok=True)
        self.folder = folder
        self.processes = [
            PROCESSES.Process(target=be_rank, args=(rank, count, folder, run, iterations)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int, after: float) -> bool:
        """So many seconds after all have joined; false if the rank has ended before."""
        while len(list(self.folder.glob("*.joined"))) < len(self.processes):
            time.sleep(0.01)
        self.processes[rank].join(after)
        is_alive = self.processes[rank].is_alive()
        self.processes[rank].kill()
        return is_alive

    def end(self, patience: float | None = None) -> tuple[float, bool]:
        """Seconds until all ranks have ended, and whether they did in so many.

        Raises:
            RuntimeError: one of them by a defect.
        """
        start = time.monotonic()
        for process in self.processes:
            process.join(None if patience is None else max(0.0, patience - (time.monotonic() - start)))
        seconds, ended = time.monotonic() - start, not any(process.is_alive() for process in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        if any(process.exitcode > 0 for process in self.processes):
            raise RuntimeError("a rank has ended by an error that is none of gdfq's; its traceback is above")
        return seconds, ended

    def words(self) -> list[str]:
        """What those that were not killed said."""
        return [path.read_text() for path in sorted(self.folder.glob("*.txt"))]


def saved(run: Path) -> int:
    """Iterations that the checkpoint has, 0 where there is none yet. Raises `GdfqError` where it does not load."""
    path = run / run_folder.CHECKPOINT
    if not path.exists():
        return 0
    return load_checkpoint(path, json.loads(load_tensors(path)[1]["identity"]))["trainer"]["iteration"]


def distance(one: Path, other: Path) -> float:
    """Of all that two checkpoints hold, squared differences to squares, the root of it."""
    (tensors, _), (others, _) = (load_tensors(run / run_folder.CHECKPOINT) for run in (one, other))
    assert tensors.keys() == others.keys()
    names = [name for name, value in tensors.items() if value.is_floating_point() and value.isfinite().all()]
    difference = sum((tensors[name].double() - others[name].double()).square().sum().item() for name in names)
    return (difference / sum(others[name].double().square().sum().item() for name in names)) ** 0.5


def measure(folder: Path, kills: int, longest: float, iterations: int, seed: int) -> dict[str, Any]:
    """Every kill, and how far runs have come out from the undisturbed one."""
    network()
    chance, whole = random.Random(seed), folder / "whole"
    Session(1, folder / "session", whole, iterations).end()
    noted: list[dict[str, Any]] = []
    apart: list[float] = []
    sessions = 0
    run = folder / "run-0"
    while len(noted) < kills or saved(run) < iterations:
        run = folder / f"run-{len(apart)}"
        count, before = chance.choice((1, 2)), saved(run)
        victim, after = chance.randrange(count), chance.uniform(0, longest)
        sessions += 1
        session = Session(count, folder / f"session-{sessions}", run, iterations)
        was_killed = len(noted) < kills and session.kill(victim, after)
        seconds, ended = session.end(PATIENCE if was_killed else None)
        kept = saved(run)
        if was_killed:
            words = session.words()
            said = len(words) == count - 1 and all(f"rank {victim} of {count}" in text for text in words)
            noted.append({
                "ranks": count, "killed": victim, "after_seconds": after, "others_ended_after": seconds,
                "ended": ended, "named": said or kept == iterations, "words": words,
                "begun_at": before, "reached": last_entry(run).get("iteration", 0), "saved": kept,
            })  # fmt: skip
            print(json.dumps(noted[-1]), flush=True)
        if kept == iterations:
            apart.append(distance(run, whole))
    return {"kills": noted, "runs": len(apart), "apart": apart}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.killed_ranks", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--longest", type=float, default=4.0, help="seconds until a rank is killed (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=400, help="of a run, a multiple of 20 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of moments, ranks and their numbers")
    parser.add_argument("--tolerance", type=float, default=0.05, help="default: %(default)s, see `distance`")
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args.kills, args.longest, args.iterations, args.seed)
    kills = measured["kills"]
    lost = max(kill["reached"] - kill["saved"] for kill in kills)
    result = {
        **provenance(1), "longest": args.longest,
        "iterations": args.iterations, "checkpoint_every": CHECKPOINT_EVERY, "seed": args.seed,
        "slowest_end": max(kill["others_ended_after"] for kill in kills), "most_lost": lost, **measured,
    }  # fmt: skip
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    wrong = [kill for kill in kills if not kill["ended"] or not kill["named"] or kill["saved"] < kill["begun_at"]]
    print(
        f"{len(kills)} kills, {len(wrong)} of them with ranks that did not end, did not name the one that was gone or "
        f"lost what was saved; the others had ended after {result['slowest_end']:.1f} s at most; lost were {lost} "
        f"iterations at most, of {CHECKPOINT_EVERY} between checkpoints; {measured['runs']} runs came to their end, "
        f"{max(measured['apart']):.2g} apart at most\n{describe(result)}"
    )
    return int(bool(wrong) or lost > CHECKPOINT_EVERY or max(measured["apart"]) > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
