"""Activation checkpointing: what is computed on the way is not kept for backward, but computed again there."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate, groupby
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.registry import CHECKS


def recompute(function: Callable[..., Any], *args: Any, buffers: Iterable[Tensor] = ()) -> Any:
    """`function(*args)`, of which nothing is kept for backward but the arguments: it is called again there.

    Args:
        function: gives the same each time; it draws nothing.
        buffers: that it writes, as running statistics: the second call leaves them as they are.
    """
    contexts = nullcontext(), _kept(list(buffers))
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:  # what is not needed any more is not computed again: the call ends by an error
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


class Recomputed(nn.Module):
    """A module without buffers that is called by `recompute`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return recompute(self.module, *args)


def in_pieces(module: fx.GraphModule) -> fx.GraphModule:
    """The same, cut into `Recomputed` pieces where few values are alive. Modules that it calls stay outside of them,
    since they may draw; the parameters are shared."""
    ends = _ends([node for node in module.graph.nodes if node.op == "call_function"])
    piece, pieces = 0, {}
    for node in module.graph.nodes:
        is_module = node.op == "call_module"
        pieces[node] = piece = piece + is_module
        piece += is_module or node in ends
    split = split_module(module, module, pieces.__getitem__, keep_original_order=True, partition_affix="piece")
    for call in split.graph.find_nodes(op="call_module"):
        child = split.get_submodule(call.target)
        if not child.graph.find_nodes(op="call_module"):
            setattr(split, call.target, Recomputed(child))
    return split


def _ends(nodes: list[fx.Node]) -> set[fx.Node]:
    """Where pieces end: as many as each has values, and about equal in what they compute."""
    values = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    alive = _alive(nodes)
    upto = list(accumulate(map(_size, values)))
    count = math.isqrt(len(values))
    windows = groupby(zip(values, upto, strict=True), lambda value: value[1] * count // (upto[-1] + 1))
    return {min((node for node, _ in window), key=alive.__getitem__) for _, window in windows}


def _alive(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """How much is kept if a piece ends behind the node, in numbers an image."""
    place = {node: index for index, node in enumerate(nodes)}
    alive = dict.fromkeys(nodes, 0)
    for index, node in enumerate(nodes):
        last = max((place.get(user, 0) for user in node.users), default=0)
        for other in nodes[index:last]:
            alive[other] += _size(node)
    return alive


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(map(int, value.shape[1:])) if isinstance(value, Tensor) else 0


def _check(config: Config) -> None:
    if config.run.compile and config.run.checkpointing:
        raise GdfqError(
            "settings 'run.compile' and 'run.checkpointing' are both true, but torch.compile decides by itself what is "
            "kept for backward: set one of them to false"
        )


CHECKS.append(_check)
