"""Block reconstruction: the blocks of Q trained one after the other, each to give what P's gives (BRECQ, ICLR 2021).

Trained are which way each weight is rounded (AdaRound, ICML 2020) and the steps of the activations (LSQ, ICLR 2020);
weights and BN stay P's. A block is trained on what Q's own blocks ahead of it make of the images, where each element is
P's instead with a probability, and by the same chance is not quantized inside (QDrop, ICLR 2022). The loss of a block
with results y, soft roundings h in 0..1 and their penalty's sharpness b, which falls:

    mean over all but channels of sum_c (y_Q - y_P)^2  +  weight * sum 1 - |2 h - 1|^b

Biases are not rounded meanwhile: their levels are far finer than the activations'.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gdfq_ext
from gdfq import ranks
from gdfq.clip_values import shrunk
from gdfq.config import Config
from gdfq.graph.blocks import Block
from gdfq.graph.query import QuantizedLayer
from gdfq.nn import per_channel
from gdfq.optim.rates import rate, set_rates
from gdfq.precision import autocast, products_in_tf32
from gdfq.random_state import RandomState, random_bytes
from gdfq.train.activations import Activations
from gdfq.train.cuda_graph import IterationRunner
from gdfq.train.steps import LearnedSteps
from gdfq_ext import Grid, Scheme, quantizer_grid

FIRM = 0.999  # nearer to a whole one no rounding begins: its sigmoid would be flat
SHARPEST, SMOOTHEST = 20.0, 2.0  # b, at first and in the end


class LearnedRounding(nn.Module):
    """Stands for the quantizer of a weight while its rounding is learned: called with the weight, gives the soft one.

    Args:
        weight: `(channels, ...)`.
        grid: of its channels.
        rounding: what it begins with, integers that are added to floor(weight / step); the soft rounding begins at the
            weight itself where that is on their side, and as far on the other side of the middle where it is not.
        bits, scheme: see `gdfq_ext.fake_quantize`.
        sharpness: b, one element, of the penalty.

    Attributes:
        penalty: of the last call, `()` with its gradient.
    """

    def __init__(
        self, weight: Tensor, grid: Grid, rounding: Tensor, bits: int, scheme: Scheme, sharpness: Tensor
    ) -> None:
        super().__init__()
        self.grid, self.bits, self.scheme, self.sharpness = grid, bits, scheme, sharpness
        in_steps = weight.detach() / per_channel(grid.step, weight)
        self.base = in_steps.floor()
        fraction = in_steps - self.base
        soft = torch.where((fraction >= 0.5) == (rounding >= 0.5), fraction, 1 - fraction)
        self.v = nn.Parameter(torch.logit((soft.clamp(1 - FIRM, FIRM) + 0.1) / 1.2))
        self.penalty: Tensor = torch.zeros(())

    def forward(self, weight: Tensor) -> Tensor:
        step, zero_point, *_ = self.grid
        soft, self.penalty = gdfq_ext.round_learned(
            self.base, self.v, step, zero_point, self.sharpness, self.bits, scheme=self.scheme
        )
        return soft

    def rounding(self) -> Tensor:
        """Firm: 0 or 1, to be added to floor(weight / step)."""
        return (self.v.detach() >= 0).float()


class BlockTrainer:
    """One block and all that its training changes; in the end Q's quantizers have what was found.

    Args:
        block: of Q, whose activation ranges are known.
        config: sections `reconstruction` and `run` are read.
        given, exact: what goes into the block, by Q's own blocks and by P's.
        wanted: what comes out of P's.
        random: what all chances are drawn from.
        begin: which rounding a weight `(channels, ...)` begins with, on its grid.

    Attributes:
        error: of the last iteration, `()`.
        runner: how iterations are carried out.
    """

    def __init__(
        self,
        block: Block,
        config: Config,
        given: Activations,
        exact: Activations,
        wanted: Activations,
        random: RandomState,
        begin: Callable[[Tensor, Grid], Tensor],
    ) -> None:
        self.settings, self.precision = config.reconstruction, config.run.precision
        self.given, self.exact, self.wanted = given, exact, wanted
        self.random, self.device = random, random.device
        self.sharpness = torch.tensor(SHARPEST, device=self.device)
        self.penalty_weight = torch.zeros((), device=self.device)
        self.error = torch.zeros((), device=self.device)
        self.layers = {layer.weight: layer for layer in block.layers if not layer.is_stored}
        self.roundings = {
            name: self._rounding(block.student.get_parameter(name), layer, begin) for name, layer in self.layers.items()
        }
        self.module = block.learning(dict(self.roundings))
        self.steps = LearnedSteps(block.quantizers, self.device, self.settings.keep, random)
        obstacles = [activations.obstacle(self.device) for activations in (given, exact, wanted)]
        self.runner = IterationRunner(config.run.cuda_graph, self.device, random, next(filter(None, obstacles), None))

    def run(self, after_iteration: Callable[[], None] = lambda: None) -> None:
        """Train what there is to the end, and hand over to Q's quantizers. The callback may look, or raise to stop."""
        if not self.roundings and not self.steps.parameters:
            return
        self.optimizer = self._optimizer()
        count = self.settings.iterations
        for iteration in range(count):
            self._schedule(iteration / count)
            self.runner.run("block", self._iteration)
            after_iteration()
        for name, layer in self.layers.items():
            learned = self.roundings[name]
            layer.quantizer.store(layer.index, learned.grid.step, learned.grid.zero_point, learned.rounding())
        self.steps.settle()

    def _schedule(self, progress: float) -> None:
        """The penalty begins after a warm-up, its sharpness falls; the rates of steps fall by a half cosine."""
        warmup = self.settings.warmup
        since = (progress - warmup) / (1 - warmup)
        self.penalty_weight.fill_(0.0 if since < 0 else self.settings.penalty_weight)
        self.sharpness.fill_(SHARPEST + (SMOOTHEST - SHARPEST) * max(since, 0.0))
        set_rates(self.optimizer, (1 + math.cos(math.pi * progress)) / 2)

    def _iteration(self) -> None:
        """What the device does in one iteration, and nothing else."""
        with products_in_tf32(self.precision == "tf32"):
            chosen = torch.randint(
                len(self.wanted), (self.settings.batch_size,), generator=self.random.generator, device=self.device
            )
            chosen = ranks.shard(chosen)
            x = self.given.select(chosen)
            if self.exact is not self.given and self.settings.keep:
                is_kept = random_bytes(x, self.random) < round(256 * self.settings.keep)
                x = torch.where(is_kept, self.exact.select(chosen), x)
            with autocast(self.precision, self.device):
                y = self.module(x)
            error = (y.float() - self.wanted.select(chosen)).square().sum(1).mean() * ranks.share(len(chosen))
            penalty = sum(learned.penalty for learned in self.roundings.values()) / ranks.count()  # the same on all
            loss = error + self.penalty_weight * penalty
            self.error.copy_(error.detach())
            self.optimizer.zero_grad()
            with ranks.adding_up_gradients(self.optimizer, [self.error]):
                loss.backward()
            self.optimizer.step()

    def _rounding(
        self, weight: Tensor, layer: QuantizedLayer, begin: Callable[[Tensor, Grid], Tensor]
    ) -> LearnedRounding:
        rows = weight.detach().flatten(1)
        grid = quantizer_grid(*shrunk(rows, None, layer.bits, layer.scheme), layer.bits, layer.scheme)
        return LearnedRounding(weight, grid, begin(weight, grid), layer.bits, layer.scheme, self.sharpness)

    def _optimizer(self) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [learned.v], "lr": rate(self.settings.rounding_learning_rate, self.device)}
            for learned in self.roundings.values()
        ]
        groups += self.steps.groups(self.settings.step_learning_rate)
        return torch.optim.Adam(groups, fused=True, capturable=self.device.type == "cuda")
