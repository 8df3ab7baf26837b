"""What PyTorch keeps for a whole process: how a user has set it neither matters to a run nor is changed by it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def of_its_own() -> Iterator[None]:
    """Gradients on, float32 as the default, operators that need not be deterministic, random numbers of our own."""
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.use_deterministic_algorithms, deterministic[0], warn_only=deterministic[1])
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        yield
