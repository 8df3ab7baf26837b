"""The quantizers of other libraries, as their users call them: Brevitas, torchao, NVIDIA ModelOpt.

A library that does not import is left out of a run, with the reason. All get scale and zero point ready made; of the
weight quantizers finding the range is part.
"""

import contextlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

LIBRARIES = {"brevitas": "brevitas.nn", "torchao": "torchao.quantization", "modelopt": "modelopt.torch.quantization"}


@dataclass(frozen=True)
class Affine:
    """One quantizer of 2^bits levels from 0: y = (clamp(round(x / scale) + zero_point) - zero_point) * scale.

    The ranges of the cases are whole numbers of steps with zero among them, so that symmetric quantizers, which know
    no zero point, compute the same.
    """

    scale: Tensor
    """(1,), or (C,) with `axis`."""
    zero: int
    """The level of 0: half of the levels for signed values, 0 for values that are never negative."""
    bits: int
    axis: int | None = None

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def lower(self) -> Tensor:
        return -self.zero * self.scale

    @property
    def upper(self) -> Tensor:
        return (self.levels - 1 - self.zero) * self.scale

    def zero_points(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full_like(self.scale, self.zero, dtype=dtype)

    def along(self, values: Tensor, x: Tensor) -> Tensor:
        """`values` shaped to broadcast against `x`."""
        return values if self.axis is None else values.view([-1 if d == self.axis else 1 for d in range(x.dim())])


@cache
def why_missing(library: str) -> str | None:
    """None where the library imports, else the reason that it does not."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # notes on extensions of theirs that no case uses
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import_module(LIBRARIES[library])
    except Exception as error:  # whatever their import runs into
        return first_line(error)
    finally:
        logging.disable(previous)
    return None


def first_line(error: Exception) -> str:
    """Kind and first line of an error of somebody else's."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def quantizer(library: str, affine: Affine, x: Tensor, clipped: bool) -> Callable[[Tensor], Tensor]:
    """The library's quantizer for inputs like `x`; only Brevitas can pass the gradient of clipped values."""
    return {"brevitas": _brevitas, "torchao": _torchao, "modelopt": _modelopt}[library](affine, x, clipped)


def weight_quantizer(library: str, weight: Tensor, bits: int) -> Callable[[], Tensor] | None:
    """The library's asymmetric quantizer of `weight` (out, in, h, w) per output channel; None where it has none."""
    maker = {"brevitas": _brevitas_weight, "torchao": _torchao_weight}.get(library)
    return maker and maker(weight, bits)


def _brevitas(affine: Affine, x: Tensor, clipped: bool) -> Callable[[Tensor], Tensor]:
    from brevitas.core.function_wrapper import Identity, TensorClamp, TensorClampSte
    from brevitas.core.quant import IntQuant

    clamp = TensorClamp() if clipped else TensorClampSte()
    module = IntQuant(narrow_range=False, signed=False, input_view_impl=Identity(), tensor_clamp_impl=clamp)
    scale, zero_point = affine.along(affine.scale, x), affine.along(affine.zero_points(torch.float32), x)
    bit_width = affine.scale.new_tensor(float(affine.bits))
    return lambda x: module(scale, zero_point, bit_width, x).to(x.dtype)


def _torchao(affine: Affine, x: Tensor, clipped: bool) -> Callable[[Tensor], Tensor]:
    from torchao.quantization.quant_primitives import _fake_quantize_affine

    block = tuple(1 if dim == affine.axis else size for dim, size in enumerate(x.shape))
    parameters = affine.scale, affine.zero_points(), torch.int32, 0, affine.levels - 1
    return lambda x: _fake_quantize_affine(x, block, *parameters)


def _modelopt(affine: Affine, x: Tensor, clipped: bool) -> Callable[[Tensor], Tensor]:
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant

    largest, unsigned = affine.along(affine.upper, x), affine.zero == 0
    return lambda x: fake_tensor_quant(x, largest, None, affine.bits, unsigned, False)


def _brevitas_weight(weight: Tensor, bits: int) -> Callable[[], Tensor]:
    from brevitas.nn import QuantConv2d
    from brevitas.quant import ShiftedUint8WeightPerChannelFloat

    outputs, inputs, *kernel = weight.shape
    layer = QuantConv2d(
        inputs, outputs, tuple(kernel), bias=False,
        weight_quant=ShiftedUint8WeightPerChannelFloat, weight_bit_width=bits,
    ).to(weight)  # fmt: skip
    layer.weight = weight
    return lambda: layer.quant_weight().value


def _torchao_weight(weight: Tensor, bits: int) -> Callable[[], Tensor]:
    from torchao.quantization.quant_primitives import MappingType, _fake_quantize_affine, choose_qparams_affine

    block, levels = (1, *weight.shape[1:]), (torch.int32, 0, 2**bits - 1)
    types = {"scale_dtype": torch.float32, "zero_point_dtype": torch.int32}

    def quantize() -> Tensor:
        scale, zero_point = choose_qparams_affine(weight.detach(), MappingType.ASYMMETRIC, block, *levels, **types)
        return _fake_quantize_affine(weight, block, scale, zero_point, *levels)

    return quantize
