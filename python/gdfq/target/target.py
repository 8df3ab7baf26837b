"""The record that a target is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gdfq.config import LayerBits
from gdfq.registry import TARGETS


@dataclass(frozen=True)
class Target:
    """What a runtime can do. Making one makes it known to the setting `quantizer.target`.

    Attributes:
        name: of the target.
        help: what it is for, a line.
        activations: what it quantizes: `layer_inputs`, the input of every convolution and linear layer and both inputs
            of every residual add, which is what an integer runtime reads; `relu_outputs`, those of ReLU and ReLU6.
        layers: bits of single layers by name pattern, as the setting `quantizer.layers`, which has the last word.
    """

    name: str
    help: str
    activations: Literal["layer_inputs", "relu_outputs"] = "layer_inputs"
    layers: Mapping[str, LayerBits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TARGETS[self.name] = self
