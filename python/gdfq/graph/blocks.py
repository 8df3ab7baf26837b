"""The blocks of a quantized model: pieces with one value going in and one coming out, each as a module of its own.

A cut is a value that all later ones are computed from: the result of every layer where nothing goes around it, of a
residual sum where something does. Between two cuts that have layers between them is a block; what computes without a
layer (activations, quantizers, pooling) belongs to the block ahead of it, but from a pooling by averages on to the
next, so that what a block is compared by still has its places.
"""

import operator
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from gdfq.graph.nodes import WEIGHTED, average_pool_inputs, op_of
from gdfq.graph.query import (
    QuantizedLayer,
    QuantizedWeight,
    called_by,
    quantized_layers,
    quantized_weight,
    quantizer_of,
    unrounded,
)
from gdfq.graph.sizes import Size, hints, same_size, symbols
from gdfq.nn import BatchNormActFakeQuantize, BiasFakeQuantize, FakeQuantize


class Instead(NamedTuple):
    """What a copy has in the place of a node: the result of a module, or, where that is None, the one argument."""

    module: nn.Module | None
    args: tuple[Any, ...]


Change = Callable[[fx.Node], Instead | None]


class Block:
    """A piece of Q, from `build_quantized`.

    Args:
        student: Q.
        entry, exit: the values going in and coming out, `(N, ...)` both.
        nodes: what is computed from the one on the way to the other.
        layers: Q's, `quantized_layers`.

    Attributes:
        layers: whose weights are quantized and parameters.
        quantizers: of activations computed in it, the image's left out.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        entry: fx.Node,
        exit: fx.Node,
        nodes: list[fx.Node],
        layers: list[QuantizedLayer],
    ) -> None:
        self.student, self.entry, self.exit = student, entry, exit
        inside = set(nodes)
        self.layers = [layer for layer in layers if layer.node in inside]
        found = (quantizer_of(student, node) for node in nodes if not node.meta["image"])
        self.quantizers: list[FakeQuantize] = [quantizer for quantizer in found if quantizer is not None]

    @property
    def name(self) -> str:
        """Of its first layer's weight, without that word."""
        return self.layers[0].weight.removesuffix(".weight") if self.layers else self.exit.name

    def quantized(self) -> fx.GraphModule:
        """As Q computes it, `(N, ...) -> (N, ...)`; parameters and modules are Q's own, in all three."""
        return self._copy(lambda node: None)

    def exact(self) -> fx.GraphModule:
        """Without any quantizer: as P computes it, where Q's parameters are P's."""

        def change(node: fx.Node) -> Instead | None:
            module = called_by(self.student, node)
            if isinstance(module, FakeQuantize):
                return Instead(None, node.args)
            if isinstance(module, BatchNormActFakeQuantize):
                return Instead(module.batch_norm_act, node.args)
            weight = _weight_of(self.student, node)
            return _without_rounding(self.student, node) if weight is None else Instead(None, (weight.weight,))

        return self._copy(change)

    def learning(self, weights: dict[str, nn.Module]) -> fx.GraphModule:
        """As Q computes it, the weights of these names given by modules that are called with the weight; biases are not
        rounded."""

        def change(node: fx.Node) -> Instead | None:
            weight = _weight_of(self.student, node)
            if weight is None:
                return _without_rounding(self.student, node)
            return Instead(weights[weight.weight.target], (weight.weight,)) if weight.weight.target in weights else None

        return self._copy(change)

    def _copy(self, change: Change) -> fx.GraphModule:
        graph = fx.Graph()
        copied: dict[Any, Any] = {self.entry: graph.placeholder("x")}
        found: dict[str, Any] = {}
        batch = _batch(self.student)

        def copy(node: fx.Node) -> Any:
            instead = change(node)
            if instead is not None:
                args = fx.node.map_arg(instead.args, copied.__getitem__)
                if instead.module is None:
                    return args[0]
                found[f"instead.{node.name}"] = instead.module
                return graph.call_module(f"instead.{node.name}", args)
            size = _known_size(node, batch)
            if size is not None:
                return graph.call_method("size", (copied[self.entry], 0)) if size is batch else hints([size])[0]
            if node.op in ("get_attr", "call_module"):
                found[node.target] = operator.attrgetter(node.target)(self.student)
            return graph.node_copy(node, copied.__getitem__)

        for node in self._needed(change):
            copied[node] = copy(node)
        graph.output(copied[self.exit])
        graph.lint()
        return fx.GraphModule(found, graph)

    def _needed(self, change: Change) -> Iterator[fx.Node]:
        """What the exit is computed from, in order."""
        needed: set[fx.Node] = set()
        pending, batch = [self.exit], _batch(self.student)
        while pending:
            node = pending.pop()
            if node is self.entry or node in needed:
                continue
            needed.add(node)
            instead = change(node)
            if instead is not None:
                fx.node.map_arg(instead.args, pending.append)
            elif _known_size(node, batch) is None:
                pending += node.all_input_nodes
        return (node for node in self.student.graph.nodes if node in needed)


