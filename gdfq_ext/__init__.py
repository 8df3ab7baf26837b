"""Fused operators for data-free quantization: Eq. 5, 6 and 10 of GDFQ (ECCV 2020) with their gradients.

Every op works in pure PyTorch; a compiled library, where there is one, takes over its CPU and CUDA kernels.
`backend_report()` says which is used.
"""

from pathlib import Path

from . import autograd, reference
from ._loader import load_library as _load_library
from .backend import BackendReport
from .backend import report as _report
from .learned import fake_quantize_learned, round_learned
from .losses import bns_loss, distillation_loss
from .ops import (
    batch_norm_act_fake_quantize,
    batch_norm_act_moments,
    conditional_batch_norm_act,
    count_changed_codes,
    fake_quantize,
    fake_quantize_weight,
    fake_quantize_weights,
    observe_range,
)
from .quantizer import Grid, Scheme, code_bounds, quantizer_grid

__all__ = [
    "BackendReport",
    "Grid",
    "Scheme",
    "autograd",
    "backend_report",
    "batch_norm_act_fake_quantize",
    "batch_norm_act_moments",
    "bns_loss",
    "build_info",
    "code_bounds",
    "conditional_batch_norm_act",
    "count_changed_codes",
    "distillation_loss",
    "fake_quantize",
    "fake_quantize_learned",
    "fake_quantize_weight",
    "fake_quantize_weights",
    "observe_range",
    "quantizer_grid",
    "reference",
    "round_learned",
]

_loaded = _load_library(Path(__file__).parent)


def backend_report() -> BackendReport:
    """Which backend every op uses on the CPU and on CUDA, and why: `str()` for reading, `.as_dict()` for JSON."""
    return _report(_loaded)


def build_info() -> dict:
    """How the compiled library was built: compiler, flags, torch, CUDA architectures; empty where there is none."""
    stamp = _loaded.stamp
    try:
        from . import _build_info  # type: ignore[attr-defined]
    except ImportError:  # it is bound to one version of Python, the library to none
        return stamp
    info = {name: value for name, value in vars(_build_info).items() if not name.startswith("_")}
    is_of_the_library = all(stamp.get(name, value) == value for name, value in info.items())
    return info if is_of_the_library else stamp
