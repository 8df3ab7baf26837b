"""Questions to the graph of a quantized model: which layer has which weight, bias and quantizer."""

import operator
from dataclasses import dataclass
from typing import NamedTuple

from torch import fx, nn

from gdfq.graph.nodes import WEIGHTED, preserves_values
from gdfq.nn import BatchNormAct, BatchNormActFakeQuantize, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from gdfq_ext import Scheme


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear layer of Q whose quantized weight is a stored parameter.

    Attributes:
        node: where Q's graph calls it.
        weight, bias: names of its parameters; `bias` is None where it has none.
        groups: of the convolution; 1 for a linear layer.
        quantizer: what quantizes its weight, together with others.
        index: which of them it is.
    """

    node: fx.Node
    weight: str
    bias: str | None
    groups: int
    quantizer: WeightFakeQuantize
    index: int

    @property
    def bits(self) -> int:
        return self.quantizer.bits[self.index]

    @property
    def scheme(self) -> Scheme:
        return self.quantizer.schemes[self.index]

    @property
    def is_stored(self) -> bool:
        """Whether its quantizer has a step and a rounding of its own (see `WeightFakeQuantize.store`)."""
        return str(self.index) in self.quantizer.stored


def quantized_layers(student: fx.GraphModule) -> list[QuantizedLayer]:
    """The layers of Q, from `build_quantized`, in the order of the forward pass; those are left out whose weight the
    graph computes, or stays float."""
    layers = []
    for node in student.graph.nodes:
        found = quantized_weight(student, node.args[1]) if node.target in WEIGHTED else None
        if found is not None and found.weight.op == "get_attr":
            bias = unrounded(student, node.args[2] if len(node.args) > 2 else None)
            groups = node.args[6] if len(node.args) > 6 else 1
            name = bias and str(bias.target)
            layers.append(QuantizedLayer(node, found.weight.target, name, groups, found.quantizer, found.index))
    return layers


class QuantizedWeight(NamedTuple):
    """What quantizes a weight, together with others; which of them it is; and the node of the weight itself."""

    quantizer: WeightFakeQuantize
    index: int
    weight: fx.Node


def quantized_weight(student: fx.GraphModule, value: fx.Node) -> QuantizedWeight | None:
    """Of what a layer of Q's graph reads as its weight: how it came about; None where it is not quantized."""
    call, index = value.args if value.target is operator.getitem else (None, 0)
    quantizer = called_by(student, call)
    return QuantizedWeight(quantizer, index, call.args[0][index]) if isinstance(quantizer, WeightFakeQuantize) else None


def unrounded(student: fx.GraphModule, bias: fx.Node | None) -> fx.Node | None:
    """The bias of a layer, or beta of a BN, as it is before a `BiasFakeQuantize` has rounded it."""
    if not isinstance(called_by(student, bias), BiasFakeQuantize):
        return bias
    _, of_layer, *of_batch_norm = bias.args
    return of_batch_norm[-1] if of_batch_norm else of_layer


def rounds_biases(student: fx.GraphModule) -> bool:
    """Whether Q rounds its biases to what integers can add."""
    return any(isinstance(module, BiasFakeQuantize) for module in student.modules())


def called_by(student: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    """The module that `node` of Q's graph calls, if it calls one."""
    return student.get_submodule(node.target) if node is not None and node.op == "call_module" else None


def batch_norm_of(student: fx.GraphModule, node: fx.Node | None) -> BatchNormAct | None:
    """The BN that `node` of Q's graph calls, alone or in one pass with a quantizer."""
    module = called_by(student, node)
    module = module.batch_norm_act if isinstance(module, BatchNormActFakeQuantize) else module
    return module if isinstance(module, BatchNormAct) else None


def quantizer_of(student: fx.GraphModule, node: fx.Node | None) -> FakeQuantize | None:
    """The quantizer that `node` of Q's graph calls, alone or in one pass with a BN."""
    module = called_by(student, node)
    module = module.quantizer if isinstance(module, BatchNormActFakeQuantize) else module
    return module if isinstance(module, FakeQuantize) else None


def quantizer_behind(student: fx.GraphModule, value: fx.Node) -> FakeQuantize | None:
    """The quantizer on whose grid `value` is: what is only moved or picked from its result, too."""
    while preserves_values(value):
        value = value.all_input_nodes[0]
    return quantizer_of(student, value)
