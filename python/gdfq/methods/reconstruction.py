"""Block reconstruction on images that are made of the network: see `gdfq.train.reconstruct`.

First the bank of images, activation ranges from it and the rounding to begin with; then block after block.
A run is saved after every one of them, and goes on with the next.
"""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gdfq import ranks
from gdfq.calibrate import calibrate
from gdfq.clip_values import mse
from gdfq.config import Config, Section
from gdfq.errors import GdfqError
from gdfq.graph.blocks import Block, find_blocks
from gdfq.images.bank import seed_of_part
from gdfq.memory import explained, images_at_once
from gdfq.methods.calibration import clipped_by
from gdfq.methods.method import Method, Outcome, Task, source_name
from gdfq.methods.squant import rounding
from gdfq.methods.training import bank_of, identity
from gdfq.nn import per_channel, to_channels_last
from gdfq.progress import LONG_ON_A_CPU, Pace, say, say_what_is_left
from gdfq.random_state import RandomState
from gdfq.registry import SECTIONS
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import find_checkpoint, save_checkpoint
from gdfq.run.monitor import Monitor, disk_errors, stop_requests
from gdfq.run.training_run import Stopped
from gdfq.train.activations import Activations, Store
from gdfq.train.finetune import FineTuner
from gdfq.train.reconstruct import BlockTrainer
from gdfq_ext import Grid

AT_ONCE = 64  # images in a pass without gradients
WORSE = 1.01  # the KL of Q to the one before, above which it is worse by more than rounding


class ReconstructionConfig(Section):
    """Block reconstruction: how long, how fast, and with what chances."""

    iterations: int = Field(400, ge=1, description="of each block")
    batch_size: int = Field(32, ge=1)
    begin: Literal["squant", "nearest"] = Field("squant", description="the rounding that is learned begins there")
    rounding_learning_rate: float = Field(1e-2, gt=0, description="of Adam")
    step_learning_rate: float = Field(1.2e-2, ge=0, description="of Adam, as a share of each activation's step")
    ranges: Literal["minmax", "mse"] = Field(
        "mse", description="of activations, to begin with: all values, or those with the least squared error"
    )
    keep: float = Field(
        0.5, ge=0, le=1, description="the chance with which an activation stays as it is in training (QDrop)"
    )
    penalty_weight: float = Field(1.0, ge=0, description="of what roundings pay for being neither up nor down")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the iterations before they do")
    finetune_iterations: int = Field(300, ge=0, description="of all blocks together in the end")
    finetune_learning_rate: float = Field(
        0.02, gt=0, description="of Adam there, as a share of each weight's step, with 2 bits of that with 3"
    )
    finetune_step_learning_rate: float = Field(0.03, ge=0, description="the same, of each activation's step")
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="for the activations of all images at a block's two ends; what is more goes to a file; default: an "
        "eighth of the machine's, shared by its ranks, or a quarter of the GPU's",
    )