def find_blocks(student: fx.GraphModule) -> list[Block]:
    """The blocks of Q, from `build_quantized`, in the order of the forward pass; one alone where nothing can be cut."""
    nodes = [node for node in student.graph.nodes if node.meta.get("of_image")]
    cuts = _cuts(student, nodes)
    pieces = [nodes[start + 1 : end + 1] for start, end in pairwise(cuts)]
    with_layers = [index for index, piece in enumerate(pieces) if any(node.target in WEIGHTED for node in piece)]
    layers = quantized_layers(student)
    begins, has_layer = [0], False  # the first piece of every block
    for index, piece in enumerate(pieces):
        pools = index < max(with_layers, default=0) and any(average_pool_inputs(node) for node in piece)
        if has_layer and (index in with_layers or pools):
            begins.append(index)
            has_layer = False
        has_layer |= index in with_layers
    return [
        Block(student, nodes[cuts[begin]], nodes[cuts[end]], nodes[cuts[begin] + 1 : cuts[end] + 1], layers)
        for begin, end in pairwise([*begins, len(pieces)])
    ]


def _cuts(student: fx.GraphModule, nodes: list[fx.Node]) -> list[int]:
    """Places of the values that all later ones are computed from; the first is the image, the last the result."""
    place = {node: index for index, node in enumerate(nodes)}
    batch = _batch(student)
    result = next(iter(student.graph.find_nodes(op="output")))
    cuts, reach = [], 0  # how far what came before is read
    for index, node in enumerate(nodes):
        if index in (0, len(nodes) - 1) or (reach <= index and _is_batch(node, batch)):
            cuts.append(index)
        readers = [reader for user in node.users for reader in _readers(user, batch)]
        reach = max([reach, *(place.get(reader, len(nodes)) for reader in readers if reader is not result)])
    return cuts


def _readers(user: fx.Node, batch: Size) -> list[fx.Node]:
    """Who reads a value by this use of it: nobody who looks at the image ahead of all, or at a size that is known."""
    if user.meta.get("of_image") or user.op == "output":
        return [user]
    return [] if user.op == "call_module" or _known_size(user, batch) is not None else [user]


def _known_size(node: fx.Node, batch: Size) -> Size | None:
    """The size that `node` asks for, where it is that of the batch or has nothing to do with it."""
    if op_of(node) != "sym_size":
        return None
    size = node.args[0].meta["val"].shape[node.args[1]]
    if same_size(size, batch):
        return batch
    return None if symbols(size) & symbols(batch) else size


def _batch(student: fx.GraphModule) -> Size:
    """How many images there are, as the graph has it."""
    return next(iter(student.graph.find_nodes(op="placeholder"))).meta["val"].shape[0]


def _is_batch(node: fx.Node, batch: Size) -> bool:
    """Whether the value is a tensor with a row for every image."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() > 0 and same_size(value.shape[0], batch)


def _weight_of(student: fx.GraphModule, node: fx.Node) -> QuantizedWeight | None:
    """Of the node that is a layer's quantized weight."""
    return quantized_weight(student, node) if node.target is operator.getitem else None


def _without_rounding(student: fx.GraphModule, node: fx.Node) -> Instead | None:
    """A bias, or beta, as it is."""
    return (
        Instead(None, (unrounded(student, node),)) if isinstance(called_by(student, node), BiasFakeQuantize) else None
    )
