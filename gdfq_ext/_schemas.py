"""Every op's schema and fake kernel, once: the contract between the reference, the native kernels and autograd.

What holds for all ops:

* **Layout.** `x` and `weight` are dense: contiguous, or (4-D only) contiguous in `channels_last`. A tensor that is both
  (size-1 dimensions) counts as contiguous. Outputs of the input's shape have the input's layout, and "memory order"
  below means the order of elements in that layout. A gradient arrives in the layout of the tensor that it belongs to.
  The public functions in `ops.py` and the formulas in `autograd.py` see to all this; a kernel may refuse anything else.
  Dense says nothing about alignment: a slice may start at any element.
* **Types.** `x`, `weight` of the quantizer and gradients of their shape are float32, float16 or bfloat16; arithmetic is
  float32; results are converted to the type of `x` last. Everything else (ranges, state, statistics, BN parameters,
  logits) is float32 and contiguous, labels are int64.
* **Devices.** All tensors of a call are on one device, and nothing reads a value back to the host.
* **Empty inputs** (numel 0) return early; what is returned then is said at each op.
* **Encodings.** `act`: 0 none, 1 ReLU, 2 ReLU6. `axis`: -1 for one range per tensor, else 0 <= axis < x.dim().
  `scheme`: the quantizer's arithmetic, 0 eq6, 1 affine, 2 symmetric. `clipped`: the straight-through kind, False
  identity, True clipped.

The quantizers, in float32, each operation rounded on its own (no FMA), `round` half to even. eq6 (GDFQ, ECCV 2020,
Eq. 6):

    scale = u >= l ? (2^k - 1) / max(u - l, 1e-8) : NaN      zero = round(scale * l) + 2^(k-1)
    level = round(scale * x - zero)                          q = clamp(level, -2^(k-1), 2^(k-1) - 1)
    y = (q + zero) / scale

affine and symmetric, which are ONNX's QuantizeLinear and DequantizeLinear, and have 0 among their values:

    affine       step = max(max(u, 0) - min(l, 0), 1e-8) / (2^k - 1)
                 zero_point = round(-min(l, 0) / step)            low = -zero_point         high = 2^k - 1 - zero_point
    symmetric    step = max(-l, u, 5e-9) / (2^(k-1) - 1)          low = -(2^(k-1) - 1)      high = 2^(k-1) - 1
    both         level = round(x / step)                          q = clamp(level, low, high)            y = q * step

A zero point is in 0..2^k - 1 without a clamp. By the floors every range is at least 1e-8 wide. y is never -0.

An inverted, a NaN and an infinite range give NaN: of eq6 by `!(u >= l)` and the same arithmetic, of the others since
step is NaN then. The clamp passes NaN. With low = -2^(k-1) and high = 2^(k-1) - 1 for eq6, an element is "inside" when
!(level < low) && !(level > high): NaN is inside and keeps its gradient.

A learned quantizer is given its step and its zero_point, which is one of its codes, those from lowest to highest. With
low = lowest - zero_point and high = highest - zero_point, level, q and y are as affine and symmetric have them, and NaN
for a step that is not above 0.

Frozen batch normalization, per channel c (dimension 1), in float32, each operation rounded on its own (no FMA):

    inv_std = 1.0f / sqrtf(running_var + (float)eps)       scale_c = weight * inv_std      (inv_std without a weight)
    shift_c = bias - running_mean * scale_c                (0.0f - running_mean * scale_c without a bias)
    z = x * scale_c + shift_c                              a = act(z), NaN passes
    active(z): none true, ReLU !(z <= 0), ReLU6 !(z <= 0) && !(z >= 6)
"""

import torch
from torch import Tensor

ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
SCHEMES = {"eq6": 0, "affine": 1, "symmetric": 2}

library = torch.library.Library("gdfq_ext", "DEF")

