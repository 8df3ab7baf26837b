"""The public functions: checked arguments, documented shapes, one call of an op each.

All take float32, float16 or bfloat16 and compute in float32. A 4-D tensor in `channels_last` stays so; any other layout
that is not contiguous is made contiguous once. Ranges, statistics and BN parameters may have any floating type and are
converted to float32. Gradients can be taken once (no double backward through the ops, apart from the identity
straight-through quantizer, which is linear in the gradient).

Nothing waits for the device, so values are not looked at: a range that is inverted or not finite gives NaN, as does a
label out of range. With GDFQ_CHECK=1 in the environment they are read, and what is wrong is named.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._checks import (
    batch_norm_parameters,
    bits_of_each,
    check_axis,
    check_bits,
    check_channels,
    check_choice,
    check_device,
    check_float32,
    check_floating,
    check_input,
    check_labels,
    check_shape,
    check_state,
    check_weight,
    dense,
    float_parameter,
    range,
    schemes_of_each,
)
from ._schemas import ACTIVATIONS, SCHEMES, dense_format
from .quantizer import Scheme
from .reference import channel_range

StraightThrough = Literal["identity", "clipped"]
Activation = Literal["none", "relu", "relu6"]

_ops = torch.ops.gdfq_ext


def fake_quantize(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    *,
    axis: int | None = None,
    scheme: Scheme = "eq6",
    straight_through: StraightThrough = "identity",
) -> Tensor:
    """Rounds `x` to the values of a quantizer with a given range, at most `2**bits`.

    "eq6" (GDFQ, ECCV 2020, Eq. 6):

        scale = (2^k - 1) / max(u - l, 1e-8)        zero = round(scale * l) + 2^(k-1)
        q = clamp(round(scale * x - zero), -2^(k-1), 2^(k-1) - 1)        y = (q + zero) / scale

    "affine" and "symmetric" have 0 among their values, and are what ONNX's QuantizeLinear and DequantizeLinear compute:

        q = clamp(round(x / step), low, high)        y = q * step
        affine: step = max(max(u, 0) - min(l, 0), 1e-8) / (2^k - 1)        zero_point = round(-min(l, 0) / step)
            low = -zero_point        high = 2^k - 1 - zero_point
        symmetric: step = max(-l, u, 5e-9) / (2^(k-1) - 1)        high = -low = 2^(k-1) - 1

    in float32 and in this order, `round` half to even. NaN in `x` stays NaN; an infinite `x` takes the end level. An
    inverted, infinite or NaN range gives NaN. The gradient of `x` is straight-through; the range takes none.

    Args:
        x: any shape; float32, float16 or bfloat16.
        lower: l; one element, or `(x.shape[axis],)` with `axis`.
        upper: u; like `lower`.
        bits: k, 2..8.
        axis: the dimension that has a range of its own per index; None: one range for the tensor.
        scheme: "eq6", "affine" or "symmetric".
        straight_through: "identity" passes the gradient unchanged; "clipped" makes it zero where the rounded level was
            clamped.

    Returns:
        y, with the shape and type of `x`.

    Raises:
        TypeError: `x` is not of an allowed type.
        ValueError: `bits`, `axis`, `scheme` or `straight_through` is out of range, or a range has the wrong number of
            elements or device.
    """
    check_input("x", x)
    check_bits(bits)
    check_choice("scheme", scheme, SCHEMES)
    check_choice("straight_through", straight_through, ("identity", "clipped"))
    axis = -1 if axis is None else check_axis(axis, x)
    count = 1 if axis < 0 else x.shape[axis]
    lower, upper = range(lower, upper, count, x)
    x = dense(x)
    if straight_through == "clipped" and torch.is_grad_enabled() and x.requires_grad:
        return _ops.fake_quantize_clipped(x, lower, upper, bits, SCHEMES[scheme], axis)[0]
    return _ops.fake_quantize(x, lower, upper, bits, SCHEMES[scheme], axis)


def fake_quantize_weight(
    weight: Tensor, bits: int, *, scheme: Scheme = "eq6", straight_through: StraightThrough = "identity"
) -> Tensor:
    """Quantizes a weight per output channel, each with its own minimum and maximum as the range.

    The ranges are taken anew in every call and take no gradient. A channel that holds NaN or Inf becomes NaN.

    Args:
        weight: `(out_channels, ...)`; float32, float16 or bfloat16.
        bits: k, 2..8.
        scheme: see `fake_quantize`.
        straight_through: see `fake_quantize`. With "clipped" only the rare maximum that rounds past the top level has
            no gradient.

    Returns:
        The quantized weight, with the shape and type of `weight`.

    Raises:
        TypeError, ValueError: as `fake_quantize`; ValueError also for a 0-dimensional weight.
    """
    return fake_quantize_weights([weight], bits, scheme=scheme, straight_through=straight_through)[0]


def fake_quantize_weights(
    weights: Sequence[Tensor], bits: int | Sequence[int],
    *, scheme: Scheme | Sequence[Scheme] = "eq6", straight_through: StraightThrough = "identity",
) -> list[Tensor]:  # fmt: skip
    """`fake_quantize_weight` for all layers in one call.

    Args:
        weights: tensors of any shapes and allowed types, on one device.
        bits: one value for all, or one per weight.
        scheme: one for all, or one per weight; see `fake_quantize`.
        straight_through: see `fake_quantize_weight`.

    Returns:
        The quantized weights, in order.

    Raises:
        TypeError, ValueError: as `fake_quantize_weight`; ValueError also where the length of `bits` or `scheme` is
            not that of `weights`.
    """
    weights = list(weights)
    bits = bits_of_each(bits, weights)
    schemes = schemes_of_each(scheme, weights)
    check_choice("straight_through", straight_through, ("identity", "clipped"))
    for index, (weight, weight_bits) in enumerate(zip(weights, bits, strict=True)):
        check_weight(f"weights[{index}]", weight)
        check_device(f"weights[{index}]", weight, weights[0])
        check_bits(weight_bits)
    if not weights:
        return []
    if straight_through == "clipped":
        each = [scheme] * len(weights) if isinstance(scheme, str) else scheme
        return [
            fake_quantize(w, *channel_range(w), k, axis=0, scheme=s, straight_through=straight_through)
            if w.numel()
            else w.clone()
            for w, k, s in zip(weights, bits, each, strict=True)
        ]
    return _ops.fake_quantize_weights([dense(weight) for weight in weights], bits, schemes)


def count_changed_codes(
    weights: Sequence[Tensor], directions: Sequence[Tensor], bits: int | Sequence[int], learning_rate: Tensor,
    kappas: Tensor, *, scheme: Scheme | Sequence[Scheme] = "eq6",
) -> Tensor:  # fmt: skip
    """How many integer codes of every weight a step would change, for several sizes of the step.

        code(w) = q, the clamped level that `fake_quantize_weight` rounds w to
        count of kappa = number of elements where code(w - kappa * learning_rate * d) != code(w)

    with the ranges of w, from before the step, in both: what AIT (CVPR 2022) chooses the size of its steps by. In
    float32, each operation rounded on its own. Where a channel or its step is not finite, NaN counts as changed.

    Args:
        weights: w, `(out_channels, ...)` float32 each, on one device.
        directions: d, float32, one for each weight and of its shape.
        bits: k, 2..8; one value for all, or one per weight.
        learning_rate: one element, floating; on the device, where it is read.
        kappas: `(K,)`, floating, K from 1 to 16.
        scheme: one for all, or one per weight; see `fake_quantize`.

    Returns:
        `(len(weights), K)` int64. No gradient, and nothing waits for the device.

    Raises:
        TypeError: a weight or a direction is not float32, or another tensor not floating.
        ValueError: lengths, shapes, devices, `bits` or `scheme` do not fit.
    """
    weights, directions = list(weights), list(directions)
    bits = bits_of_each(bits, weights)
    schemes = schemes_of_each(scheme, weights)
    if len(directions) != len(weights):
        raise ValueError(f"directions has {len(directions)} tensors for {len(weights)} weights; give one for each")
    check_floating("learning_rate", learning_rate)
    check_floating("kappas", kappas)
    if kappas.dim() != 1 or not 1 <= kappas.numel() <= 16:
        raise ValueError(f"kappas has shape {tuple(kappas.shape)}; allowed is (K,), K from 1 to 16")
    for index, (weight, direction, weight_bits) in enumerate(zip(weights, directions, bits, strict=True)):
        for name, tensor in ((f"weights[{index}]", weight), (f"directions[{index}]", direction)):
            check_float32(name, tensor)
            check_device(name, tensor, kappas)
        check_weight(f"weights[{index}]", weight)
        check_shape(f"directions[{index}]", direction, tuple(weight.shape))
        check_bits(weight_bits)
    weights = [dense(weight.detach()) for weight in weights]
    pairs = zip(directions, weights, strict=True)
    directions = [direction.detach().contiguous(memory_format=dense_format(weight)) for direction, weight in pairs]
    learning_rate = float_parameter("learning_rate", learning_rate.detach(), 1, kappas)
    kappas = kappas.detach().float().contiguous()
    return _ops.count_changed_codes(weights, directions, bits, schemes, learning_rate, kappas)


def observe_range(x: Tensor, state: Tensor, momentum: float = 0.9) -> Tensor:
    """Takes the minimum and maximum of `x` into an exponential moving average and returns the corrected range.

    `state` keeps raw averages, `average = m * average + (1 - m) * new` from 0, and the weight that they have gathered,
    `weight = m * weight + (1 - m)`; the range is average / weight, unbiased from the first batch on.

    Args:
        x: any shape; float32, float16 or bfloat16. Empty: the state stays as it is. NaN makes the range NaN for good.
        state: `(3,)` float32, contiguous: [average of min, average of max, weight]. Zeros at first, updated in place.
        momentum: m, in [0, 1).

    Returns:
        `(2,)` float32: [lower, upper]. No gradient.

    Raises:
        TypeError: `x` or `state` is not of an allowed type.
        ValueError: `state` has another shape or device, or `momentum` is out of range.
    """
    check_input("x", x)
    check_state(state)
    check_device("state", state, x)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; allowed is 0 <= momentum < 1")
    return _ops.observe_range(dense(x.detach() if x.requires_grad else x), state, momentum)


def batch_norm_act_fake_quantize(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    lower: Tensor, upper: Tensor, bits: int,
    *, eps: float = 1e-5, act: Activation = "none", scheme: Scheme = "eq6",
    straight_through: StraightThrough = "identity",
) -> Tensor:  # fmt: skip
    """Frozen batch normalization, activation and per-tensor quantizer in one pass.

        scale_c = weight * (1 / sqrt(running_var + eps))        shift_c = bias - running_mean * scale_c
        z = x * scale_c + shift_c        y = fake_quantize(act(z), lower, upper, bits, scheme=scheme)

    in float32, each operation rounded on its own. `running_mean` and `running_var` are not updated. Gradients go to
    `x`, `weight` and `bias`; the backward saves `x` alone and recomputes z.

    Args:
        x: `(N, C, *spatial)`, `(N, C)` included; float32, float16 or bfloat16.
        running_mean: `(C,)`.
        running_var: `(C,)`.
        weight: gamma, `(C,)`, or None for 1.
        bias: beta, `(C,)`, or None for 0.
        lower: l, one element.
        upper: u, one element.
        bits: k, 2..8.
        eps: added to the variance.
        act: "none", "relu" or "relu6"; its gradient is zero at the kinks.
        scheme: see `fake_quantize`.
        straight_through: see `fake_quantize`.

    Returns:
        y, with the shape and type of `x`.

    Raises:
        TypeError: `x` is not of an allowed type.
        ValueError: another argument has a wrong shape, value or device.
    """
    check_channels(x)
    check_bits(bits)
    check_choice("act", act, ACTIVATIONS)
    check_choice("scheme", scheme, SCHEMES)
    check_choice("straight_through", straight_through, ("identity", "clipped"))
    parameters = batch_norm_parameters(x, running_mean, running_var, weight, bias)
    lower, upper = range(lower, upper, 1, x)
    return _ops.batch_norm_act_fake_quantize(
        dense(x), *parameters, lower, upper, bits, SCHEMES[scheme], eps, ACTIVATIONS[act], straight_through == "clipped"
    )


def batch_norm_act_moments(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    *, eps: float = 1e-5, act: Activation = "none",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Frozen batch normalization and activation, with the statistics of the BN input for Eq. 5, in one read of `x`.

    y is computed as in `batch_norm_act_fake_quantize`, without the quantizer. Gradients go to `x`, from all three
    results. `weight` and `bias` belong to a frozen teacher and take none.

    Args:
        x: `(N, C, *spatial)`, `(N, C)` included; float32, float16 or bfloat16.
        running_mean, running_var, weight, bias, eps, act: as `batch_norm_act_fake_quantize`.

    Returns:
        y, with the shape and type of `x`; mean and biased variance of `x` per channel over N and the spatial
        dimensions, `(C,)` float32, NaN for empty `x`.

    Raises:
        TypeError: `x` is not of an allowed type.
        ValueError: another argument has a wrong shape, value or device, or `weight` or `bias` requires a gradient.
    """
    check_channels(x)
    check_choice("act", act, ACTIVATIONS)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which batch_norm_act_moments does not compute: the teacher is frozen; "
                "call requires_grad_(False) on its parameters"
            )
    parameters = batch_norm_parameters(x, running_mean, running_var, weight, bias)
    return _ops.batch_norm_act_moments(dense(x), *parameters, eps, ACTIVATIONS[act])


