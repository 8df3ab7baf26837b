"""The end of a reconstruction: all blocks trained together on the bank, by the loss of GDFQ's student (Eq. 10)."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import Config
from gdfq.graph import Teacher, quantized_layers
from gdfq.objective import Outputs, student_objective
from gdfq.optim import set_rates
from gdfq.precision import autocast, products_in_tf32
from gdfq.random_state import RandomState
from gdfq.registry import OPTIMIZERS
from gdfq.train.cuda_graph import IterationRunner


class FineTuner:
    """Q, whose weights become what they have been rounded to, and are rounded to the nearest level from then on.

    Args:
        teacher: P.
        student: Q, all of it reconstructed.
        images: the bank, `(N, C, H, W)`.
        config: sections `reconstruction`, `student` and `run` are read.
        random: what batches are drawn from.

    Attributes:
        runner: how iterations are carried out.
    """

    def __init__(
        self, teacher: Teacher, student: fx.GraphModule, images: Tensor, config: Config, random: RandomState
    ) -> None:
        self.teacher, self.student, self.images, self.config = teacher, student, images, config
        self.random = random
        self.objective = student_objective(config.student)
        self.read = teacher.reader(self.objective.reads).shared()
        _settle(student)
        self.optimizer = OPTIMIZERS[config.student.optimizer](student, config)
        obstacle = getattr(self.optimizer, "obstacle", None)
        self.runner = IterationRunner(config.run.cuda_graph, random.device, random, obstacle)

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> None:
        """Train for `reconstruction.finetune_iterations`, at a rate that falls to 0. The callback may raise to stop."""
        count = self.config.reconstruction.finetune_iterations
        for iteration in range(count):
            set_rates(self.optimizer, 1 - iteration / count)
            self.runner.run("finetune", self._iteration)
            after_iteration()

    def _iteration(self) -> None:
        settings, run = self.config.reconstruction, self.config.run
        with products_in_tf32(run.precision == "tf32"):
            chosen = torch.randint(
                len(self.images), (settings.batch_size,), generator=self.random.generator, device=self.random.device
            )
            images = self.images.index_select(0, ranks.shard(chosen))
            with autocast(run.precision, self.random.device):
                with torch.no_grad():
                    logits, readings = self.read(images)
                batch = Batch(images, logits.argmax(1), logits, readings=readings)
                answers = self.student(images)
            loss, _ = self.objective(Outputs(batch, answers, readings))
            self.optimizer.zero_grad()
            with ranks.adding_up_gradients(self.optimizer):
                loss.backward()
            self.optimizer.step()


@torch.no_grad()
def _settle(student: fx.GraphModule) -> None:
    for layer in quantized_layers(student):
        weight = student.get_parameter(layer.weight)
        grid = layer.quantizer.grid(layer.index, weight)
        weight.copy_(layer.quantizer.quantized(layer.index, weight))
        layer.quantizer.store(layer.index, grid.step, grid.zero_point)
