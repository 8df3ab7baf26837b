"""What every node of Q's graph gives for two batches: sizes that depend on the batch, and what depends on no image."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

BATCHES = (2, 3)
# Operators that read the size of a tensor, and none of its values.
SHAPE_ALONE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


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
    first = _Recorder(student, {})
    second = _Recorder(student, first.constants)
    for images, recorder in zip(noise(student, image_shape), (first, second), strict=True):
        recorder.run(images)
    return {node: Seen(value, second.seen[node], node in first.of_image) for node, value in first.seen.items()}


def noise(student: nn.Module, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """A batch of each size in `BATCHES`, on Q's device."""
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    return (torch.randn(count, *image_shape, generator=random).to(device) for count in BATCHES)


class _Recorder(fx.Interpreter):
    """Runs Q. What does not depend on the batch at all, not even on its size, is computed once: `constants`."""

    def __init__(self, module: fx.GraphModule, constants: dict[fx.Node, Any]) -> None:
        super().__init__(module)
        self.constants = constants
        self.seen: dict[fx.Node, Any] = {}
        self.of_image: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n in self.constants:
            result = self.constants[n]
        else:
            result = super().run_node(n)
            if n.op not in ("placeholder", "output") and all(source in self.constants for source in n.all_input_nodes):
                self.constants[n] = result
        holds_tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
        reads_values = holds_tensors and getattr(n.target, "_opname", "") not in SHAPE_ALONE
        if n.op == "placeholder" or (reads_values and self.of_image & set(n.all_input_nodes)):
            self.of_image.add(n)
        self.seen[n] = pytree.tree_map_only(Tensor, lambda t: t.shape, result) if n in self.of_image else result
        return result
