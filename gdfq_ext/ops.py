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
    statistics,
)
from ._schemas import ACTIVATIONS, SCHEMES, dense_format
from .quantizer import Grid, quantizer
from .reference import channel_range

StraightThrough = Literal["identity", "clipped"]
Activation = Literal["none", "relu", "relu6"]
Scheme = Literal["eq6", "affine", "symmetric"]

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


def quantizer_grid(lower: Tensor, upper: Tensor, bits: int, scheme: Scheme = "eq6") -> Grid:
    """The values that `fake_quantize` rounds to, by their integer codes: `(code - zero_point) * step`.

    "eq6" and "affine" have codes from 0 to 2^k - 1, "symmetric" from -(2^(k-1) - 1) to 2^(k-1) - 1 and zero point 0. A
    zero point of "eq6" may lie beyond its codes, and its values are the quotients of Eq. 6, which these products equal
    but for the last bits.

    Args:
        lower: l, any shape and floating type.
        upper: u, of the shape of `lower`.
        bits: k, 2..8.
        scheme: see `fake_quantize`.

    Returns:
        `Grid(step, zero_point, lowest, highest)`: two float32 tensors shaped as the range, without a gradient, and two
        integers.

    Raises:
        TypeError: the range is not floating.
        ValueError: `bits` or `scheme` is out of range, or `upper` has another shape or device than `lower`.
    """
    check_bits(bits)
    check_choice("scheme", scheme, SCHEMES)
    check_floating("lower", lower)
    check_floating("upper", upper)
    check_shape("upper", upper, tuple(lower.shape))
    check_device("upper", upper, lower)
    return quantizer(lower.detach().float(), upper.detach().float(), bits, SCHEMES[scheme]).grid()


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
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name} is {tensor.dtype}; allowed is float32")
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


def bns_loss(
    means: Sequence[Tensor], variances: Sequence[Tensor], running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor], *, reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:  # fmt: skip
    """The batch-normalization-statistics loss over all layers (Eq. 5).

        sum_l |mean_l - running_mean_l|^2 + |var_l - running_var_l|^2

    Args:
        means, variances: batch statistics, one `(C_l,)` tensor per layer; the gradient goes to these.
        running_means, running_vars: the teacher's statistics, likewise.
        reduction: "sum" is the equation; "mean" divides each layer's term by C_l and averages over layers, as the
            published numbers were made.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the lists are empty or differ in length, a layer's tensors differ in shape or device, or `reduction`
            is not known.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    means = list(means)
    if not means:
        raise ValueError("means is empty; the loss needs at least one batch-normalization layer")
    lists = (
        statistics("means", means, means),
        statistics("variances", list(variances), means),
        statistics("running_means", list(running_means), means),
        statistics("running_vars", list(running_vars), means),
    )
    return _ops.bns_loss(*lists, reduction == "mean")[0]


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
    *, sample_weight: Tensor | None = None, temperature: float = 20.0, cross_entropy_weight: float = 1.0,
    distillation_weight: float = 1.0, reduction: Literal["mean", "batchmean"] = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The student's loss (Eq. 10): cross-entropy and knowledge distillation with z_Q = student, z_P = teacher.

        loss = cross_entropy_weight * CE + distillation_weight * T^2 * KL(softmax(z_P/T) || softmax(z_Q/T))
        CE = 1/B sum_n sample_weight_n * -log softmax(z_Q,n)[targets_n]
          or 1/B sum_n sample_weight_n * -sum_c targets_nc * log softmax(z_Q,n)_c

    computed in float32. The gradient goes to `student_logits` only.

    Args:
        student_logits: `(B, C)`, floating.
        teacher_logits: `(B, C)`, floating.
        targets: labels, `(B,)` int64, each in 0..C-1 (another value makes the loss NaN; checking it would wait for the
            device), or soft ones, `(B, C)` floating, as a rule probabilities.
        sample_weight: `(B,)`, floating: weight of each image's cross-entropy; KL has none. None for 1.
        temperature: T, above 0.
        cross_entropy_weight, distillation_weight: weights of the two parts.
        reduction: KL is divided by B*C ("mean", as the published numbers were made) or by B ("batchmean").

    Returns:
        loss, cross_entropy, kl: float32 scalars. The last two are for logging, without the weights of the parts, KL
        without T^2, and take no gradient. NaN for an empty batch.

    Raises:
        TypeError: logits or `sample_weight` are not floating, or `targets` neither floating nor int64.
        ValueError: shapes or devices do not fit, `temperature` is not positive, or `reduction` is not known.
    """
    check_choice("reduction", reduction, ("mean", "batchmean"))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed is a number above 0")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floating(name, logits)
        if logits.dim() != 2 or logits.shape != student_logits.shape or logits.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}, student_logits {tuple(student_logits.shape)}; "
                "both must be the same (B, C), C >= 1"
            )
    batch, classes = student_logits.shape
    check_device("teacher_logits", teacher_logits, student_logits)
    check_device("targets", targets, student_logits)
    if targets.is_floating_point():
        check_shape("targets", targets, (batch, classes))
        targets = targets.detach().float()
    else:
        check_labels("targets", targets, batch, classes, " or a floating type")
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, (batch,))
        check_device("sample_weight", sample_weight, student_logits)
        sample_weight = sample_weight.detach().float().contiguous()
    loss, cross_entropy, kl, _ = _ops.distillation_loss(
        student_logits.float().contiguous(), teacher_logits.detach().float().contiguous(), targets.contiguous(),
        sample_weight, temperature, cross_entropy_weight, distillation_weight, reduction == "batchmean",
    )  # fmt: skip
    return loss, cross_entropy, kl


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
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} is {tensor.dtype}; allowed is float32")
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
