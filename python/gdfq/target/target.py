"""The record that a target is, and where the settings' one comes from."""

from typing import Literal, get_args

from pydantic import Field, ValidationError

from gdfq.config import Config, LayerBits, QuantizerConfig, Section, explained
from gdfq.errors import GdfqError
from gdfq.registry import CHECKS, TARGETS
from gdfq_ext import Scheme

Place = Literal["relu_outputs", "layer_inputs", "sum_inputs", "average_pool_inputs", "concatenation_inputs"]


class Target(Section):
    """What a runtime can do, which the quantizer obeys while it trains."""

    name: str
    help: str = Field("", description="what it is for, a line")
    quantized: tuple[Place, ...] = Field(
        get_args(Place)[1:], description=f"which activations: those of {', '.join(get_args(Place))}"
    )
    unweighted_bits: int | None = Field(
        8,
        ge=2,
        le=8,
        description="that activations have at least which no weight is multiplied with, but sums, average pools and "
        "concatenations alone read: those of the bytes that they are in",
    )
    activation_scheme: Scheme = Field(
        "affine",
        description="how a range is made into levels: affine, round(x / step) + zero point, zero in the range; "
        "symmetric, the same with zero point 0 and as many levels above as below; eq6, as GDFQ's paper has it",
    )
    weight_scheme: Scheme = Field("affine", description="the same for weights, per output channel")
    carrier_bits: int | None = Field(
        8,
        description="a runtime reads weights as signed integers of so many bits, code minus zero point; weights of as "
        "many bits are symmetric, since that would not fit",
    )
    most_weight_bits: int = Field(8, ge=2, le=8, description="that a weight can have")
    rounds_bias: bool = Field(True, description="whether biases are multiples of the input's step times the weight's")
    layers: dict[str, LayerBits] = Field(
        {},
        description="bits of single layers by name pattern, as the setting quantizer.layers, which has the last word",
    )

    def scheme_of_weight(self, bits: int) -> Scheme:
        """How a weight of so many bits is quantized."""
        is_too_wide = self.weight_scheme == "affine" and self.carrier_bits is not None and bits >= self.carrier_bits
        return "symmetric" if is_too_wide else self.weight_scheme


def target_of(config: QuantizerConfig) -> Target:
    """The target that `quantizer.target` means: one by name, or a table of one's own, which says what differs from the
    target that its key `extends` names (default: onnx).

    Raises:
        GdfqError: a key or a value that a target does not have.
    """
    if isinstance(config.target, str):
        return _named(config.target, "quantizer.target")
    table = dict(config.target)
    base = _named(table.pop("extends", "onnx"), "quantizer.target.extends")
    try:
        return Target.model_validate(base.model_dump() | {"name": f"{base.name}, changed"} | table)
    except ValidationError as error:
        raise GdfqError(explained(error, Target, "quantizer.target.")) from None


def _named(name: str, setting: str) -> Target:
    if name not in TARGETS:
        raise GdfqError(f"setting '{setting}': there is no '{name}'; there are: {', '.join(TARGETS)}, or a TOML file")
    return TARGETS[name]


def _check(config: Config) -> None:
    target = target_of(config.quantizer)
    of_layers = [*target.layers.values(), *config.quantizer.layers.values()]
    most = max([config.quantizer.weight_bits, *(bits.weights for bits in of_layers if bits.weights != "float")])
    if most > target.most_weight_bits:
        raise GdfqError(
            f"target '{target.name}' holds weights of at most {target.most_weight_bits} bits, and {most} are asked "
            "for: lower quantizer.weight_bits or those in quantizer.layers, or take another target (gdfq targets)"
        )


CHECKS.append(_check)
