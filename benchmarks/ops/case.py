"""What an operation is measured on, and the operation by all who have it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The trainer's own first: a run may be cut off.
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
DIRECTIONS = ("forward", "backward", "both")

Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """The input of an operation."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    device: str = "cpu"
    libraries: tuple[str, ...] = ()
    """The peers that take part; each is installed."""

    def x(self) -> Tensor:
        """Random values, the same for the same problem; a leaf that takes a gradient."""
        torch.manual_seed(0)
        x = torch.randn(self.shape, device=self.device).to(self.dtype, memory_format=self.layout)
        return x.requires_grad_()

    def channel(self, count: int | None = None) -> Tensor:
        """Positive values per channel."""
        return torch.rand(count or self.shape[1], device=self.device) + 0.5


@dataclass(frozen=True)
class Case:
    """One operation on one input."""

    providers: dict[str, Call]
    leaves: list[Tensor]
    """What a backward differentiates to; empty for operations without a gradient."""
    operand_bytes: int
    """Size of the largest operand; a copy of as many bytes shows what the memory allows."""
    forward_bytes: int
    """What one pass over the operands must move: every input read once (twice where a first pass must end before the
    second begins), every output written once."""
    backward_bytes: int = 0
    step: float = 0.0
    """Largest distance of two levels where the results are quantized, else 0."""
    other_gradient: dict[str, str] = field(default_factory=dict)
    """Provider -> what it computes otherwise in the backward."""

    def bytes_of(self, direction: str) -> int:
        moved = {"forward": self.forward_bytes, "backward": self.backward_bytes}
        return moved.get(direction, self.forward_bytes + self.backward_bytes)

    def run(self, provider: str, direction: str) -> Callable[[], object]:
        """What is timed: forward without a graph; backward with the graph kept, to all leaves; or both."""
        call = self.providers[provider]

        def forward():
            with torch.no_grad():
                return call()

        if direction == "forward":
            return forward
        kept = as_list(call())
        gradients = [torch.ones_like(result) for result in kept]
        if direction == "backward":
            return lambda: torch.autograd.grad(kept, self.leaves, gradients, retain_graph=True)
        return lambda: torch.autograd.grad(as_list(call()), self.leaves, gradients)


def as_list(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