class Reconstruction:
    """Q's blocks, and how far their training is.

    Args:
        task: whose student is trained in place.
        images: the bank, `(N, C, H, W)`.
    """

    def __init__(self, task: Task, images: Tensor) -> None:
        self.task, self.images = task, images
        self.settings: ReconstructionConfig = task.config.reconstruction
        self.student = task.student
        self.blocks = find_blocks(task.student)
        self.identity = identity(task.captured, task.config)
        self.done = 0
        self.seconds = 0.0
        self.iterations = "eager"

    def resume(self) -> bool:
        """Go on behind the last block that was finished; false where there is none yet."""
        path = self.task.folder and self.task.folder / run_folder.BLOCKS
        state = find_checkpoint(path, self.identity)
        if state is None:
            return False
        self.student.load_state_dict(state["student"])
        self.student.to(self.task.device)
        self.done, self.seconds = state["blocks"], state["seconds"]
        return True

    def run(self) -> None:
        """Train the blocks that are left.

        Raises:
            Stopped: within a block, which is begun anew when the run goes on.
            GdfqError: activations became NaN or infinite, or a file cannot be written.
        """
        task, count = self.task, self.settings.iterations
        total = len(self.blocks) * count + self.settings.finetune_iterations
        monitor = Monitor(task.folder, total, self.done * count, task.progress)
        if task.progress and self.done:
            say(f"goes on behind block {self.done} of {len(self.blocks)}")
        pace = Pace()
        with Store(self._budget(), task.folder) as store, stop_requests() as stop, disk_errors(task.folder), monitor:
            start = time.monotonic() - self.seconds

            def after_iteration() -> None:
                monitor.advance()
                if ranks.any_of(stop.is_set()):
                    raise Stopped(ranks.from_first(self._how_to_go_on))

            self.student.requires_grad_(False)
            given = exact = store.keep(len(self.images), iter(self.images.split(self._at_once)))
            for number, block in enumerate(self.blocks):
                with explained(f"reconstructing the block of '{block.name}'", self._sizes(), task.folder):
                    wanted = store.keep(len(exact), self._through(block.exact(), exact))
                    self._check_budget(block, given, wanted)
                    if number >= self.done:
                        pace.begin()
                        self._train(block, number, given, exact, wanted, after_iteration)
                    given, exact = store.keep(len(given), self._through(block.quantized(), given)), wanted
                if number >= self.done:
                    self.done, self.seconds = number + 1, time.monotonic() - start
                    error = {"reconstruction/error": _relative_error(given, wanted, self._at_once, block)}
                    monitor.write(self.done * count, number, block.name, self.iterations, error)
                    self._save()
                    self._say_what_is_left(pace.tick())
            del given, exact, wanted
            if self.settings.finetune_iterations:
                self._finetune(after_iteration, monitor)
            for parameter in self.student.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            self.seconds = time.monotonic() - start

    def _train(
        self,
        block: Block,
        number: int,
        given: Activations,
        exact: Activations,
        wanted: Activations,
        after_iteration: Callable[[], None],
    ) -> None:
        state, begin = self._random(number), BEGINNINGS[self.settings.begin]
        trainer = BlockTrainer(block, self.task.config, given, exact, wanted, state, begin)
        trainer.run(after_iteration)
        self.iterations = trainer.runner.description

    def _finetune(self, after_iteration: Callable[[], None], monitor: Monitor) -> None:
        """All blocks together; what makes Q worse than its blocks alone is undone.

        Moved and blended images of the bank tell: the images themselves are what each block was fitted to, and on them
        Q is hardly ever better in the end.
        """
        alone = {name: value.clone() for name, value in self.student.state_dict().items()}
        quantizers = dict.fromkeys(quantizer for block in self.blocks for quantizer in block.quantizers)
        state = self._random(len(self.blocks))
        tuner = FineTuner(self.task.teacher, self.student, quantizers, self.images, self.task.config, state)
        with explained("fine-tuning all blocks together", self._sizes(), self.task.folder):
            before = tuner.divergence(self._random(len(self.blocks) + 1))
            tuner.run(after_iteration)
            after = tuner.divergence(self._random(len(self.blocks) + 1))
        is_worse = not after <= WORSE * before  # or NaN
        if is_worse:
            self.student.load_state_dict(alone)
            warnings.warn(
                f"all blocks trained together, Q was further from P than before (KL {before:.3g}, then {after:.3g} on "
                "moved and blended images), so that this was undone: lower reconstruction.finetune_learning_rate and "
                "reconstruction.finetune_step_learning_rate, or set reconstruction.finetune_iterations to 0",
                stacklevel=4,
            )
        self.iterations = tuner.runner.description
        done = len(self.blocks) * self.settings.iterations + self.settings.finetune_iterations
        loss = {} if is_worse else {"finetune/kl": tuner.loss.item()}
        monitor.write(done, len(self.blocks), "all blocks", self.iterations, loss)

    def _random(self, number: int) -> RandomState:
        """A block's own, so that a run that goes on does as one that never stopped."""
        return RandomState(seed_of_part(self.task.config, number), self.task.device)

    @torch.no_grad()
    def _through(self, module: nn.Module, activations: Activations) -> Iterator[Tensor]:
        for batch in activations.batches(self._at_once, self.task.device):
            yield module(batch)

    @property
    def _at_once(self) -> int:
        return min(images_at_once(*self.task.captured.image_shape[1:]), AT_ONCE)

    def _say_what_is_left(self, seconds: float | None) -> None:
        """A block takes so long, if that is known."""
        if not self.task.progress:
            return
        before = "until all blocks are trained together: " if self.settings.finetune_iterations else ""
        left = say_what_is_left(before, len(self.blocks) - self.done, "blocks", seconds)
        if left > LONG_ON_A_CPU and self.task.device.type == "cpu":
            say("that is long for a CPU: a new run with fewer reconstruction.iterations, or on a GPU, takes less")

    def _save(self) -> None:
        if self.task.folder is not None:
            state = {"student": self.student.state_dict(), "blocks": self.done, "seconds": self.seconds}
            save_checkpoint(self.task.folder / run_folder.BLOCKS, state, self.identity)

    def _how_to_go_on(self) -> str:
        total = len(self.blocks)
        where = f"block {self.done + 1} of {total}" if self.done < total else "the training of all blocks together"
        if self.task.folder is None:
            return f"stopped in {where}; nothing was saved, since the run has no folder"
        return (
            f"stopped in {where}; the blocks before it are saved. To go on: gdfq quantize --resume {self.task.folder}"
        )

    def _budget(self) -> int:
        """Bytes for activations."""
        if self.settings.memory_gib is not None:
            return int(self.settings.memory_gib * 2**30)
        if self.task.device.type == "cuda":
            return torch.cuda.mem_get_info(self.task.device)[1] // 4
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 // ranks.on_this_machine()

    def _check_budget(self, block: Block, given: Activations, wanted: Activations) -> None:
        needed = 4 * self.settings.batch_size * (2 * given.rows[0].numel() + wanted.rows[0].numel())
        if needed > self._budget():
            raise GdfqError(
                f"setting 'reconstruction.memory_gib' = {self.settings.memory_gib} holds no batch of "
                f"{self.settings.batch_size} images at the block of '{block.name}', which takes {needed / 2**30:.3f}: "
                "raise it, or lower reconstruction.batch_size"
            )

    def _sizes(self) -> dict[str, Any]:
        return {"reconstruction.batch_size": self.settings.batch_size, "images": len(self.images)}


