"""Algorithm 1 of the paper: a generator and the quantized model, trained in turns against the frozen teacher.

Every iteration draws noise and labels, steps G on CE + beta * BNS through the teacher, and then steps Q on the same
images with the teacher's logits as soft targets. Three phases, by epoch:

1. ranges (`range_epochs`): Q is run only to observe its activation ranges;
2. warm-up (`warmup_epochs`): only G is trained, and Q is not run at all once its ranges are fixed;
3. alternate training.

G may be fixed earlier, after `generator_epochs` or by the paper's stopping condition: then only Q goes on.

All state that an iteration reads or writes is in `Trainer.state_dict()`, so that a resumed run continues bit for bit.
All of it is in tensors that are written in place, so that an iteration can be a CUDA graph (see `gdfq.execution`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gdfq.calibrate import Agreement, agreement, calibrate, check_ranges
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.execution import Execution
from gdfq.generator import Generator, LatentSampler
from gdfq.graph import CapturedModel, Teacher
from gdfq.losses import GeneratorLoss, StudentLoss, generator_loss, student_loss
from gdfq.modules import moving_statistics, observing
from gdfq.precision import products_in_tf32


class Metrics(NamedTuple):
    """Means over the iterations since the last entry of the log.

    Attributes:
        generator_cross_entropy, bns: the parts of G's loss (Eq. 4, 5); None while G is not trained.
        generator_accuracy: share of generated images that the teacher classifies as their label, percent; likewise.
        student_cross_entropy, kl: the parts of Q's loss (Eq. 7 to 10); None while Q is not trained.
    """

    generator_cross_entropy: float | None
    bns: float | None
    generator_accuracy: float | None
    student_cross_entropy: float | None
    kl: float | None


class Trainer:
    """Holds G, Q, their optimizers and everything else that training changes.

    Args:
        teacher: P, frozen.
        student: Q, from `gdfq.graph.build_quantized`; trained in place.
        captured: what both were built from.
        config: sections `generator`, `student`, `schedule`, `run` are read.

    Attributes:
        iteration: how many are done.
        best: the epoch (from 1) at which a data-free criterion, agreement of Q with P on held-out synthetic images,
            was best, and its figures. It chooses nothing: it is reported beside the last epoch.
        generator_stopped: whether the stopping condition, `generator.stop_accuracy`, has been met.
        execution: how iterations are carried out; its `description` says so in words.
    """

    def __init__(self, teacher: Teacher, student: nn.Module, captured: CapturedModel, config: Config) -> None:
        self.teacher = teacher
        self.student = student
        self.config = config
        self.device = device = next(student.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.run.seed)
            self.generator = Generator(captured.image_shape, captured.num_classes, config.generator).to(device)
        if config.run.channels_last:
            for model in (self.teacher, self.student, self.generator):
                _to_channels_last(model)
        self.latents = LatentSampler(config.generator.latent_size, captured.num_classes, config.run.seed, device)
        held_out = LatentSampler(config.generator.latent_size, captured.num_classes, config.run.seed + 1, device)
        self.held_out_latents = held_out.draw(config.run.held_out_images)
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(),
            torch.tensor(config.generator.learning_rate, device=device),
            config.generator.betas,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.student_optimizer = torch.optim.SGD(
            self.student.parameters(),
            torch.tensor(config.student.learning_rate, device=device),
            momentum=config.student.momentum,
            nesterov=config.student.momentum > 0,
            weight_decay=config.student.weight_decay,
            fused=True,
        )
        self.execution = Execution(config.run.execution, device, self.latents)
        if config.run.compile:
            self._generator_forward = torch.compile(self._generator_forward, dynamic=False)
            self._student_forward = torch.compile(self._student_forward, dynamic=False)
        self.iteration = 0
        self.generator_stopped = False
        self.best: tuple[int, Agreement] | None = None
        self.best_student: dict[str, Tensor] = {}
        # Metrics since they were last read, and in the last place the number of steps.
        self.generator_sums = torch.zeros(4, device=device)
        self.student_sums = torch.zeros(3, device=device)

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

    @property
    def trains_generator(self) -> bool:
        last = self.config.schedule.generator_epochs
        return not self.generator_stopped and (last is None or self.epoch < last)

    # --- Algorithm 1 ---

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> None:
        """Train from where `iteration` stands to the end; the callback may look, save, or raise to stop."""
        while self.iteration < self.total_iterations:
            if self.iteration % self.config.schedule.iterations == 0:
                self._begin_epoch()
            self._step()
            self.iteration += 1
            if self.iteration % self.config.schedule.iterations == 0:
                self._end_epoch()
            after_iteration()

    def _begin_epoch(self) -> None:
        schedule = self.config.schedule
        factor = schedule.decay ** sum(self.epoch >= milestone for milestone in schedule.milestones)
        self.generator_optimizer.param_groups[0]["lr"].fill_(self.config.generator.learning_rate * factor)
        self.student_optimizer.param_groups[0]["lr"].fill_(self.config.student.learning_rate * factor)
        first_trained = max(schedule.warmup_epochs, schedule.range_epochs)
        if self.epoch == schedule.range_epochs:
            check_ranges(self.student)
        if self.epoch == first_trained and schedule.reestimate_ranges:
            calibrate(self.student, self.fresh_images(schedule.range_batches))

    def _step(self) -> None:
        kind = (self.phase, self.trains_generator)
        self.execution.run(kind, lambda: self._iteration(*kind))

    def _iteration(self, phase: str, trains_generator: bool) -> None:
        """What the device does in one iteration, and nothing else: Python is not here when a graph is replayed."""
        with products_in_tf32(self.config.run.precision == "tf32"):
            noise, labels = self.latents.draw(self.config.schedule.batch_size)
            if trains_generator:
                images, teacher_logits = self._generator_step(noise, labels)
            else:
                with torch.no_grad():
                    _, images, teacher_logits = self._generator_forward(noise, labels)
            if phase == "training":
                self._student_step(images, teacher_logits, labels)
            elif phase == "ranges":
                with torch.no_grad(), observing(self.student), self._autocast():
                    self.student(images)

    def _generator_step(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A step of G; returns its images and the teacher's logits for them, both detached."""
        loss, images, logits = self._generator_forward(noise, labels)
        self.generator_optimizer.zero_grad()
        loss.total.backward()
        self.generator_optimizer.step()
        images, logits = images.detach(), logits.detach()
        hits = 100 * (logits.argmax(1) == labels).float().mean()
        self.generator_sums += torch.stack([loss.cross_entropy, loss.bns, hits, torch.ones_like(hits)])
        return images, logits

    def _generator_forward(self, noise: Tensor, labels: Tensor) -> tuple[GeneratorLoss, Tensor, Tensor]:
        with self._autocast():
            images = self.generator(noise, labels)
            logits, statistics = self.teacher.with_statistics(images)
        return generator_loss(self.config.generator, logits, labels, statistics), images, logits

    def _student_step(self, images: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
        """A step of Q on G's images, with the teacher's logits as soft targets."""
        with nullcontext() if self.config.student.fixed_bns else moving_statistics(self.student):
            loss = self._student_forward(images, teacher_logits, labels)
        self.student_optimizer.zero_grad()
        loss.total.backward()
        self.student_optimizer.step()
        self.student_sums += torch.stack([loss.cross_entropy, loss.kl, torch.ones_like(loss.kl)])

    def _student_forward(self, images: Tensor, teacher_logits: Tensor, labels: Tensor) -> StudentLoss:
        with self._autocast():
            logits = self.student(images)
        return student_loss(self.config.student, logits, teacher_logits, labels)

    def _autocast(self) -> torch.autocast:
        """With `run.precision = "bfloat16"` convolutions and linear layers inside the block run in it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16")

    def _end_epoch(self) -> None:
        """See whether G is to stop, and note what the data-free criterion says of an epoch in which Q was trained."""
        schedule, enough = self.config.schedule, self.config.generator.stop_accuracy
        if enough is not None and not self.generator_stopped:
            self.generator_stopped = self.held_out_accuracy() > enough
        if self.epoch <= max(schedule.warmup_epochs, schedule.range_epochs):
            return
        figures = self.held_out_agreement()
        if self.best is None or figures.top1 > self.best[1].top1:
            self.best = (self.epoch, figures)
            self.best_student = copy.deepcopy(self.student.state_dict())

    def read_metrics(self) -> Metrics:
        """Means since the last call. The device is waited for here, and nowhere else in an iteration.

        Raises:
            GdfqError: a loss is NaN or infinite.
        """
        *generator, generator_steps = self.generator_sums.tolist()
        *student, student_steps = self.student_sums.tolist()
        self.generator_sums.zero_()
        self.student_sums.zero_()
        metrics = Metrics(
            *(value / generator_steps if generator_steps else None for value in generator),
            *(value / student_steps if student_steps else None for value in student),
        )
        broken = [name for name, value in metrics._asdict().items() if value is not None and not math.isfinite(value)]
        if broken:
            raise GdfqError(
                f"{' and '.join(broken)} became NaN or Inf by iteration {self.iteration}: lower "
                "generator.learning_rate or student.learning_rate"
            )
        return metrics

    # --- images that training does not see ---

    def fresh_images(self, batches: int) -> Iterator[Tensor]:
        for _ in range(batches):
            yield self.images(*self.latents.draw(self.config.schedule.batch_size))

    @torch.no_grad()
    def images(self, noise: Tensor, labels: Tensor) -> Tensor:
        """What G makes of `noise` and `labels`, its running statistics left alone."""
        self.generator.eval()
        images = self.generator(noise, labels)
        self.generator.train()
        return images

    def held_out_images(self) -> Iterator[Tensor]:
        """Images `(N, C, H, W)` of the latents that training never draws, in batches."""
        noise, labels = self.held_out_latents
        for part in zip(noise.split(256), labels.split(256), strict=True):
            yield self.images(*part)

    def held_out_agreement(self) -> Agreement:
        return agreement(self.teacher, self.student, self.held_out_images())

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Share of the held-out images that the teacher classifies as the label they were made for, percent."""
        _, labels = self.held_out_latents
        guesses = torch.cat([self.teacher(images).argmax(1) for images in self.held_out_images()])
        return 100 * (guesses == labels).double().mean().item()

    # --- checkpoints ---

    def state_dict(self) -> dict:
        """Everything that a resumed run needs: tensors, numbers and nested dicts of them."""
        return {
            "generator": self.generator.state_dict(),
            "student": self.student.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "student_optimizer": self.student_optimizer.state_dict(),
            "random": self.latents.random.get_state(),
            "iteration": self.iteration,
            "generator_stopped": self.generator_stopped,
            "generator_sums": self.generator_sums,
            "student_sums": self.student_sums,
            "best_student": self.best_student,
            "best": None if self.best is None else [self.best[0], *vars(self.best[1]).values()],
        }

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`, into a trainer made from the same model and configuration."""
        self.generator.load_state_dict(state["generator"])
        self.student.load_state_dict(state["student"])
        for name in ("generator_optimizer", "student_optimizer"):
            optimizer = getattr(self, name)
            optimizer.load_state_dict(state[name])
            _mend_loaded(optimizer, self.device)
        self.latents.random.set_state(state["random"])
        self.iteration = state["iteration"]
        self.generator_stopped = state["generator_stopped"]
        self.generator_sums.copy_(state["generator_sums"])
        self.student_sums.copy_(state["student_sums"])
        self.best_student = state["best_student"]
        self.best = None if state["best"] is None else (state["best"][0], Agreement(*state["best"][1:]))
        self.execution.restart()


def _to_channels_last(model: nn.Module) -> None:
    """What `Module.to(memory_format=...)` does, which refuses a model that has 5-D weights (Conv3d) beside 4-D ones."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _mend_loaded(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Put back what `load_state_dict` does not: the learning rate's device, and the strides, which files do not know.

    Fused optimizers walk through a parameter and its state in memory order, unchecked.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].to(device)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
