"""What published tables of data-free quantization mean by "all layers quantized"."""

from gdfq.target.target import Target

PAPER = Target(
    name="paper", help="the outputs of ReLU and ReLU6 only, as in published tables", activations="relu_outputs"
)
