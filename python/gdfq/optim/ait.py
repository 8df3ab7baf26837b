"""AIT's gradient inundation (Choi et al., "It's All In the Teacher", CVPR 2022): steps that change codes.

Weights that are quantized hardly ever change their codes at the rates of fine-tuning. So each weight tensor's step,
SGD with Nesterov's momentum, is lengthened until a share tau of its integer codes changes.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

import gdfq_ext
from gdfq.config import Config, Section
from gdfq.graph import quantized_layers
from gdfq.optim.rates import rate, with_initial_rates
from gdfq.registry import OPTIMIZERS, SECTIONS
from gdfq_ext import Scheme

KAPPAS = 16  # that `gdfq_ext.count_changed_codes` counts for at once


class AitConfig(Section):
    """AIT, where it is the optimizer of the student. The published recipe has no weight decay."""

    tau: float = Field(
        1e-3, gt=0, lt=1, description="share of codes that a step changes (1e-4 on ImageNet); falls with the rate"
    )


class AIT(torch.optim.Optimizer):
    """SGD with Nesterov's momentum, whose steps are lengthened kappa times for quantized weights.

    Of a weight w with step direction d, f(kappa) is the share of integer codes that differ between w and
    w - kappa * lr * d. kappa is 1 if f(1) >= tau; else it is doubled until f >= tau, at most to 2^15 (a gradient of
    zero never gets there), and narrowed down to a sixteenth of the last doubling, where bisection has at most five
    steps. All kappas are counted at once on the device: nothing waits for it.

    Args:
        quantized: the quantized weights, and bits and scheme of each (see `gdfq_ext.fake_quantize`).
        others: parameters that take plain steps.
        lr, tau: `()` float32 tensors on the parameters' device.
        momentum, weight_decay: as in `torch.optim.SGD`.
    """

    def __init__(
        self,
        quantized: dict[torch.nn.Parameter, tuple[int, Scheme]],
        others: list[torch.nn.Parameter],
        lr: Tensor,
        tau: Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [{"params": list(quantized), "tau": tau, "how": list(quantized.values())}, {"params": others}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                directions = self._directions(parameters, group["momentum"], group["weight_decay"])
                rates = [group["lr"]] * len(parameters)
                if "tau" in group:
                    pairs = zip(group["params"], group["how"], strict=True)
                    how = [(bits, scheme) for parameter, (bits, scheme) in pairs if parameter.grad is not None]
                    kappas = choose_kappas(parameters, directions, how, group["lr"], group["tau"])
                    rates = list((kappas * group["lr"]).unbind())
                torch._foreach_sub_(parameters, torch._foreach_mul(directions, rates))

    def _directions(self, parameters: list[Tensor], momentum: float, weight_decay: float) -> list[Tensor]:
        """g + mu * buffer, the buffers moved on: mu * buffer + g, g at first."""
        gradients = [parameter.grad for parameter in parameters]
        if weight_decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=weight_decay)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return torch._foreach_add(gradients, buffers, alpha=momentum)


def choose_kappas(
    weights: list[Tensor], directions: list[Tensor], how: list[tuple[int, Scheme]], lr: Tensor, tau: Tensor
) -> Tensor:
    """kappa of every weight, `(len(weights),)` float32, see `AIT`; `how`: bits and scheme of each."""
    bits, schemes = zip(*how, strict=True)
    # Made of tau, not of a list: a copy from the host cannot be captured.
    least = torch.stack(torch._foreach_mul([tau] * len(weights), [weight.numel() for weight in weights]))[:, None]
    powers = 2.0 ** torch.arange(KAPPAS, device=lr.device)

    def first_that_changes_enough(directions: list[Tensor], kappas: Tensor) -> Tensor:
        """Index of the first kappa for which enough codes change, the last where none does."""
        counts = gdfq_ext.count_changed_codes(weights, directions, bits, lr, kappas, scheme=schemes)
        enough = counts >= least
        enough[:, -1] = True
        return enough.int().argmax(1)

    doublings = first_that_changes_enough(directions, powers)
    before = powers[(doublings - 1).clamp_min(0)]  # powers of two: directions times them are exact
    fine = 1 + torch.arange(1, KAPPAS + 1, device=lr.device) / KAPPAS
    index = first_that_changes_enough(torch._foreach_mul(directions, list(before.unbind())), fine)
    return torch.where(doublings == 0, 1.0, before * fine[index])


def ait(student: fx.GraphModule, config: Config) -> torch.optim.Optimizer:
    """For all of Q's parameters."""
    section: AitConfig = config.ait
    layers = quantized_layers(student)
    quantized = {student.get_parameter(layer.weight): (layer.bits, layer.scheme) for layer in layers}
    others = [parameter for parameter in student.parameters() if parameter not in quantized]
    device, settings = others[0].device, config.student
    lr, tau = rate(settings.learning_rate, device), rate(section.tau, device)
    optimizer = AIT(quantized, others, lr, tau, settings.momentum, settings.weight_decay)
    with_initial_rates(optimizer, lr=settings.learning_rate)
    optimizer.param_groups[0]["initial_tau"] = section.tau
    return optimizer


OPTIMIZERS["ait"] = ait
SECTIONS["ait"] = AitConfig
