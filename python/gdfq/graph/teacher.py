"""The teacher: the captured model, frozen, able to say what a loss wants to know of its inside."""

import copy
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import guard_or_true

import gdfq_ext
from gdfq import ranks
from gdfq.graph.added import call_ahead
from gdfq.graph.capture import CapturedModel
from gdfq.graph.nodes import batch_norm_act, name_of
from gdfq.recompute import in_pieces

FAR = 10.0  # times as large or as small


class BatchNormStatistics(NamedTuple):
    """Of the input of every BN layer, `(C_l,)` float32 each: the arguments of `gdfq_ext.bns_loss` (Eq. 5).

    Attributes:
        means, variances: over the batch, the variance biased, with gradients to the images.
        running_means, running_vars: what the model remembers of its training.
    """

    means: list[Tensor]
    variances: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]


class Reader:
    """A forward pass of the teacher that gives the logits, and what is read by name.

    Args:
        module: gives the logits and a value for each name.
        names: of `READINGS`.
        checkpointing: what the pass computes on the way is not kept for backward, but computed again there.
    """

    def __init__(self, module: fx.GraphModule, names: tuple[str, ...], checkpointing: bool = False) -> None:
        self.module = module
        self.names = names
        self.checkpointing = checkpointing
        self.is_shared = False
        self._forward = in_pieces(module) if checkpointing else module

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits, values = self._forward(x)
        readings = {name: READINGS[name](value) for name, value in zip(self.names, values, strict=True)}
        if self.is_shared:
            for name, value in readings.items():
                if isinstance(value, BatchNormStatistics):
                    means, variances = ranks.moments(value.means, value.variances, value.running_means, len(x))
                    readings[name] = value._replace(means=means, variances=variances)
        return logits, readings

    def shared(self) -> "Reader":
        """The same for a rank's share of a batch; what it reads of statistics are those of the whole batch."""
        reader = copy.copy(self)
        reader.is_shared = True
        return reader


class Teacher(nn.Module):
    """The full-precision model P, frozen, in eval mode. `teacher(x)` gives logits `(N, classes)`.

    Args:
        module: the captured model, every BN of which also gives the moments of its input, in the same pass.
        readings: what can be read in a forward pass, as nodes of its graph: see `READINGS`.
        layers: names of the BN layers, in the order of "statistics".
        checkpointing: see `Reader`.
    """

    def __init__(
        self, module: fx.GraphModule, readings: dict[str, Any], layers: list[str], checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.layers = layers
        self.module = module.requires_grad_(False)
        self._readings = readings
        self._checkpointing = checkpointing
        self._readers: dict[tuple[str, ...], Reader] = {}

    def reader(self, names: Iterable[str]) -> Reader:
        """A forward pass that gives the logits and what `names` of `READINGS` stand for, with gradients to images."""
        names = tuple(sorted(set(names)))
        if names not in self._readers:
            self._readers[names] = Reader(self._rewrite(names), names, self._checkpointing)
        return self._readers[names]

    def read(self, x: Tensor, names: Iterable[str]) -> tuple[Tensor, dict[str, Any]]:
        return self.reader(names)(x)

    def front(self) -> Reader:
        """As `reader` of "first_statistics", computing no more than these need: None in place of the logits."""
        names = ("first_statistics",)
        return Reader(self._rewrite(names, logits=False), names)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(())(x)[0]

    def _rewrite(self, names: tuple[str, ...], logits: bool = True) -> fx.GraphModule:
        """The graph with what is wanted as its second output; all share the parameters."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.module.graph, copied)
        wanted = tuple(self._readings[name] for name in names)
        graph.output((result if logits else None, fx.node.map_arg(wanted, copied.__getitem__)))
        graph.set_codegen(fx.graph.CodeGen())
        graph.lint()
        module = fx.GraphModule(self.module, graph)
        if not logits:
            module.graph.eliminate_dead_code()
            module.recompile()
        return module


# What a term of a loss can declare to read, and what becomes of the nodes' values.
READINGS: dict[str, Callable[[Any], Any]] = {
    "statistics": lambda values: BatchNormStatistics(*values),  # of the input of every BN layer
    "first_statistics": lambda values: BatchNormStatistics(*values),  # of those that have no BN layer before them
    "features": lambda value: value,  # the last activation (N, C, ...) that has a spatial dimension
}


def build_teacher(captured: CapturedModel, checkpointing: bool = False) -> Teacher:
    """Rewrite the captured model so that every BN also gives the moments of its input, in the same pass.

    Args:
        checkpointing: see `Reader`.
    """
    module = copy.deepcopy(captured.module)
    graph = module.graph
    statistics, first = BatchNormStatistics([], [], [], []), BatchNormStatistics([], [], [], [])
    layers: list[str] = []
    behind: set[fx.Node] = set()  # a BN layer
    features = None
    for node in list(graph.nodes):
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
        if node.target is batch_norm_act:
            of = (statistics,) if node in behind else (statistics, first)
            *tensors, eps, act = node.args
            layers.append(node.meta.get("name") or name_of(node))
            with graph.inserting_before(node):
                fused = graph.call_function(gdfq_ext.batch_norm_act_moments, tuple(tensors), {"eps": eps, "act": act})
                y, mean, var = (graph.call_function(operator.getitem, (fused, i)) for i in range(3))
            y.meta = dict(node.meta)
            node.replace_all_uses_with(y)
            graph.erase_node(node)
            for lists in of:
                for values, value in zip(lists, (mean, var, *tensors[1:3]), strict=True):
                    values.append(value)
            behind.add(y)
            node = y
        if node.op != "get_attr" and _has_maps(node.meta.get("val")):
            features = node
    _bring_to_scale(module, statistics, first)
    call_ahead(module, "image_sizes", captured.sizes)
    graph.lint()
    readings = {"statistics": tuple(statistics), "first_statistics": tuple(first), "features": features}
    return Teacher(module, readings, layers, checkpointing)


def _has_maps(value: Any) -> bool:
    """Whether it is a tensor `(N, C, H, W)` of more than one pixel, or of a size that is known in the pass alone."""
    return guard_or_true(math.prod(getattr(value, "shape", ())[2:]) > 1)


def _bring_to_scale(module: fx.GraphModule, statistics: BatchNormStatistics, first: BatchNormStatistics) -> None:
    """Divide the first BN layers' statistics by a number where they are far larger or smaller than the other layers',
    as those of pixels in 0..255 are: squared, they would be all that a loss sees. The lists' nodes are replaced."""

    def mean_of(node: fx.Node) -> float:
        return operator.attrgetter(node.target)(module).mean().item()

    others = [mean_of(var) for var in statistics.running_vars if var not in first.running_vars]
    typical = torch.tensor(others).median().item() if others else 1.0
    for index, var in enumerate(first.running_vars):
        ratio = mean_of(var) / max(typical, 1e-30)
        excess = ratio / min(max(ratio, 1 / FAR), FAR)
        if excess == 1:
            continue
        for lists, number in zip(zip(statistics, first, strict=True), (excess**0.5, excess) * 2, strict=True):
            node = lists[1][index]
            with module.graph.inserting_after(node):
                scaled = module.graph.call_function(operator.truediv, (node, number))
            for values in lists:
                values[values.index(node)] = scaled
