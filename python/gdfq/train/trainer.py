"""Algorithm 1 of the paper: the quantized model trained against the frozen teacher, in turns with its images' source.

Every iteration asks the source for a batch, which may learn from it first, and steps Q on it. Three phases, by epoch:

1. ranges (`range_epochs`): Q is run only to observe its activation ranges;
2. warm-up (`warmup_epochs`): only the source learns, and Q is not run at all once its ranges are fixed;
3. alternate training.

All state that an iteration reads or writes is in `Trainer.state_dict()`, so that a resumed run continues bit for bit.
All of it is in tensors that are written in place, so that an iteration can be a CUDA graph.
"""

import copy
import operator
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.calibrate import calibrate, end_pass
from gdfq.config import Config
from gdfq.evaluate import Agreement, agreement
from gdfq.graph import Teacher
from gdfq.images.source import ImageSource
from gdfq.memory import explained
from gdfq.nn import moving_statistics, observing, to_channels_last
from gdfq.objective import Averages, Outputs, check_finite, student_objective
from gdfq.optim import load_optimizer_state, set_rates
from gdfq.precision import autocast, products_in_tf32
from gdfq.registry import OPTIMIZERS
from gdfq.train.cuda_graph import IterationRunner


class Trainer:
    """Holds Q, its optimizer, the source of its images, and everything else that training changes.

    Args:
        teacher: P, frozen.
        student: Q, from `gdfq.graph.build_quantized`; trained in place.
        source: of the images.
        config: sections `student`, `schedule`, `run` are read.

    Attributes:
        iteration: how many are done.
        choice: the epoch (from 1) that a data-free criterion, agreement of Q with P on held-out images, would choose,
            and its figures. It decides nothing: it is reported beside the last epoch.
        choice_state: the student's state dict then.
        runner: how iterations are carried out; its `description` says so in words.
    """

    def __init__(self, teacher: Teacher, student: fx.GraphModule, source: ImageSource, config: Config) -> None:
        self.teacher = teacher
        self.student = student
        self.source = source
        self.config = config
        self.device = next(student.parameters()).device
        if config.run.channels_last:
            for model in (teacher, student):
                to_channels_last(model)
        self.objective = student_objective(config.student)
        source.set_reads(self.objective.reads)
        self.averages = Averages(self.objective.names, self.device)
        self.optimizer = OPTIMIZERS[config.student.optimizer](student, config)
        obstacle = source.obstacle or getattr(self.optimizer, "obstacle", None)
        ranks.check_batch("schedule.batch_size", config.schedule.batch_size)
        self.runner = IterationRunner(config.run.cuda_graph, self.device, source.random, obstacle)
        if config.run.compile:
            self._forward = torch.compile(self._forward, dynamic=False)
        self.iteration = 0
        self.choice: tuple[int, Agreement] | None = None
        self.choice_state: dict[str, Tensor] = {}

    # --- where in the schedule ---

    @property
    def total_iterations(self) -> int:
        return self.config.schedule.epochs * self.config.schedule.iterations

    @property
    def epoch(self) -> int:
        """Counted from 0; equal to `schedule.epochs` when training is over."""
        return self.iteration // self.config.schedule.iterations

    @property
    def phase(self) -> str:
        schedule = self.config.schedule
        if self.epoch < schedule.range_epochs:
            return "ranges"
        return "warm-up" if self.epoch < schedule.warmup_epochs else "training"

    # --- Algorithm 1 ---

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> None:
        """Train from where `iteration` stands to the end; the callback may look, save, or raise to stop."""
        while self.iteration < self.total_iterations:
            if self.iteration % self.config.schedule.iterations == 0:
                self._begin_epoch()
            self.step()
            self.iteration += 1
            if self.iteration % self.config.schedule.iterations == 0:
                self._end_epoch()
            after_iteration()

    def step(self) -> None:
        """One iteration of the phase that it belongs to."""
        kind = (self.phase, self.source.learns)
        self.runner.run(kind, lambda: self._iteration(*kind))

    def _begin_epoch(self) -> None:
        schedule = self.config.schedule
        rate = schedule.decay ** sum(self.epoch >= milestone for milestone in schedule.milestones)
        self.source.begin_epoch(self.epoch, rate)
        set_rates(self.optimizer, rate)
        if self.epoch == schedule.range_epochs:
            end_pass(self.student)
        if self.epoch == max(schedule.warmup_epochs, schedule.range_epochs) and schedule.reestimate_ranges:
            calibrate(self.student, self.source.batches(schedule.range_images))

    def _iteration(self, phase: str, learns: bool) -> None:
        """What the device does in one iteration, and nothing else: Python is not here when a graph is replayed."""
        with products_in_tf32(self.config.run.precision == "tf32"):
            count = self.config.schedule.batch_size
            batch = self.source.step(count) if learns else self.source.draw(count)
            if phase == "training":
                self._student_step(batch)
            elif phase == "ranges":
                with torch.no_grad(), observing(self.student), self._autocast():
                    self.student(batch.images)

    def _student_step(self, batch: Batch) -> None:
        """A step of Q, with the teacher's logits as soft targets."""
        with nullcontext() if self.config.student.fixed_bns else moving_statistics(self.student):
            loss, logged = self._forward(batch)
        self.optimizer.zero_grad()
        with ranks.adding_up_gradients(self.optimizer, logged):
            loss.backward()
        self.optimizer.step()
        self.averages.add(logged)

    def _forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        with self._autocast():
            logits = self.student(batch.images)
        return self.objective(Outputs(batch, logits, batch.readings))

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.run.precision, self.device)

    def _end_epoch(self) -> None:
        """Note what the data-free criterion says of an epoch in which Q was trained."""
        schedule = self.config.schedule
        self.source.end_epoch()
        if self.epoch <= max(schedule.warmup_epochs, schedule.range_epochs):
            return
        figures = self.held_out_agreement()
        if self.choice is None or figures.top1 > self.choice[1].top1:
            self.choice = (self.epoch, figures)
            self.choice_state = copy.deepcopy(self.student.state_dict())

    def held_out_agreement(self) -> Agreement:
        name = self.source.held_out_setting
        with explained("comparing Q with P on held-out images", {name: operator.attrgetter(name)(self.config)}):
            return agreement(self.teacher, self.student, self.source.held_out())

    def read_metrics(self) -> dict[str, float | None]:
        """Means since the last call; None for what was not trained. The device is waited for here, and nowhere else.

        Raises:
            GdfqError: a loss is NaN or infinite.
        """
        metrics = self.source.read_metrics() | self.averages.read()
        check_finite(metrics, self.iteration)
        return metrics

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: tensors, numbers and nested dicts of them."""
        return {
            "source": self.source.state_dict(),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "iteration": self.iteration,
            "sums": self.averages.sums,
            "choice": None if self.choice is None else [self.choice[0], *vars(self.choice[1]).values()],
            "choice_state": self.choice_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, into a trainer made from the same model and configuration."""
        self.source.load_state_dict(state["source"])
        self.student.load_state_dict(state["student"])
        self.student.to(self.device)  # stored weights come from the file's device
        load_optimizer_state(self.optimizer, state["optimizer"], self.device)
        self.iteration = state["iteration"]
        self.averages.sums.copy_(state["sums"])
        self.choice = None if state["choice"] is None else (state["choice"][0], Agreement(*state["choice"][1:]))
        self.choice_state = state["choice_state"]
        self.runner.restart()
