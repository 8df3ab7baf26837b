"""Which nodes of a captured graph are still the image: what is affine in it, or picked from it, ahead of any layer.

A picture comes in 8 bits, and scaling, shifting, resizing, padding or reordering it makes no other picture of it. That
an operator is affine is found by trying: f((a + b) / 2) = (f(a) + f(b)) / 2.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gdfq.graph.nodes import WEIGHTED, activation_name, batch_norm_act, is_clamp, is_image, op_of, preserves_values

_SPREAD = 100.0  # of what is tried: rounding and steps show
_TOLERANCE = 1e-4  # of the largest value


def mark_image(module: fx.GraphModule) -> None:
    """Say of every node, as `meta["of_image"]`, whether it is computed from the image, and as `meta["image"]`, whether
    it is the image: affine in it, or picked from it."""
    trial = _Trial(module)
    for node in module.graph.nodes:
        sources = [source for source in node.all_input_nodes if source.meta["of_image"]]
        node.meta["of_image"] = node.op == "placeholder" or (bool(sources) and _holds_tensors(node))
        node.meta["image"] = node.op == "placeholder" or (
            node.meta["of_image"] and all(map(is_image, sources)) and _keeps_image(node, trial)
        )


def _holds_tensors(node: fx.Node) -> bool:
    return any(isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def _keeps_image(node: fx.Node, trial: "_Trial") -> bool:
    if node.op != "call_function" or node.target in WEIGHTED or "conv" in op_of(node):
        return False
    if node.target is batch_norm_act:
        return node.args[-1] == "none"
    if activation_name(node):
        return False
    return preserves_values(node) or is_clamp(node) or trial.is_affine(node)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class _Trial:
    """Runs single nodes of a graph on random values in the place of the image."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.random = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def is_affine(self, node: fx.Node) -> bool:
        """Whether `node` is affine in its inputs that are computed from the image, all together."""
        sources = [source for source in node.all_input_nodes if source.meta["of_image"]]
        if not all(_is_number(source.meta["val"]) for source in sources):
            return False
        a, b = ([self._draw(source.meta["val"]) for source in sources] for _ in range(2))
        middle = [(one + other) / 2 for one, other in zip(a, b, strict=True)]
        try:
            at_a, at_b, between = (
                self._run(node, dict(zip(sources, values, strict=True))) for values in (a, b, middle)
            )
        except Exception:  # an operator that cannot be run alone is one of which nothing is known
            return False
        return bool(between) and all(
            bool(((one + other) / 2 - found).abs().max() <= _TOLERANCE * torch.maximum(one.abs(), other.abs()).max())
            for one, other, found in zip(at_a, at_b, between, strict=True)
        )

    def _draw(self, like: Tensor) -> Tensor:
        shape = tuple(map(int, like.shape))
        return _SPREAD * torch.randn(shape, generator=self.random).to(like.device, like.dtype)

    def _run(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> list[Tensor]:
        """What of the result is numbers."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(source, given))
        return [value for value in pytree.tree_leaves(node.target(*args, **kwargs)) if _is_number(value)]

    def _value(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> Any:
        if node in given:
            return given[node]
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.module)
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return int(value)
        if isinstance(value, torch.SymFloat):
            return float(value)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(source, given))
        return node.target(*args, **kwargs)
