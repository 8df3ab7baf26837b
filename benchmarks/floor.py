"""What an iteration costs whose every operation but convolutions and matrix products is free."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gdfq.train.cuda_graph import IterationRunner
from gdfq.train.trainer import Trainer

aten = torch.ops.aten
ARITHMETIC = {
    aten.convolution.default, aten.convolution_backward.default,
    aten.mm.default, aten.addmm.default, aten.bmm.default,
}  # fmt: skip


class Floor:
    """The convolutions and matrix products of an iteration of `trainer` alone, forward and backward, on stand-in
    tensors of the same shape and layout; on a GPU as a CUDA graph, like the trainer's own iterations."""

    networks = None

    def __init__(self, trainer: Trainer) -> None:
        with Recorder() as recorder:
            trainer.step()
        self.calls = recorder.calls
        self.runner = IterationRunner("auto", trainer.device, trainer.source.random)

    def step(self) -> None:
        self.runner.run("floor", self._products)

    @torch.no_grad()
    def _products(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)

    def backend(self) -> str:
        return f"PyTorch; iterations: {self.runner.description}"

    def evidence(self) -> dict[str, float]:
        """It computes nothing that means something."""
        return {}


class Recorder(TorchDispatchMode):
    """Notes the `ARITHMETIC` that runs inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self._stand_ins: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ARITHMETIC:
            self.calls.append((func, *tree_map_only(Tensor, self._stand_in, (args, kwargs))))
        return func(*args, **kwargs)

    def _stand_in(self, tensor: Tensor) -> Tensor:
        key = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._stand_ins:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            self._stand_ins[key] = empty.normal_()
        return self._stand_ins[key]