def reconstruct(task: Task) -> Outcome:
    start = time.monotonic()
    ranks.check_batch("reconstruction.batch_size", task.config.reconstruction.batch_size)
    source = bank_of(task)
    to_channels_last(task.student)
    run = Reconstruction(task, source.bank)
    if not (task.resume and run.resume()):
        observer = clipped_by(mse, task.student) if run.settings.ranges == "mse" else None
        calibrate(task.student, source.calibration(), observer)
    made = time.monotonic() - start
    run.run()
    seconds = made + run.seconds
    return Outcome(source.held_out(), seconds, bank=source.bank, selected="trained", iterations=run.iterations)


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """The rounding to the nearest, added to floor(weight / step)."""
    in_steps = weight / per_channel(grid.step, weight)
    return in_steps.round() - in_steps.floor()


BEGINNINGS = {"squant": rounding, "nearest": nearest}


def _relative_error(given: Activations, wanted: Activations, at_once: int, block: Block) -> float:
    """Of Q's block, squared, to the square of what P's gives."""
    device = torch.device("cpu")
    error = square = 0.0
    for q, p in zip(given.batches(at_once, device), wanted.batches(at_once, device), strict=True):
        error += (q - p).square().sum().item()
        square += p.square().sum().item()
    if not math.isfinite(error):
        raise GdfqError(
            f"what the block of '{block.name}' gives became NaN or infinite: lower "
            "reconstruction.rounding_learning_rate or reconstruction.step_learning_rate, and check the model's weights"
        )
    return error / max(square, 1e-30)


def amount(config: Config) -> str:
    own: ReconstructionConfig = config.reconstruction
    is_made = config.images.file is None and source_name(config) == "inverted"
    bank = f"a bank of {config.inversion.images:,}, " if is_made else ""
    together = f", then {own.finetune_iterations:,} of all together" if own.finetune_iterations else ""
    return f"{bank}{own.iterations:,} iterations of {own.batch_size} images for each block{together}"


SECTIONS["reconstruction"] = ReconstructionConfig
RECONSTRUCTION = Method(
    "reconstruction",
    "roundings and steps trained block by block, on images optimized to fit the network (default)",
    reconstruct,
    source="inverted",
    amount=amount,
    sizes=("reconstruction.batch_size", "inversion.images", "inversion.batch_size", "run.checkpointing"),
)