def conditional_batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, running_mean: Tensor, running_var: Tensor,
    *, momentum: float = 0.1, eps: float = 1e-5, negative_slope: float = 1.0,
) -> Tensor:  # fmt: skip
    """Training batch normalization whose gamma and beta are chosen by each sample's label, and LeakyReLU.

        xhat = (x - mean_c) / sqrt(var_c + eps)        z = weight[label_n, c] * xhat + bias[label_n, c]
        y = z where z >= 0, else negative_slope * z

    with the mean and the biased variance of the batch (categorical conditional batch normalization, as in the paper's
    generator for ImageNet; with one class it is the ordinary kind). Gradients go to `x`, `weight` and `bias`.

    Args:
        x: `(N, C, *spatial)`, `(N, C)` included, more than one element per channel, or empty; float32, float16 or
            bfloat16.
        weight, bias: gamma and beta, `(classes, C)` float32.
        labels: `(N,)` int64, each in 0..classes-1; another value makes its sample NaN, and all gradients of `x`
            (checking it would wait for the device).
        running_mean, running_var: `(C,)` float32, contiguous; updated in place, the variance with the unbiased one.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        negative_slope: of LeakyReLU; 1 for no activation.

    Returns:
        y, with the shape and type of `x`.

    Raises:
        TypeError: a tensor is not of an allowed type.
        ValueError: a shape or device does not fit, or there is one value per channel only.
    """
    check_channels(x)
    if 0 < x.numel() == x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; statistics need more than one value per channel")
    channels = (x.shape[1],)
    for name, table in (("weight", weight), ("bias", bias)):
        if table.dim() != 2 or table.shape != weight.shape or table.shape[1:] != channels:
            raise ValueError(f"{name} has shape {tuple(table.shape)}; weight and bias must be (classes, {x.shape[1]})")
    check_labels("labels", labels, x.shape[0], weight.shape[0])
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor.shape != channels or not tensor.is_contiguous():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is a contiguous {channels}")
    tensors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in tensors.items():
        check_float32(name, tensor)
        check_device(name, tensor, x)
    check_device("labels", labels, x)
    tables = weight.contiguous(), bias.contiguous(), labels.contiguous()
    y, _, _, new_mean, new_var = _ops.conditional_batch_norm_act(
        dense(x), *tables, running_mean, running_var, momentum, eps, negative_slope
    )
    with torch.no_grad():
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return y
