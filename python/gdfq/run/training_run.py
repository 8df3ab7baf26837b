"""Carry a `Trainer` through to its end: log, checkpoints, resume, and a clean stop."""

import time
from pathlib import Path

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.progress import Estimate, say
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import find_checkpoint, save_checkpoint
from gdfq.run.monitor import Monitor, disk_errors, stop_requests
from gdfq.train.trainer import Trainer


class Stopped(GdfqError):  # noqa: N818 - it is a request that was met
    """Ctrl-C or SIGTERM: the run stopped between two iterations. The message says how to go on."""


class TrainingRun:
    """A trainer in the folder of its run.

    Args:
        trainer: trained in place.
        folder: of the run, or None: then nothing is written and nothing can be resumed. Of several ranks only the first
            has one, and all resume with what it reads.
        identity: JSON values that a checkpoint must have been saved with, see `gdfq.run.checkpoint`.

    Attributes:
        seconds: training time so far, sessions before a resume included.
    """

    def __init__(self, trainer: Trainer, folder: Path | None, identity: dict) -> None:
        self.trainer = trainer
        self.folder = folder
        self.identity = identity
        self.seconds = 0.0

    def resume(self) -> None:
        """Continue from the last checkpoint; from the start if the run was killed before its first."""
        path = self.folder and self.folder / run_folder.CHECKPOINT
        state = find_checkpoint(path, self.identity)
        if state is not None:
            self.trainer.load_state_dict(state["trainer"])
            self.seconds = state["seconds"]

    def train(self, progress: bool) -> None:
        """Train to the end.

        Raises:
            Stopped: between two iterations, after a checkpoint.
            GdfqError: NaN or Inf in losses or ranges, or a file that cannot be written.
        """
        run, trainer = self.trainer.config.run, self.trainer
        monitor = Monitor(self.folder, trainer.total_iterations, trainer.iteration, progress)
        if progress and trainer.iteration:
            say(f"goes on after iteration {trainer.iteration:,} of {trainer.total_iterations:,}")
        estimate = Estimate(trainer.config, trainer.device) if progress else None
        with stop_requests() as stop_requested, disk_errors(self.folder), monitor:
            start = time.monotonic() - self.seconds

            def after_iteration() -> None:
                done, finished = trainer.iteration, trainer.iteration == trainer.total_iterations
                self.seconds = time.monotonic() - start
                monitor.advance()
                if estimate is not None:
                    estimate.after(done)
                if done % run.log_every == 0 or finished:
                    how = trainer.runner.description
                    monitor.write(done, trainer.epoch, trainer.phase, how, trainer.read_metrics())
                is_stopped = ranks.any_of(stop_requested.is_set())
                if done % run.checkpoint_every == 0 or finished or is_stopped:
                    self._save()
                if is_stopped and not finished:
                    raise Stopped(ranks.from_first(self._how_to_go_on))

            trainer.run(after_iteration)

    def _save(self) -> None:
        if self.folder is not None:
            state = {"trainer": self.trainer.state_dict(), "seconds": self.seconds}
            save_checkpoint(self.folder / run_folder.CHECKPOINT, state, self.identity)

    def _how_to_go_on(self) -> str:
        where = f"stopped after iteration {self.trainer.iteration} of {self.trainer.total_iterations}"
        if self.folder is None:
            return f"{where}; nothing was saved, since the run has no folder"
        return f"{where}; everything is saved. To go on: gdfq quantize --resume {self.folder}"
