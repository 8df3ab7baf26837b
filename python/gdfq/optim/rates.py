"""What all optimizers here have in common: rates that change by epoch, and state that is read back from files."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_INITIAL = "initial_"


def rate(value: float, device: torch.device) -> Tensor:
    """A rate as a tensor, `()` float32."""
    return torch.tensor(value, device=device)


def with_own_rate(parameter: Tensor, initial: float) -> dict[str, Any]:
    """A parameter as a group of an optimizer, whose rate `set_rates` changes."""
    return {"params": [parameter], "lr": rate(initial, parameter.device), f"{_INITIAL}lr": initial}


def set_rates(optimizer: Optimizer, factor: float) -> None:
    """Make every rate that has a `initial_` value beside it that value times `factor`."""
    for group in optimizer.param_groups:
        for name in [name.removeprefix(_INITIAL) for name in group if name.startswith(_INITIAL)]:
            group[name].fill_(group[f"{_INITIAL}{name}"] * factor)


def with_initial_rates(optimizer: Optimizer, **rates: float) -> Optimizer:
    """The optimizer, its initial rates noted for `set_rates`."""
    for group in optimizer.param_groups:
        group.update({f"{_INITIAL}{name}": value for name, value in rates.items()})
    return optimizer


def load_optimizer_state(optimizer: Optimizer, state: dict, device: torch.device) -> None:
    """`load_state_dict`, and what it does not put back: the rates' device, and the strides, which files do not know.

    Fused optimizers walk through a parameter and its state in memory order, unchecked.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for name, value in group.items():
            if isinstance(value, Tensor):
                group[name] = value.to(device)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
