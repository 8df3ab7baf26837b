"""What every node of Q's graph gives for two batches: sizes that depend on the batch, and what depends on no image."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

BATCHES = (2, 3)
# Operators that read the size of a tensor, and none of its values.
_SHAPE_ALONE = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty rand_like".split()
)


@dataclass(frozen=True)
class Seen:
    """What a node gave.

    Attributes:
        value: with two images; a tensor that is computed from them is there by its shape alone, `torch.Size`.
        other: with three.
        of_image: whether it is computed from the images.
    """

    value: Any
    other: Any
    of_image: bool

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of a tensor; None for a size that depends on the batch."""
        one, other = (value.shape if isinstance(value, Tensor) else value for value in (self.value, self.other))
        return tuple(size if size == same else None for size, same in zip(one, other, strict=True))


@torch.no_grad()
def try_batches(student: fx.GraphModule, image_shape: tuple[int, int, int]) -> dict[fx.Node, Seen]:
    """Run Q on two batches of noise and keep what its nodes give."""
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    first, second = (_Recorder(student) for _ in BATCHES)
    for recorder, batch in zip((first, second), BATCHES, strict=True):
        recorder.run(torch.randn(batch, *image_shape, generator=random).to(device))
    return {
        node: Seen(value, second.seen[node], first.of_image[node]) for node, value in first.seen.items()
    }  # fmt: skip


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}
        self.of_image: dict[fx.Node, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        holds_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        reads_shape_alone = getattr(n.target, "_opname", "") in _SHAPE_ALONE
        depends = holds_tensors and not reads_shape_alone and any(self.of_image[source] for source in n.all_input_nodes)
        self.of_image[n] = n.op == "placeholder" or depends
        self.seen[n] = pytree.tree_map_only(Tensor, lambda t: t.shape, result) if self.of_image[n] else result
        return result
