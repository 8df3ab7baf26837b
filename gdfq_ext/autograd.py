"""Gradients of the ops: each backward is an op of `_schemas.py`, or scales a gradient that the forward has computed."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ._schemas import dense_format, library

_ops = torch.ops.gdfq_ext


def _register(name: str, setup_context: Callable | None, backward: Callable) -> None:
    torch.library.register_autograd(f"gdfq_ext::{name}", backward, setup_context=setup_context, lib=library)


def _once(backward: Callable) -> Callable:
    """Marks a backward that has no gradient of its own, so that asking for one fails instead of giving nothing."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("gdfq_ext ops can be differentiated once only; do not pass create_graph=True")
        return backward(ctx, *grads)

    return checked


# Identity straight-through: the gradient passes as it is and nothing is saved.


def _fake_quantize_backward(ctx, grad_y: Tensor):
    return grad_y, None, None, None, None, None


def _fake_quantize_weights_backward(ctx, grads: list[Tensor]):
    return grads, None, None


_register("fake_quantize", None, _fake_quantize_backward)
_register("fake_quantize_weights", None, _fake_quantize_weights_backward)


# Clipped straight-through: one bit per element is saved.


def _clipped_setup(ctx, inputs, output):
    _, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.save_for_backward(mask)
    ctx.layout = dense_format(inputs[0])


@_once
def _clipped_backward(ctx, grad_y: Tensor, _grad_mask):
    (mask,) = ctx.saved_tensors
    grad_x = _ops.fake_quantize_clipped_backward(grad_y.contiguous(memory_format=ctx.layout), mask)
    return grad_x, None, None, None, None, None


_register("fake_quantize_clipped", _clipped_setup, _clipped_backward)


# Learned quantizers: what they were called with is saved, everything else is recomputed.


def _learned_setup(ctx, inputs, output):
    x, step, zero_point, choice, *ctx.settings = inputs
    ctx.save_for_backward(x, step, zero_point, choice)


@_once
def _learned_backward(ctx, grad_y: Tensor):
    x, *rest = ctx.saved_tensors
    grad_y = grad_y.contiguous(memory_format=dense_format(x))
    grads = _ops.fake_quantize_learned_backward(grad_y, x, *rest, *ctx.settings)
    return *grads, None, None, None, None, None, None


_register("fake_quantize_learned", _learned_setup, _learned_backward)


def _round_setup(ctx, inputs, output):
    *tensors, lowest, highest = inputs
    ctx.save_for_backward(*tensors)
    ctx.bounds = (lowest, highest)


@_once
def _round_backward(ctx, grad_y: Tensor, grad_penalty: Tensor):
    base, *rest = ctx.saved_tensors
    grad_y = grad_y.contiguous(memory_format=dense_format(base))
    grad_v, grad_step = _ops.round_learned_backward(grad_y, grad_penalty, base, *rest, *ctx.bounds)
    return None, grad_v, grad_step, None, None, None, None


_register("round_learned", _round_setup, _round_backward)


# Frozen batch normalization: x is saved, everything else is recomputed.


def _batch_norm_quantize_setup(ctx, inputs, output):
    *tensors, bits, scheme, eps, act, clipped = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (bits, scheme, eps, act, clipped)


@_once
def _batch_norm_quantize_backward(ctx, grad_y: Tensor):
    x, running_mean, running_var, weight, bias, lower, upper = ctx.saved_tensors
    grad_y = grad_y.contiguous(memory_format=dense_format(x))
    grad_x, grad_weight, grad_bias = _ops.batch_norm_act_fake_quantize_backward(
        grad_y, x, running_mean, running_var, weight, bias, lower, upper, *ctx.settings
    )
    grad_weight = None if weight is None else grad_weight
    grad_bias = None if bias is None else grad_bias
    return grad_x, None, None, grad_weight, grad_bias, None, None, None, None, None, None, None


_register("batch_norm_act_fake_quantize", _batch_norm_quantize_setup, _batch_norm_quantize_backward)


def _moments_setup(ctx, inputs, output):
    x, *parameters, eps, act = inputs
    _, mean, _ = output
    ctx.save_for_backward(x, mean, *parameters)
    ctx.settings = (eps, act)


@_once
def _moments_backward(ctx, grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor):
    x, mean, *parameters = ctx.saved_tensors
    grad_y = grad_y.contiguous(memory_format=dense_format(x))
    grad_x = _ops.batch_norm_act_moments_backward(
        grad_y, grad_mean.contiguous(), grad_var.contiguous(), x, mean, *parameters, *ctx.settings
    )
    return grad_x, None, None, None, None, None, None


_register("batch_norm_act_moments", _moments_setup, _moments_backward)


# Losses: the forward has the gradient for grad_loss = 1.


class _BnsLoss(torch.autograd.Function):
    """By hand, as `register_autograd` takes lists apart in Python, which lasts longer than the loss itself."""

    @staticmethod
    def forward(ctx, running_means: list[Tensor], running_vars: list[Tensor], mean: bool, *statistics: Tensor):
        layers = len(running_means)
        loss, gradient = _bns_loss(statistics[:layers], statistics[layers:], running_means, running_vars, mean)
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        ctx.sizes = [layer.numel() for layer in running_means]
        return loss, gradient

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _grad_gradient):
        return None, None, None, *_bns_loss_gradients(ctx, grad_loss)


@_once
def _bns_loss_gradients(ctx, grad_loss: Tensor):
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss).split_with_sizes(ctx.sizes * 2)


def _bns_loss(*arguments):
    with torch._C._AutoDispatchBelowAutograd():
        return _ops.bns_loss.default(*arguments)


def _bns_loss_autograd(
    means: list[Tensor], variances: list[Tensor], running_means: list[Tensor], running_vars: list[Tensor], mean: bool
):
    if torch.is_grad_enabled() and torch._C._any_requires_grad(means, variances):
        return _BnsLoss.apply(running_means, running_vars, mean, *means, *variances)
    return _bns_loss(means, variances, running_means, running_vars, mean)


library.impl("bns_loss", _bns_loss_autograd, "Autograd")


def _distillation_setup(ctx, inputs, output):
    _, cross_entropy, kl, gradient = output
    ctx.mark_non_differentiable(cross_entropy, kl, gradient)
    ctx.save_for_backward(gradient)


@_once
def _distillation_backward(ctx, grad_loss: Tensor, *_grads):
    (gradient,) = ctx.saved_tensors
    return gradient * grad_loss, None, None, None, None, None, None, None


_register("distillation_loss", _distillation_setup, _distillation_backward)


# No gradient: without this, autograd would look at every argument of every call.

for _name in ("count_changed_codes", "observe_range"):
    library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


# The generator's batch normalization: x is saved with the batch's statistics, z is computed again.


def _conditional_setup(ctx, inputs, output):
    x, weight, bias, labels, _, _, _, _, slope = inputs
    _, mean, inv_std, *running = output
    ctx.mark_non_differentiable(mean, inv_std, *running)
    ctx.save_for_backward(x, weight, bias, labels, mean, inv_std)
    ctx.slope = slope


@_once
def _conditional_backward(ctx, grad_y: Tensor, *_grads):
    x, *parameters = ctx.saved_tensors
    grad_y = grad_y.contiguous(memory_format=dense_format(x))
    grads = _ops.conditional_batch_norm_act_backward(grad_y, x, *parameters, ctx.slope)
    return *grads, None, None, None, None, None, None


_register("conditional_batch_norm_act", _conditional_setup, _conditional_backward)
