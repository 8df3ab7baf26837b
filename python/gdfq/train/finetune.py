"""The end of a reconstruction: all blocks trained together, so that Q answers the bank as P does.

Weights become what they have been rounded to, and are rounded to the nearest level from then on; they and the steps of
activations (LSQ, ICLR 2020) are trained by

    KL(softmax(z_P) || softmax(z_Q))        mean over images

A few hundred images would be learned by heart. So they are moved and flipped at random, and one half is blended with
another image of the bank: P says what such images are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import Config, StudentConfig
from gdfq.graph import Teacher, quantized_layers
from gdfq.nn import FakeQuantize
from gdfq.objective import Outputs, student_objective
from gdfq.optim.rates import set_rates, with_own_rate
from gdfq.precision import autocast, products_in_tf32
from gdfq.random_state import RandomState
from gdfq.train.cuda_graph import IterationRunner
from gdfq.train.steps import LearnedSteps

FARTHEST = 8  # the share of their size that images are moved by at most is 1 / 8
LOSS = StudentConfig(cross_entropy_weight=0.0, temperature=1.0, kd_reduction="batchmean")


class FineTuner:
    """Q, and all that its training changes.

    Args:
        teacher: P.
        student: Q, all of it reconstructed.
        quantizers: those of its activations whose steps are trained.
        images: the bank, `(N, C, H, W)`.
        config: sections `reconstruction` and `run` are read.
        random: what all chances are drawn from.

    Attributes:
        loss: of the last iteration, `()`.
        runner: how iterations are carried out.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: fx.GraphModule,
        quantizers: Iterable[FakeQuantize],
        images: Tensor,
        config: Config,
        random: RandomState,
    ) -> None:
        self.student, self.images, self.config, self.random = student, images, config, random
        self.read = teacher.reader(()).shared()
        self.objective = student_objective(LOSS)
        settings = config.reconstruction
        student.requires_grad_(False)
        weights = _settle(student, settings.finetune_learning_rate)
        self.steps = LearnedSteps(quantizers, random.device)
        groups = weights + self.steps.groups(settings.finetune_step_learning_rate)
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=random.device.type == "cuda")
        self.loss = torch.zeros((), device=random.device)
        self.runner = IterationRunner(config.run.cuda_graph, random.device, random)

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> None:
        """Train for `reconstruction.finetune_iterations`, at rates that fall to 0. The callback may raise to stop."""
        count = self.config.reconstruction.finetune_iterations
        for iteration in range(count):
            set_rates(self.optimizer, 1 - iteration / count)
            self.runner.run("finetune", self._iteration)
            after_iteration()
        self.steps.settle()

    @torch.no_grad()
    def divergence(self, random: RandomState) -> float:
        """KL of Q to P, the mean over about as many views as the bank has images."""
        batches = -(-len(self.images) // self.config.reconstruction.batch_size)
        total = torch.zeros((), device=self.random.device)
        with products_in_tf32(self.config.run.precision == "tf32"):
            for _ in range(batches):
                total += self._share_of_loss(random)
        ranks.add_up([total])
        return total.item() / batches

    def _iteration(self) -> None:
        with products_in_tf32(self.config.run.precision == "tf32"):
            loss = self._share_of_loss(self.random)
            self.loss.copy_(loss.detach())
            self.optimizer.zero_grad()
            with ranks.adding_up_gradients(self.optimizer, [self.loss]):
                loss.backward()
            self.optimizer.step()

    def _share_of_loss(self, random: RandomState) -> Tensor:
        """This rank's, of one batch; all ranks' make the mean over its images."""
        images = self._views(self.config.reconstruction.batch_size, random)
        with autocast(self.config.run.precision, random.device):
            with torch.no_grad():
                logits, readings = self.read(images)
            batch = Batch(images, logits.argmax(1), logits, readings=readings)
            answers = self.student(images)
        return self.objective(Outputs(batch, answers, readings))[0]

    def _views(self, count: int, random: RandomState) -> Tensor:
        """This rank's of so many images, `(n, C, H, W)`."""
        height, width = self.images.shape[2:]
        first, second = (_whole(len(self.images), count, random) for _ in range(2))
        rows, columns = (
            _whole(2 * (size // FARTHEST) + 1, count, random)[:, None] + torch.arange(size, device=random.device)
            for size in (height, width)
        )
        columns = torch.where(_share(count, random)[:, None] < 0.5, columns.flip(1), columns)
        blended, weight = _share(count, random) < 0.5, _share(count, random)
        weight = torch.where(blended, weight, 1.0).view(-1, 1, 1, 1)
        x, other = (self._moved(of, rows, columns) for of in (first, second))
        return other.lerp(x, weight)

    def _moved(self, chosen: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Images of the bank, mirrored beyond their borders, `(n, size)` rows and columns of each."""
        x = self.images.index_select(0, chosen)
        vertical, horizontal = (size // FARTHEST for size in x.shape[2:])
        padded = F.pad(x, (horizontal, horizontal, vertical, vertical), mode="reflect")
        images, channels = (torch.arange(size, device=x.device) for size in x.shape[:2])
        return padded[images.view(-1, 1, 1, 1), channels.view(-1, 1, 1), rows[:, None, :, None], columns[:, None, None]]


def _whole(below: int, count: int, random: RandomState) -> Tensor:
    """This rank's of so many whole numbers."""
    return ranks.shard(torch.randint(below, (count,), generator=random.generator, device=random.device))


def _share(count: int, random: RandomState) -> Tensor:
    """This rank's of so many numbers of 0 to 1."""
    return ranks.shard(torch.rand(count, generator=random.generator, device=random.device))


@torch.no_grad()
def _settle(student: fx.GraphModule, share: float) -> list[dict[str, Any]]:
    """Weights become what they have been rounded to; for an optimizer: they, whose rates are a share of their steps;
    with 2 bits, of what their steps would be with 3: a share of the coarse ones makes training diverge."""
    groups = []
    for layer in {layer.weight: layer for layer in quantized_layers(student)}.values():
        weight = student.get_parameter(layer.weight)
        grid = layer.quantizer.grid(layer.index, weight)
        weight.copy_(layer.quantizer.quantized(layer.index, weight))
        layer.quantizer.store(layer.index, grid.step, grid.zero_point)
        weight.requires_grad_(True)
        step = grid.step.mean().item() * min(1.0, (2**layer.bits - 1) / (2**3 - 1))
        groups.append(with_own_rate(weight, share * step))
    return groups
