"""The ops in pure PyTorch: the default on every device, and what native kernels are tested against.

The formulas, types and layouts are those of `_schemas.py`; the quantizers are in `quantizer.py`.
"""

import torch
from torch import Tensor

from ._schemas import SCHEMAS, dense_format, empty_dense_like, library
from .quantizer import Quantizer, Stepped, clamp, inside, quantizer


def fake_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int, scheme: int, axis: int) -> Tensor:
    of = _quantizer(x, lower, upper, bits, scheme, axis)
    return _like(of.dequantize(_code(x.float(), of)), x)


def fake_quantize_clipped(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, scheme: int, axis: int
) -> tuple[Tensor, Tensor]:
    of = _quantizer(x, lower, upper, bits, scheme, axis)
    level = of.level(x.float())
    mask = _pack(_memory_order(inside(level, of), dense_format(x)))
    return _like(of.dequantize(clamp(level, of)), x), mask


def fake_quantize_clipped_backward(grad_y: Tensor, mask: Tensor) -> Tensor:
    passes = _unpack(mask, grad_y.numel())
    gradient = torch.where(passes, _memory_order(grad_y, dense_format(grad_y)), 0)
    return _from_memory_order(gradient, grad_y)


def fake_quantize_weights(weights: list[Tensor], bits: list[int], schemes: list[int]) -> list[Tensor]:
    return [
        fake_quantize(weight, *channel_range(weight), k, scheme, 0) if weight.numel() else empty_dense_like(weight)
        for weight, k, scheme in zip(weights, bits, schemes, strict=True)
    ]


def count_changed_codes(
    weights: list[Tensor], directions: list[Tensor], bits: list[int], schemes: list[int], learning_rate: Tensor,
    kappas: Tensor,
) -> Tensor:  # fmt: skip
    sizes = kappas * learning_rate
    counts = torch.zeros(len(weights), len(sizes), dtype=torch.int64, device=kappas.device)
    for row, weight, direction, k, scheme in zip(counts, weights, directions, bits, schemes, strict=True):
        if weight.numel() > 0:
            of = _quantizer(weight, *channel_range(weight), k, scheme, 0)
            code = _code(weight, of)
            changed = [(_code(weight - size * direction, of) != code).sum() for size in sizes]
            row.copy_(torch.stack(changed))
    return counts


def fake_quantize_learned(
    x: Tensor, step: Tensor, zero_point: Tensor, choice: Tensor | None, lowest: int, highest: int, threshold: int,
    step_gradient_scale: float,
) -> Tensor:  # fmt: skip
    of = _learned(step, zero_point, lowest, highest, ())
    y = of.dequantize(_code(x.float(), of)).to(x.dtype)
    return _like(torch.where(_kept(x, choice, threshold), x, y), x)


