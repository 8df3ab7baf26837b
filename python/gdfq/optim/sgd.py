"""SGD with Nesterov's momentum: the paper's optimizer of Q."""

import torch
from torch import fx

from gdfq.config import Config
from gdfq.optim.rates import rate, with_initial_rates
from gdfq.registry import OPTIMIZERS


def sgd(student: fx.GraphModule, config: Config) -> torch.optim.Optimizer:
    """All parameters, fused."""
    settings = config.student
    optimizer = torch.optim.SGD(
        student.parameters(),
        rate(settings.learning_rate, next(student.parameters()).device),
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return with_initial_rates(optimizer, lr=settings.learning_rate)


OPTIMIZERS["sgd"] = sgd
