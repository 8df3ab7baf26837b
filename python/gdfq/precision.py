"""The arithmetic of convolutions and matrix products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in_tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions and matrix products inside the block may round their factors to TF32, on a GPU that has it.

    PyTorch's own default allows it for convolutions. The setting is global, and read when an operator runs: the
    backward pass must be inside, too.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """With `run.precision = "bfloat16"` convolutions and linear layers inside the block run in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
