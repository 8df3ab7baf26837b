"""Steps of activations that are trained: those of the quantizers' ranges at first, their ranges in the end."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gdfq.nn import FakeQuantize
from gdfq.observers import LearnedStep
from gdfq.optim.rates import with_own_rate
from gdfq.random_state import RandomState


class LearnedSteps:
    """The quantizers' observers give way to `LearnedStep` until `settle`. What is trained is a step's logarithm: a rate
    is a share of the step as it has become, which never reaches 0.

    Args:
        quantizers: of activations, whose ranges are known.
        device: of the steps.
        keep, random: see `LearnedStep`.
    """

    def __init__(
        self,
        quantizers: Iterable[FakeQuantize],
        device: torch.device,
        keep: float = 0.0,
        random: RandomState | None = None,
    ) -> None:
        self.own = {quantizer: quantizer.observer for quantizer in quantizers}
        self.parameters: list[nn.Parameter] = []
        for quantizer in self.own:
            observer = LearnedStep(quantizer.scheme, keep, random).to(device)
            observer.end_pass(quantizer.range, quantizer.bits)
            parametrize.register_parametrization(observer, "step", _Exponential())
            quantizer.observer = observer
            self.parameters.append(observer.parametrizations.step.original)

    def groups(self, share: float) -> list[dict[str, Any]]:
        """For an optimizer: all with the same rate."""
        return [with_own_rate(logarithm, share) for logarithm in self.parameters]

    def settle(self) -> None:
        """The quantizers have their observers again, and the ranges that their steps make."""
        for quantizer, observer in self.own.items():
            quantizer.observer = observer
            quantizer.end_pass()


class _Exponential(nn.Module):
    def forward(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp()

    def right_inverse(self, step: Tensor) -> Tensor:
        return step.log()
