"""Optimizers whose rates are tensors, so that a CUDA graph sees them change; the student's by name."""

from gdfq.optim import sgd  # noqa: F401 - it registers itself
from gdfq.optim.rates import load_optimizer_state, set_rates

__all__ = ["load_optimizer_state", "set_rates"]