def fake_quantize_learned_backward(
    grad_y: Tensor, x: Tensor, step: Tensor, zero_point: Tensor, choice: Tensor | None, lowest: int, highest: int,
    threshold: int, step_gradient_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of = _learned(step, zero_point, lowest, highest, ())
    quotient = x.float() / of.step
    level = quotient.round()
    passes, kept = inside(level, of), _kept(x, choice, threshold)
    slope = torch.where(passes, level - quotient, clamp(level, of))
    grad_step = torch.where(kept, 0, grad_y.float() * slope).sum().mul(step_gradient_scale)
    return _like(torch.where(passes | kept, grad_y, 0), x), grad_step.reshape(1)


def round_learned(
    base: Tensor, v: Tensor, step: Tensor, zero_point: Tensor, sharpness: Tensor, lowest: int, highest: int
) -> tuple[Tensor, Tensor]:
    of = _learned(step, zero_point, lowest, highest, (-1, *[1] * (base.dim() - 1)))
    h, _ = _soft_rounding(v)
    penalty = (1 - (2 * h - 1).abs().pow(sharpness)).sum()
    return _like(of.dequantize(clamp(base + h, of)), base), penalty


def round_learned_backward(
    grad_y: Tensor, grad_penalty: Tensor, base: Tensor, v: Tensor, step: Tensor, zero_point: Tensor, sharpness: Tensor,
    lowest: int, highest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    of = _learned(step, zero_point, lowest, highest, (-1, *[1] * (base.dim() - 1)))
    h, slope = _soft_rounding(v)
    level, centered = base + h, 2 * h - 1
    of_y = torch.where(inside(level, of), grad_y * of.step, 0)
    of_penalty = grad_penalty * (-2 * sharpness) * centered.abs().pow(sharpness - 1) * centered.sign()
    grad_step = (grad_y * clamp(level, of)).unsqueeze(-1).flatten(1).sum(1)
    return _like((of_y + of_penalty) * slope, base), grad_step


def channel_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each `weight[c]`, (shape[0],) float32; NaN where the channel holds one."""
    lower, upper = weight.detach().float().reshape(weight.shape[0], -1).aminmax(dim=1)
    return lower, upper


def observe_range(x: Tensor, state: Tensor, momentum: float) -> Tensor:
    if x.numel() > 0:
        lower, upper = x.aminmax()
        observed = torch.stack([lower.float(), upper.float(), state.new_ones(())])
        state.mul_(momentum).add_(observed.mul_(1.0 - momentum))
    return state[:2] / state[2]


def batch_norm_act_fake_quantize(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    lower: Tensor, upper: Tensor, bits: int, scheme: int, eps: float, act: int, clipped: bool,
) -> Tensor:  # fmt: skip
    _, bn_scale, bn_shift = _fold(running_mean, running_var, weight, bias, eps)
    activation = _activate(_normalise(x, bn_scale, bn_shift), act)
    of = _quantizer(x, lower, upper, bits, scheme, -1)
    return _like(of.dequantize(_code(activation, of)), x)


def batch_norm_act_fake_quantize_backward(
    grad_y: Tensor, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    lower: Tensor, upper: Tensor, bits: int, scheme: int, eps: float, act: int, clipped: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inv_std, bn_scale, bn_shift = _fold(running_mean, running_var, weight, bias, eps)
    z = _normalise(x, bn_scale, bn_shift)
    passes = _active(z, act)
    if clipped:
        of = _quantizer(x, lower, upper, bits, scheme, -1)
        passes &= inside(of.level(_activate(z, act)), of)
    grad_z = torch.where(passes, grad_y.float(), 0)
    normalised = (x.float() - _per_channel(running_mean, x)).mul_(_per_channel(inv_std, x))
    grad_weight = normalised.mul_(grad_z).sum(_reduced_dims(x))
    grad_bias = grad_z.sum(_reduced_dims(x))
    return _like(grad_z.mul_(_per_channel(bn_scale, x)), x), grad_weight, grad_bias


def batch_norm_act_moments(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None,
    eps: float, act: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, bn_scale, bn_shift = _fold(running_mean, running_var, weight, bias, eps)
    y = _activate(_normalise(x, bn_scale, bn_shift), act)
    deviation = x.float() - _per_channel(running_mean, x)
    shift = deviation.mean(_reduced_dims(x))
    var = deviation.sub_(_per_channel(shift, x)).square_().mean(_reduced_dims(x))
    return _like(y, x), running_mean + shift, var


def batch_norm_act_moments_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor, x: Tensor, mean: Tensor,
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, act: int,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return empty_dense_like(x)
    count = x.numel() // x.shape[1]
    _, bn_scale, bn_shift = _fold(running_mean, running_var, weight, bias, eps)
    active = _active(_normalise(x, bn_scale, bn_shift), act)
    gradient = torch.where(active, grad_y.float(), 0).mul_(_per_channel(bn_scale, x))
    gradient.add_(_per_channel(grad_mean / count, x))
    deviation = x.float() - _per_channel(mean, x)
    return _like(gradient.add_(deviation.mul_(_per_channel(grad_var * (2 / count), x))), x)


def bns_loss(
    means: list[Tensor], variances: list[Tensor], running_means: list[Tensor], running_vars: list[Tensor], mean: bool
) -> tuple[Tensor, Tensor]:
    deviation = torch.cat([*means, *variances]) - torch.cat([*running_means, *running_vars])
    factors = [1 / (layer.numel() * len(means)) if mean else 1.0 for layer in means]
    factor = torch.cat([layer.new_full(layer.shape, f) for layer, f in zip(means, factors, strict=True)]).repeat(2)
    gradient = factor * deviation
    return (gradient * deviation).sum(), gradient.mul_(2)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, sample_weight: Tensor | None,
    temperature: float, cross_entropy_weight: float, distillation_weight: float, batchmean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, classes = student_logits.shape
    log_q = student_logits.log_softmax(1)
    if targets.dtype == torch.int64:
        valid = (targets >= 0) & (targets < classes)
        index = torch.where(valid, targets, 0).unsqueeze(1)
        terms = torch.where(valid, -log_q.gather(1, index).squeeze(1), torch.nan)
        gradient = log_q.exp().scatter_add_(1, index, torch.full_like(log_q[:, :1], -1.0))
        gradient = torch.where(valid.unsqueeze(1), gradient, torch.nan)
    else:
        terms = -torch.where(targets == 0, 0, targets * log_q).sum(1)
        gradient = log_q.exp().mul_(targets.sum(1, keepdim=True)).sub_(targets)
    if sample_weight is not None:
        terms = terms * sample_weight
        gradient.mul_(sample_weight.unsqueeze(1))
    cross_entropy = terms.mean()

    log_soft_q = (student_logits / temperature).log_softmax(1)
    log_soft_p = (teacher_logits / temperature).log_softmax(1)
    soft_p = log_soft_p.exp()
    count = batch if batchmean else batch * classes
    kl = (soft_p * (log_soft_p - log_soft_q)).sum() / count
    loss = cross_entropy_weight * cross_entropy + (distillation_weight * temperature**2) * kl

    gradient.mul_(cross_entropy_weight / max(batch, 1))
    gradient.add_(log_soft_q.exp_().sub_(soft_p), alpha=distillation_weight * temperature / max(count, 1))
    return loss, cross_entropy, kl, gradient


def conditional_batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float, slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.numel() == 0:
        nothing = torch.full_like(running_mean, torch.nan)
        return empty_dense_like(x), nothing, nothing.clone(), running_mean.clone(), running_var.clone()
    var, mean = torch.var_mean(x.float(), _reduced_dims(x), correction=0)
    inv_std = (var + eps).rsqrt()
    count = x.numel() // x.shape[1]
    running_mean = running_mean.lerp(mean, momentum)
    running_var = running_var.lerp(var * (count / (count - 1)), momentum)
    z = _conditional_affine(_standardise(x, mean, inv_std), weight, bias, labels)
    return _like(torch.where(z < 0, z * slope, z), x), mean, inv_std, running_mean, running_var


def conditional_batch_norm_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, mean: Tensor, inv_std: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    if x.numel() == 0:
        return empty_dense_like(x), grad_weight, grad_bias
    normalised = _standardise(x, mean, inv_std)
    z = _conditional_affine(normalised, weight, bias, labels)
    grad_z = torch.where(z > 0, grad_y.float(), grad_y.float() * slope)
    spatial = list(range(2, x.dim()))
    valid, index = _rows(labels, weight)
    for table, elements in ((grad_weight, grad_z * normalised), (grad_bias, grad_z)):
        per_sample = elements.sum(spatial) if spatial else elements
        table.index_add_(0, index, torch.where(valid.unsqueeze(1), per_sample, 0))
    gamma = torch.where(valid.unsqueeze(1), weight[index], torch.nan)
    scaled = grad_z * gamma.view(*gamma.shape, *[1] * len(spatial))
    centred = scaled - scaled.mean(_reduced_dims(x), keepdim=True)
    centred -= normalised * (scaled * normalised).mean(_reduced_dims(x), keepdim=True)
    return _like(centred * _per_channel(inv_std, x), x), grad_weight, grad_bias


def _standardise(x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    return (x.float() - _per_channel(mean, x)) * _per_channel(inv_std, x)


def _rows(labels: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Where a label is a row of the table, and the labels with 0 where it is not."""
    valid = (labels >= 0) & (labels < table.shape[0])
    return valid, torch.where(valid, labels, 0)


def _conditional_affine(normalised: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    valid, index = _rows(labels, weight)
    shape = [*normalised.shape[:2], *[1] * (normalised.dim() - 2)]
    gamma = torch.where(valid.unsqueeze(1), weight[index], torch.nan).view(shape)
    return normalised * gamma + bias[index].view(shape)


def _quantizer(x: Tensor, lower: Tensor, upper: Tensor, bits: int, scheme: int, axis: int) -> Quantizer:
    """With its coefficients shaped to broadcast against `x`."""
    shape = [] if axis < 0 else [-1 if dim == axis else 1 for dim in range(x.dim())]
    return quantizer(lower.reshape(shape), upper.reshape(shape), bits, scheme)


def _learned(step: Tensor, zero_point: Tensor, lowest: int, highest: int, shape: tuple[int, ...]) -> Stepped:
    """With its coefficients in the shape given."""
    step, zero_point = torch.where(step > 0, step, torch.nan).reshape(shape), zero_point.reshape(shape)
    return Stepped(step, lowest - zero_point, highest - zero_point)


def _kept(x: Tensor, choice: Tensor | None, threshold: int) -> Tensor:
    """Where `x` is not quantized."""
    return torch.zeros_like(x, dtype=torch.bool) if choice is None else choice.int() < threshold


def _soft_rounding(v: Tensor) -> tuple[Tensor, Tensor]:
    """h of `round_learned` and its derivative; NaN counts as not clamped."""
    sigmoid = v.sigmoid()
    stretched = 1.2 * sigmoid - 0.1
    clamped = (stretched <= 0) | (stretched >= 1)
    return stretched.clamp(0, 1), torch.where(clamped, 0, 1.2 * sigmoid * (1 - sigmoid))


def _code(x: Tensor, of: Quantizer) -> Tensor:
    return clamp(of.level(x), of)


def _fold(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """inv_std, scale_c and shift_c of the frozen batch normalization, each (C,)."""
    # PyTorch's vectorized float32 square root is not always the nearest on the CPU; by way of float64 it is.
    inv_std = (running_var + eps).double().sqrt_().float().reciprocal_()
    scale = inv_std if weight is None else weight * inv_std
    shift = (torch.zeros_like(scale) if bias is None else bias) - running_mean * scale
    return inv_std, scale, shift


def _normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """z = x * scale_c + shift_c, float32."""
    return (x.float() * _per_channel(scale, x)).add_(_per_channel(shift, x))


def _activate(z: Tensor, act: int) -> Tensor:
    if act == 0:
        return z
    return z.clamp(min=0) if act == 1 else z.clamp(0, 6)


def _active(z: Tensor, act: int) -> Tensor:
    """Where the activation passes a gradient; NaN counts as passing."""
    if act == 0:
        return torch.ones_like(z, dtype=torch.bool)
    return ~(z <= 0) if act == 1 else ~((z <= 0) | (z >= 6))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _reduced_dims(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _like(result: Tensor, x: Tensor) -> Tensor:
    """`result` in the type and kept layout of `x`."""
    return result.to(x.dtype).contiguous(memory_format=dense_format(x))


def _memory_order(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The elements of `x` as they lie in memory in `layout`, 1-D."""
    return (x.permute(0, 2, 3, 1) if layout is torch.channels_last else x).reshape(-1)


def _from_memory_order(elements: Tensor, like: Tensor) -> Tensor:
    if dense_format(like) is torch.contiguous_format:
        return elements.view(like.shape)
    batch, channels, height, width = like.shape
    return elements.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _pack(flags: Tensor) -> Tensor:
    """Eight flags a byte, the first in the lowest bit."""
    octets = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8)).view(-1, 8)
    return (octets << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor, count: int) -> Tensor:
    bits = mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).view(-1)[:count].bool()


for _name in SCHEMAS:
    library.impl(_name, globals()[_name], "CompositeExplicitAutograd")
