"""What runs in ONNX Runtime's integer kernels."""

from gdfq.target.target import Target

ONNX = Target(
    name="onnx",
    help="the input of every convolution and linear layer and both inputs of every residual add, as integers need it",
)
