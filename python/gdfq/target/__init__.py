"""Targets: what a runtime can do, which the quantizer obeys while it trains."""

from gdfq.target import onnx, paper  # noqa: F401 - they register themselves
from gdfq.target.target import Target, target_of

__all__ = ["Target", "target_of"]
