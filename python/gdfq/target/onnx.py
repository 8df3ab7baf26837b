"""What runs in ONNX Runtime's integer kernels."""

from gdfq.registry import TARGETS
from gdfq.target.target import Target

TARGETS["onnx"] = Target(
    name="onnx",
    help="ONNX Runtime's integers: all that layers, sums, average pools and concatenations read, zero in every range",
)
TARGETS["int4-symmetric"] = Target(
    name="int4-symmetric",
    help="as onnx, weights in signed integers of at most 4 bits around zero, -7 to 7, as accelerators take them",
    weight_scheme="symmetric",
    most_weight_bits=4,
)
