"""From Q to a file that runs in integers."""

from gdfq.deploy.writer import Normalization, QuantizedTensor, Written, WrittenLayer, write

__all__ = ["Normalization", "QuantizedTensor", "Written", "WrittenLayer", "write"]
