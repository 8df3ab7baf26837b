"""The user's model as a graph, and its two rewritings: the teacher and the quantized model."""

from gdfq.graph.capture import CapturedModel, capture, stated_channels, stated_size, unwrapped
from gdfq.graph.pixels import Pixels
from gdfq.graph.quantize import build_quantized
from gdfq.graph.query import QuantizedLayer, quantized_layers, quantizer_of
from gdfq.graph.scale import infer, pixels_of
from gdfq.graph.summary import Summary, size_in_bytes
from gdfq.graph.swing import swinging
from gdfq.graph.teacher import BatchNormStatistics, Teacher, build_teacher

__all__ = [
    "BatchNormStatistics",
    "CapturedModel",
    "Pixels",
    "QuantizedLayer",
    "Summary",
    "Teacher",
    "build_quantized",
    "build_teacher",
    "capture",
    "infer",
    "pixels_of",
    "quantized_layers",
    "quantizer_of",
    "size_in_bytes",
    "stated_channels",
    "stated_size",
    "swinging",
    "unwrapped",
]
