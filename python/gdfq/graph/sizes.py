"""For which images a captured graph computes what the model does; any others are refused."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from gdfq.errors import GdfqError

_SIZE_OF_INPUT = re.compile(r"L(?:\[[^\]]*\])+\.size\(\)\[(\d)\]")  # as guards of `torch.export` have it
_NAMES = ("n", "c", "h", "w")

Size = int | torch.SymInt


def hints(shape: Iterable[Size]) -> tuple[int, ...]:
    """Sizes as the graph was captured with; `int` of a symbol would fix it for all of the graph."""
    return tuple(size.node.hint if isinstance(size, torch.SymInt) else size for size in shape)


def same_size(one: Size, other: Size) -> bool:
    """Whether two sizes are the same for all images: one symbol, or one number."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return one.node.expr == other.node.expr
    return type(one) is type(other) and one == other


def symbols(size: Size) -> set:
    """What a size depends on."""
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


class ImageSizes(nn.Module):
    """Called with the images ahead of everything else, refuses those for which the graph is not right.

    Args:
        shape: `(channels, height, width)` that the graph was captured for.
        conditions: Python expressions of `n`, `c`, `h`, `w`, all of which hold where the graph is right.
        single: whether it is right for a single image; the conditions do not say.
    """

    _is_impure = True  # its call has no result that anyone reads, and stays in the graph

    def __init__(self, shape: tuple[int, int, int], conditions: tuple[str, ...], single: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.conditions = conditions
        self.single = single
        self._compile()

    def forward(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.shape[0]:
            raise GdfqError(f"images of shape {tuple(x.shape)} were given: the model takes (N, {self.shape[0]}, H, W)")
        n, c, h, w = x.shape
        if not self.single and n == 1:
            raise GdfqError(
                "a single image was given, for which the model computes something else than for several, or fails: "
                "give two or more"
            )
        if not self._of_size(2, c, h, w):
            _, height, width = self.shape
            raise GdfqError(
                f"images of {h} x {w} were given, but the model was captured for {height} x {width} and its graph is "
                f"not right at other sizes like this one: give it images of {height} x {width}, or quantize it with "
                f"image_size=({h}, {w})"
            )
        if self._of_batch is not None and not self._of_batch(2 if n == 1 else n, c, h, w):
            raise GdfqError(
                f"{n} images of {h} x {w} were given at once, for which the model computes something else than for "
                "two: give it other batches"
            )

    def right_at(self, shape: tuple[int, ...]) -> bool:
        """Whether the graph is right for two images and more of the shape `(N, C, H, W)`."""
        return bool(self._of_size(*shape))

    def _compile(self) -> None:
        of_batch = [condition for condition in self.conditions if re.search(r"\bn\b", condition)]
        self._of_size = _function(self.conditions)
        self._of_batch = _function(of_batch) if of_batch else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_of_size", "_of_batch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()

    def extra_repr(self) -> str:
        return f"shape={self.shape}, conditions={self.conditions}, single={self.single}"


def _function(conditions):
    return eval(
        f"lambda n, c, h, w: {' and '.join(map('({})'.format, conditions)) or True}", {"torch": torch, "math": math}
    )


def sizes_of(program: ExportedProgram, shape: tuple[int, int, int]) -> ImageSizes | None:
    """What `torch.export` found the graph to depend on; None where it is on the very batch that was tried, or on
    something that cannot be said in terms of sizes."""
    conditions = [_SIZE_OF_INPUT.sub(lambda found: _NAMES[int(found[1])], guard) for guard in program._guards_code]
    image = next(node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    batch, _, *size = image.shape
    conditions += [same for length, same in zip(size, fixed(shape), strict=True) if isinstance(length, int)]
    try:
        sizes = ImageSizes(shape, tuple(dict.fromkeys(conditions)))
        return None if isinstance(batch, int) or not sizes.right_at((2, *shape)) else sizes
    except Exception:
        return None


def fixed(shape: tuple[int, int, int]) -> tuple[str, str]:
    """The conditions under which no other size is right."""
    return f"h == {shape[1]}", f"w == {shape[2]}"