SCHEMAS = {
    # y of x's shape, type and layout. lower, upper: one element (axis -1) or (x.shape[axis],). The channel of the
    # element at memory offset i is (i / x.stride(axis)) % x.shape[axis]. Identity gradient, so no backward op.
    "fake_quantize": "(Tensor x, Tensor lower, Tensor upper, int bits, int scheme, int axis) -> Tensor",
    # (y, mask). mask: uint8, (ceil(numel / 8),): bit i % 8 of byte i / 8 is set where element i in memory order is
    # inside; the unused bits of the last byte are 0.
    "fake_quantize_clipped": "(Tensor x, Tensor lower, Tensor upper, int bits, int scheme, int axis) "
    "-> (Tensor, Tensor)",
    # grad_x: grad_y where the bit is set, else +0. grad_y has the layout that x had.
    "fake_quantize_clipped_backward": "(Tensor grad_y, Tensor mask) -> Tensor",
    # Weights may differ in shape, 1-D or more, and type; bits and schemes have one value per weight. Ranges are the
    # minimum and the maximum of weight[c], NaN if any element is NaN. Channel c is the c-th of shape[0] equal,
    # consecutive pieces of memory in both layouts.
    "fake_quantize_weights": "(Tensor[] weights, int[] bits, int[] schemes) -> Tensor[]",
    # (len(weights), K) int64: of each weight w, how many elements have another code in w - (kappa * learning_rate) * d
    # than in w, for each kappa. A code is the clamped level q with the ranges of w, those of fake_quantize_weights; NaN
    # is another code than any. Each operation is rounded on its own. weights and directions are float32, alike in shape
    # and layout; learning_rate: one element; kappas: (K,), K from 1 to 16.
    "count_changed_codes": "(Tensor[] weights, Tensor[] directions, int[] bits, int[] schemes, Tensor learning_rate, "
    "Tensor kappas) -> Tensor",
    # y: x where choice < threshold (0..256), elsewhere the learned quantizer's. step, zero_point: (1,) float32. choice:
    # uint8, of x's shape and layout; without it every element is quantized.
    "fake_quantize_learned": "(Tensor x, Tensor step, Tensor zero_point, Tensor? choice, int lowest, int highest, "
    "int threshold, float step_gradient_scale) -> Tensor",
    # (grad_x, grad_step). grad_x: grad_y where x was kept or the level is inside, else +0. grad_step: (1,) float32,
    # step_gradient_scale * the sum over what was quantized of grad_y * (level - x / step where inside, else low or
    # high); 0 for empty x.
    "fake_quantize_learned_backward": "(Tensor grad_y, Tensor x, Tensor step, Tensor zero_point, Tensor? choice, "
    "int lowest, int highest, int threshold, float step_gradient_scale) -> (Tensor, Tensor)",
    # (y, penalty). base, of integers, and v are alike in shape, (C, ...), and layout; step, zero_point: (C,);
    # sharpness: b >= 1, one element; all float32. h = clamp(1.2 * sigmoid(v) - 0.1, 0, 1); level = clamp(base + h, low,
    # high) with the learned quantizer's bounds; y = level * step, as step is; penalty = sum 1 - |2 h - 1|^b, ().
    "round_learned": "(Tensor base, Tensor v, Tensor step, Tensor zero_point, Tensor sharpness, int lowest, "
    "int highest) -> (Tensor, Tensor)",
    # (grad_v, grad_step). grad_v = 1.2 * sigmoid(v) * (1 - sigmoid(v)) where h was not clamped, else 0, times
    # (grad_y * step where base + h is inside, else 0) - grad_penalty * 2 b |2 h - 1|^(b - 1) sign(2 h - 1).
    # grad_step: (C,), sum grad_y * level.
    "round_learned_backward": "(Tensor grad_y, Tensor grad_penalty, Tensor base, Tensor v, Tensor step, "
    "Tensor zero_point, Tensor sharpness, int lowest, int highest) -> (Tensor, Tensor)",
    # state, (3,) float32, updated in place: [raw average of min, raw average of max, accumulated weight];
    # average = m * average + (1 - m) * new, weight = m * weight + (1 - m), with (float)m and (float)(1.0 - m), no FMA.
    # Returns the new (2,) float32 [state[0] / state[2], state[1] / state[2]]. NaN in x makes both averages NaN.
    # Empty x: the state stays as it is, the result is computed from it (0 / 0 = NaN before the first batch).
    "observe_range": "(Tensor x, Tensor(a!) state, float momentum) -> Tensor",
    # y = quantize(act(bn(x))), x: (N, C, *spatial). `clipped` changes the gradient only.
    "batch_norm_act_fake_quantize": "(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
    "Tensor lower, Tensor upper, int bits, int scheme, float eps, int act, bool clipped) -> Tensor",
    # (grad_x, grad_weight, grad_bias). Recomputes z. With dz = grad_y where active(z) and, if clipped, inside(act(z)),
    # else +0: grad_x = dz * scale_c, x's type and layout; grad_weight = sum dz * ((x - running_mean) * inv_std) and
    # grad_bias = sum dz, (C,) float32, returned always. Zeros for empty x.
    "batch_norm_act_fake_quantize_backward": "(Tensor grad_y, Tensor x, Tensor running_mean, Tensor running_var, "
    "Tensor? weight, Tensor? bias, Tensor lower, Tensor upper, int bits, int scheme, float eps, int act, bool clipped) "
    "-> (Tensor, Tensor, Tensor)",
    # (y, mean, var): y = act(bn(x)) in x's type and layout; mean and biased variance of x per channel over N and
    # spatial, (C,) float32. Deviations are taken from running_mean or by Welford, never as E[x^2] - E[x]^2.
    # Empty x: NaN statistics.
    "batch_norm_act_moments": "(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
    "float eps, int act) -> (Tensor, Tensor, Tensor)",
    # grad_x = (grad_y where active(z), else 0) * scale_c + grad_mean / n + (grad_var * 2 / n) * (x - mean),
    # n = numel / C. mean is the forward's second result; grad_mean and grad_var are (C,) float32.
    "batch_norm_act_moments_backward": "(Tensor grad_y, Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean, "
    "Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, float eps, int act) -> Tensor",
    # (loss, gradient). Layer l contributes |mean - running_mean|^2 + |var - running_var|^2, summed (mean False), or
    # divided by its number of channels and averaged over layers (mean True). loss: () float32.
    # gradient: (2 * sum C_l,) float32, d loss / d mean of all layers in order, then d loss / d var of all layers.
    # The C_l may differ; all lists have the same length >= 1.
    "bns_loss": "(Tensor[] means, Tensor[] variances, Tensor[] running_means, Tensor[] running_vars, bool mean) "
    "-> (Tensor, Tensor)",
    # (loss, cross_entropy, kl, gradient). student = z_Q, teacher = z_P: (B, C) float32. targets: labels (B,) int64, or
    # a share for each class (B, C) float32. sample_weight: (B,) float32, 1 without.
    # cross_entropy = mean over B of sample_weight * -log softmax(z_Q)[label], or sample_weight * -sum_c targets_c *
    # log softmax(z_Q)_c with 0 log 0 = 0; kl = sum softmax(z_P / T) * (log softmax(z_P / T) - log softmax(z_Q / T))
    # divided by B * C, or by B (batchmean True); loss = cross_entropy_weight * cross_entropy + distillation_weight *
    # T^2 * kl; all () float32. gradient: (B, C) float32, d loss / d z_Q.
    # A label outside 0..C-1 makes cross_entropy, loss and that row's gradient NaN. B = 0: NaN losses, empty gradient.
    "distillation_loss": "(Tensor student_logits, Tensor teacher_logits, Tensor targets, Tensor? sample_weight, "
    "float temperature, float cross_entropy_weight, float distillation_weight, bool batchmean) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    # (y, mean, inv_std, new_running_mean, new_running_var). x: (N, C, *spatial), n = numel / C > 1; weight, bias:
    # (classes, C) float32, contiguous; labels: (N,) int64. mean and inv_std = 1 / sqrt(biased variance + eps) of the
    # batch, (C,) float32; z = weight[label] * (x - mean) * inv_std + bias[label]; y = z where z >= 0, else slope * z; a
    # label that is no row makes its sample NaN. new_running = (1 - momentum) * running + momentum * new, the variance
    # unbiased; nothing is updated in place, which autograd does not allow. Empty x: mean and inv_std are NaN, the
    # running statistics are copied.
    "conditional_batch_norm_act": "(Tensor x, Tensor weight, Tensor bias, Tensor labels, Tensor running_mean, "
    "Tensor running_var, float momentum, float eps, float slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # (grad_x, grad_weight, grad_bias), the last two (classes, C) float32: sums over the samples of each label.
    # dz = grad_y where z > 0, else slope * grad_y.
    "conditional_batch_norm_act_backward": "(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor labels, "
    "Tensor mean, Tensor inv_std, float slope) -> (Tensor, Tensor, Tensor)",
}

