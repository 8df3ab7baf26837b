"""Optimizers whose rates are tensors, so that a CUDA graph sees them change; the student's by name."""

from gdfq.optim import ait, sgd  # noqa: F401 - they register themselves
from gdfq.optim.rates import load_optimizer_state, set_rates

__all__ = ["load_optimizer_state", "set_rates"]
