"""The public functions of what block reconstruction learns; what `ops.py` says holds for them, too."""

import torch
from torch import Tensor

from ._checks import (
    check_bits,
    check_choice,
    check_device,
    check_float32,
    check_input,
    check_shape,
    check_step,
    check_weight,
    dense,
    float_parameter,
)
from ._schemas import SCHEMES, dense_format
from .quantizer import Scheme, code_bounds

_ops = torch.ops.gdfq_ext


def fake_quantize_learned(
    x: Tensor, step: Tensor, zero_point: Tensor, bits: int,
    *, scheme: Scheme = "affine", choice: Tensor | None = None, keep: float = 0.5,
    step_gradient_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Rounds activations to multiples of a learned step (LSQ, ICLR 2020), or at random not (QDrop, ICLR 2022).

        q = clamp(round(x / step), low, high)        low = lowest - zero_point        high = highest - zero_point
        y = x where choice < round(256 * keep), else q * step

    in float32 and in this order, `round` half to even, with the codes from lowest to highest of `code_bounds`. NaN in
    `x` stays NaN; an infinite `x` takes the end level; a step that is not above 0 gives NaN. The gradients are
    straight-through:

        dy/dx = 1 where x was kept or q was not clamped, else 0
        dy/dstep = step_gradient_scale * (q - x / step where q was not clamped, else q), 0 where x was kept

    Args:
        x: any shape; float32, float16 or bfloat16.
        step: one element.
        zero_point: the code of 0, one of the codes; one element, an integer of any type. Takes no gradient.
        bits: k, 2..8.
        scheme: whose codes: 0 to 2^k - 1 of "eq6" and "affine", or those of "symmetric".
        choice: uint8, of the shape of `x`: random bytes, drawn by the caller, so that a CUDA graph or a run that goes
            on draws as it should. None: everything is quantized.
        keep: the share of `x` that stays as it is, 0..1 in steps of 1/256; without `choice` nothing does.
        step_gradient_scale: None for LSQ's 1 / sqrt(x.numel() * highest).

    Returns:
        y, with the shape and type of `x`.

    Raises:
        TypeError: `x` is not of an allowed type, or `choice` is not uint8.
        ValueError: `bits`, `scheme` or `keep` is out of range, or another tensor has the wrong shape or device.
    """
    check_input("x", x)
    check_bits(bits)
    check_choice("scheme", scheme, SCHEMES)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; allowed is 0 <= keep <= 1")
    step = check_step(step, 1, x)
    zero_point = float_parameter("zero_point", zero_point.detach(), 1, x)
    x = dense(x)
    if choice is not None:
        if choice.dtype != torch.uint8:
            raise TypeError(f"choice is {choice.dtype}; allowed is torch.uint8")
        check_shape("choice", choice, tuple(x.shape))
        check_device("choice", choice, x)
        choice = choice.contiguous(memory_format=dense_format(x))
    lowest, highest = code_bounds(bits, scheme)
    if step_gradient_scale is None:
        step_gradient_scale = max(x.numel() * highest, 1) ** -0.5
    return _ops.fake_quantize_learned(
        x, step, zero_point, choice, lowest, highest, round(256 * keep), step_gradient_scale
    )


def round_learned(
    base: Tensor, v: Tensor, step: Tensor, zero_point: Tensor, sharpness: Tensor, bits: int,
    *, scheme: Scheme = "affine",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A weight whose rounding is learned (AdaRound, ICML 2020), and the penalty that makes it up or down in the end.

        h = clamp(1.2 * sigmoid(v) - 0.1, 0, 1)        low = lowest - zero_point_c        high = highest - zero_point_c
        y = clamp(base + h, low, high) * step_c        penalty = sum 1 - |2 h - 1|^sharpness

    in float32, with the codes from lowest to highest of `code_bounds`. A channel whose step is not above 0 is NaN.
    Gradients go to `v`, from both results, and to `step` (as GENIE trains it, CVPR 2023): a clamp passes none to `v`.

    Args:
        base: `(channels, ...)` float32, integers: the weight divided by its step, rounded down.
        v: float32, of the shape of `base`: what is learned.
        step: `(channels,)`.
        zero_point: the code of 0, `(channels,)`, integers of any type. Takes no gradient.
        sharpness: b, one element, at least 1; on the device, where it is read. Takes no gradient.
        bits: k, 2..8.
        scheme: whose codes: 0 to 2^k - 1 of "eq6" and "affine", or those of "symmetric".

    Returns:
        y, float32, with the shape of `base`; penalty, a float32 scalar.

    Raises:
        TypeError: `base` or `v` is not float32.
        ValueError: `bits` or `scheme` is out of range, or another tensor has the wrong shape or device.
    """
    check_float32("base", base)
    check_weight("base", base)
    check_float32("v", v)
    check_shape("v", v, tuple(base.shape))
    check_device("v", v, base)
    check_bits(bits)
    check_choice("scheme", scheme, SCHEMES)
    step = check_step(step, base.shape[0], base)
    zero_point = float_parameter("zero_point", zero_point.detach(), base.shape[0], base)
    sharpness = float_parameter("sharpness", sharpness.detach(), 1, base)
    base = dense(base.detach())
    v = v.contiguous(memory_format=dense_format(base))
    return _ops.round_learned(base, v, step, zero_point, sharpness, *code_bounds(bits, scheme))