for _name, _schema in SCHEMAS.items():
    # Exact strides: under torch.compile the kernels get the layouts that they were traced with.
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def dense_format(x: Tensor) -> torch.memory_format:
    """The layout that the ops keep for `x`: channels_last where only that fits, contiguous otherwise."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def empty_dense_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor of `x`'s shape and kept layout."""
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device, memory_format=dense_format(x))


def _fake(name: str):
    return torch.library.register_fake(f"gdfq_ext::{name}", lib=library)


@_fake("fake_quantize")
def _(x, lower, upper, bits, scheme, axis):
    return empty_dense_like(x)


@_fake("fake_quantize_clipped")
def _(x, lower, upper, bits, scheme, axis):
    return empty_dense_like(x), x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)


@_fake("fake_quantize_clipped_backward")
def _(grad_y, mask):
    return empty_dense_like(grad_y)


@_fake("fake_quantize_weights")
def _(weights, bits, schemes):
    return [empty_dense_like(weight) for weight in weights]


@_fake("count_changed_codes")
def _(weights, directions, bits, schemes, learning_rate, kappas):
    return kappas.new_empty((len(weights), kappas.numel()), dtype=torch.int64)


@_fake("fake_quantize_learned")
def _(x, step, zero_point, choice, lowest, highest, threshold, step_gradient_scale):
    return empty_dense_like(x)


