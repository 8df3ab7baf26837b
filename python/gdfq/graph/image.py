"""Which nodes of a captured graph are still the image: what is affine in it, or picked from it, ahead of any layer.

A picture comes in 8 bits, and scaling, shifting, resizing, padding or reordering it makes no other picture of it; nor
does bringing each image to a scale of its own. That an operator is affine is found by trying: f((a + b) / 2) = (f(a) +
f(b)) / 2, or, of each channel of each image, f(x) = scale * x + shift.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gdfq.graph.nodes import (
    WEIGHTED,
    activation_name,
    batch_norm_act,
    holds_tensors,
    is_clamp,
    is_image,
    op_of,
    preserves_values,
)
from gdfq.graph.sizes import hints

_SPREAD = 100.0  # of what is tried: rounding and steps show
_TOLERANCE = 1e-4  # of the largest value


def mark_image(module: fx.GraphModule) -> None:
    """Say of every node, as `meta["of_image"]`, whether it is computed from the image; as `meta["image"]`, whether it
    is the image: affine in it, or picked from it, or, each image by itself, scaled and shifted; and as
    `meta["affine"]`, whether it is so without the last, so that bounds of pixels say what its own are."""
    trial = _Trial(module)
    for node in module.graph.nodes:
        sources = _sources(node)
        node.meta["of_image"] = node.op == "placeholder" or (bool(sources) and holds_tensors(node))
        keeps = node.meta["of_image"] and all(map(is_image, sources)) and _keeps_image(node, trial)
        node.meta["affine"] = keeps and all(source.meta["affine"] for source in sources)
        node.meta["image"] = keeps or (node.meta["of_image"] and _scales_images(node, trial))


def _sources(node: fx.Node) -> list[fx.Node]:
    """The inputs that are computed from the image."""
    return [source for source in node.all_input_nodes if source.meta["of_image"]]


def _keeps_image(node: fx.Node, trial: "_Trial") -> bool:
    if node.op == "placeholder":
        return True
    if not _is_no_layer(node):
        return False
    if node.target is batch_norm_act:
        return node.args[-1] == "none"
    if activation_name(node):
        return False
    return preserves_values(node) or is_clamp(node) or trial.is_affine(node)


def _scales_images(node: fx.Node, trial: "_Trial") -> bool:
    return _is_no_layer(node) and any(
        trial.scales_each(node, source) for source in node.all_input_nodes if is_image(source)
    )


def _is_no_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in WEIGHTED and "conv" not in op_of(node)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class _Trial:
    """Runs single nodes of a graph on random values in the place of the image."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.random = torch.Generator().manual_seed(0)

    def is_affine(self, node: fx.Node) -> bool:
        """Whether `node` is affine in its inputs that are computed from the image, all together."""
        sources = _sources(node)
        a, b = (self._draw(sources) for _ in range(2))
        middle = {source: (a[source] + b[source]) / 2 for source in sources}
        at_a, at_b, between = (self._run(node, given) for given in (a, b, middle))
        return bool(between) and all(
            bool(((one + other) / 2 - found).abs().max() <= _TOLERANCE * torch.maximum(one.abs(), other.abs()).max())
            for one, other, found in zip(at_a, at_b, between, strict=True)
        )

    def scales_each(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether of each image and channel, `node` gives `scale * source + shift`, whatever its other inputs are."""
        given = self._draw(_sources(node))
        x, found = given.get(source), self._run(node, given)
        if x is None or x.is_complex() or x.shape[2:].numel() <= 2 or [y.shape for y in found] != [x.shape]:
            return False
        x, y = (values.double().flatten(2) for values in (x, *found))
        around_mean, result = (values - values.mean(2, keepdim=True) for values in (x, y))
        scale = (around_mean * result).sum(2, keepdim=True) / around_mean.square().sum(2, keepdim=True)
        return bool((result - scale * around_mean).abs().max() <= _TOLERANCE * y.abs().max())

    def _draw(self, sources: list[fx.Node]) -> dict[fx.Node, Tensor]:
        """Random values of their shapes; nothing, unless all of them are numbers."""
        likes = [source.meta["val"] for source in sources]
        if not all(map(_is_number, likes)):
            return {}
        values = (_SPREAD * torch.randn(hints(like.shape), generator=self.random) for like in likes)
        return {
            source: value.to(like.device, like.dtype)
            for source, value, like in zip(sources, values, likes, strict=True)
        }

    @torch.no_grad()
    def _run(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> list[Tensor]:
        """What of the result is numbers; nothing of an operator that cannot be run alone."""
        if not given:
            return []
        try:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(source, given))
            return [value for value in pytree.tree_leaves(node.target(*args, **kwargs)) if _is_number(value)]
        except Exception:
            return []

    def _value(self, node: fx.Node, given: dict[fx.Node, Tensor]) -> Any:
        if node in given:
            return given[node]
        if node.op == "get_attr":
            return operator.attrgetter(node.target)(self.module)
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return hints([value])[0]
        if isinstance(value, torch.SymFloat):
            return value.node.hint
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: self._value(source, given))
        return node.target(*args, **kwargs)
