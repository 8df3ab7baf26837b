"""Swing convolution (GENIE, Jeon et al., CVPR 2023): P as images are optimized through it.

A strided convolution reads some places of its input through fewer of its weights than others, the same ones every time,
and optimized images show that as a checkerboard. So its input is padded by reflection, stride - 1 on every side, and
cut back at a place that is drawn anew in every forward pass.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from gdfq.graph.added import free_name
from gdfq.graph.nodes import CONVOLUTIONS, op_of
from gdfq.graph.teacher import Reader


class Swing(nn.Module):
    """Images `(N, C, H, W)` padded and cut back to their size at random, all of a batch at the same place.

    Args:
        strides: of rows and columns.
        random: on the CPU; what the place is drawn from.
    """

    def __init__(self, strides: tuple[int, int], random: torch.Generator) -> None:
        super().__init__()
        self.strides = strides
        self.random = random

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._margins(*side) for side in zip(x.shape[2:], self.strides, strict=True))
        return F.pad(x, (*columns, *rows), mode="reflect")

    def _margins(self, size: int, stride: int) -> tuple[int, int]:
        """What is added at both ends, and cut off where it is below 0."""
        most = min(stride, size) - 1
        place = int(torch.randint(2 * most + 1, (), generator=self.random))
        return most - place, place - most

    def extra_repr(self) -> str:
        return f"strides={self.strides}"


def swinging(reader: Reader, random: torch.Generator) -> Reader:
    """The same forward pass, with the input of every strided 2-D convolution swung; the parameters are shared.

    Args:
        random: on the CPU; all places are drawn from it.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(reader.module.graph, {}))
    module = fx.GraphModule(reader.module, graph)
    for node in list(graph.nodes):
        rows, columns = _strides(node)
        if max(rows, columns) == 1:
            continue
        name = free_name(module, f"swing_{node.name}")
        module.add_module(name, Swing((rows, columns), random))
        padding = node.args[0]  # of its own, where the layer's is not the same on all sides
        reads = padding if op_of(padding) in ("constant_pad_nd", "pad") and len(padding.users) == 1 else node
        with graph.inserting_before(reads):
            reads.update_arg(0, graph.call_module(name, (reads.args[0],)))
    module.recompile()
    return Reader(module, reader.names, reader.checkpointing)


def _strides(node: fx.Node) -> tuple[int, int]:
    """Of a 2-D convolution; of all others 1."""
    if CONVOLUTIONS.get(node.target) != "conv2d" or len(node.args) < 4:
        return 1, 1
    rows, columns = node.args[3] * (2 // len(node.args[3]))
    return rows, columns
