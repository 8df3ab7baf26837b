"""What published tables of data-free quantization mean by "all layers quantized"."""

from gdfq.registry import TARGETS
from gdfq.target.target import Target

TARGETS["paper"] = Target(
    name="paper",
    help="the outputs of ReLU and ReLU6 only, by Eq. 6 as published; for published tables, not for a runtime",
    quantized=("relu_outputs",),
    unweighted_bits=None,
    activation_scheme="eq6",
    weight_scheme="eq6",
    carrier_bits=None,
    rounds_bias=False,
)
