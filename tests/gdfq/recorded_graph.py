"""A CUDA graph without CUDA: what a function does, noted operator by operator and done again without calling it.

Like a CUDA graph it does nothing while it is captured, refuses what would wait for the device, and on a replay repeats
the same operators on the same memory. Whatever Python decides, counts or allocates anew is therefore missing from a
replay here just as there.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What copies a value to the host, or gives a tensor whose shape depends on values.
WAITS = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip


class HostSynchronisationError(RuntimeError):
    """What CUDA says of a function that waits for the device while it is captured."""


class NoCopyToHost(TorchFunctionMode):
    """Inside the block methods that read a tensor from Python without an operator raise `HostSynchronisationError`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            raise HostSynchronisationError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class RecordedGraph(TorchDispatchMode):
    """Stands in for `gdfq.train.cuda_graph.CudaGraph`."""

    made: list["RecordedGraph"] = []  # noqa: RUF012 - a test reads and empties it

    def __init__(self, device: torch.device, random: torch.Generator) -> None:
        super().__init__()
        self.random = random
        self.calls: list[tuple] = []
        self.replays = 0
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors from outside, and what was in them
        self._own: dict[int, Tensor] = {}  # storages made inside; kept, as a graph keeps its memory
        self.made.append(self)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        return None

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> None:
        state = self.random.get_state()
        try:
            with NoCopyToHost(), self:
                function()
            self.random.set_state(state)  # after a failure CUDA's generator is of no use any more, and neither is this
        finally:
            with torch.no_grad():
                for tensor, content in self._before.values():
                    tensor.copy_(content)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITS:
            raise HostSynchronisationError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            if self._is_new(tensor):
                whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                self._before[_memory(tensor)] = (whole, whole.clone())
        results = func(*args, **kwargs)
        made = [tensor.detach() if self._is_new(tensor) else None for tensor in _tensors(results)]
        self._own |= {_memory(tensor): tensor for tensor in made if tensor is not None}
        self.calls.append((func, args, kwargs, made))
        return results

    def _is_new(self, tensor: Tensor) -> bool:
        return _memory(tensor) not in self._own and _memory(tensor) not in self._before

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            for place, result in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(result)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