@_fake("fake_quantize_learned_backward")
def _(grad_y, x, step, zero_point, choice, lowest, highest, threshold, step_gradient_scale):
    return empty_dense_like(x), torch.empty_like(step)


@_fake("round_learned")
def _(base, v, step, zero_point, sharpness, lowest, highest):
    return empty_dense_like(base), base.new_empty(())


@_fake("round_learned_backward")
def _(grad_y, grad_penalty, base, v, step, zero_point, sharpness, lowest, highest):
    return empty_dense_like(base), torch.empty_like(step)


@_fake("observe_range")
def _(x, state, momentum):
    return state.new_empty((2,))


@_fake("batch_norm_act_fake_quantize")
def _(x, running_mean, running_var, weight, bias, lower, upper, bits, scheme, eps, act, clipped):
    return empty_dense_like(x)


@_fake("batch_norm_act_fake_quantize_backward")
def _(grad_y, x, running_mean, running_var, weight, bias, lower, upper, bits, scheme, eps, act, clipped):
    return empty_dense_like(x), torch.empty_like(running_mean), torch.empty_like(running_mean)


@_fake("batch_norm_act_moments")
def _(x, running_mean, running_var, weight, bias, eps, act):
    return empty_dense_like(x), torch.empty_like(running_mean), torch.empty_like(running_mean)


@_fake("batch_norm_act_moments_backward")
def _(grad_y, grad_mean, grad_var, x, mean, running_mean, running_var, weight, bias, eps, act):
    return empty_dense_like(x)


@_fake("bns_loss")
def _(means, variances, running_means, running_vars, mean):
    return means[0].new_empty(()), means[0].new_empty((2 * sum(layer.numel() for layer in means),))


@_fake("distillation_loss")
def _(student_logits, teacher_logits, targets, sample_weight, temperature, *weights):
    loss, cross_entropy, kl = (student_logits.new_empty(()) for _ in range(3))
    return loss, cross_entropy, kl, torch.empty_like(student_logits, memory_format=torch.contiguous_format)


@_fake("conditional_batch_norm_act")
def _(x, weight, bias, labels, running_mean, running_var, momentum, eps, slope):
    return empty_dense_like(x), *(torch.empty_like(running_mean) for _ in range(4))


@_fake("conditional_batch_norm_act_backward")
def _(grad_y, x, weight, bias, labels, mean, inv_std, slope):
    return empty_dense_like(x), torch.empty_like(weight), torch.empty_like(bias)
