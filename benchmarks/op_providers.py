"""The same operations by several providers, for `test_ops.py`.

`released` makes one PyTorch call for each operation sign of the equations, as published GDFQ code runs them.
`eager` uses PyTorch's own fused quantizer, with scale and integer zero point prepared outside the measurement and the
clipped gradient. `compile` is torch.compile of the released sequence. `ours` is gdfq_ext with the loaded backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import gdfq_ext

BITS = 4
EPS = 1e-5
TEMPERATURE = 20.0


class SeparateQuantizer(torch.autograd.Function):
    """Eq. 6, one tensor operation per operation sign, with the identity gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        half = 2 ** (BITS - 1)
        scale = (2**BITS - 1) / torch.clamp(upper - lower, min=1e-8)
        zero = torch.round(scale * lower) + half
        level = torch.round(scale * x - zero)
        return (torch.clamp(level, -half, half - 1) + zero) / scale

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None


@dataclass(frozen=True)
class Case:
    """One operation on one input."""

    providers: dict[str, Callable[[], Tensor | Sequence[Tensor]]]
    """Name -> a call that returns the results."""
    leaves: list[Tensor]
    """What a backward differentiates to; empty for operations without a gradient."""
    bytes_forward: int
    """What one pass over the operands must move: every input read once, every output written once."""
    bytes_backward: int


def with_compile(released: Callable, **others: Callable) -> dict[str, Callable]:
    return {"released": released, **others, "compile": torch.compile(released, dynamic=False)}


def fake_quantize(x: Tensor) -> Case:
    lower, upper = x.new_tensor([-1.9]), x.new_tensor([2.3])
    scale = (upper - lower) / (2**BITS - 1)
    zero_point = torch.round(-lower / scale).to(torch.int32)
    leaf = x.requires_grad_()
    return Case(
        with_compile(
            lambda: SeparateQuantizer.apply(leaf, lower, upper),
            eager=lambda: torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, 0, 2**BITS - 1),
            ours=lambda: gdfq_ext.fake_quantize(leaf, lower, upper, BITS),
        ),
        [leaf], 2 * x.nbytes, 0,
    )  # fmt: skip


def fake_quantize_clipped(x: Tensor) -> Case:
    case = fake_quantize(x)
    lower, upper, leaf = x.new_tensor([-1.9]), x.new_tensor([2.3]), case.leaves[0]
    ours = {"ours": lambda: gdfq_ext.fake_quantize(leaf, lower, upper, BITS, ste="clipped")}
    mask = x.numel() // 8
    return Case({"eager": case.providers["eager"]} | ours, [leaf], 2 * x.nbytes + mask, 2 * x.nbytes + mask)


def fake_quantize_weight(x: Tensor) -> Case:
    """A 3x3 convolution's weight with `x`'s channels in and out."""
    channels = x.shape[1]
    weight = torch.randn(channels, channels, 3, 3, device=x.device, requires_grad=True)

    def released():
        flat = weight.detach().reshape(channels, -1)
        lower, upper = flat.min(1).values, flat.max(1).values
        return SeparateQuantizer.apply(weight, lower.view(-1, 1, 1, 1), upper.view(-1, 1, 1, 1))

    providers = with_compile(released, ours=lambda: gdfq_ext.fake_quantize_weight(weight, BITS))
    return Case(providers, [weight], 2 * weight.nbytes, 0)


def observe_range(x: Tensor) -> Case:
    state, running = torch.zeros(3, device=x.device), torch.zeros(2, device=x.device)

    def released():
        running[0].mul_(0.9).add_(x.min() * 0.1)
        running[1].mul_(0.9).add_(x.max() * 0.1)
        return running.clone()

    return Case(with_compile(released, ours=lambda: gdfq_ext.observe_range(x, state)), [], x.nbytes, 0)


def batch_norm_parameters(x: Tensor) -> list[Tensor]:
    mean, weight, bias = torch.randn(3, x.shape[1], device=x.device).unbind()
    return [mean, torch.rand_like(mean) + 0.5, weight.clone(), bias.clone()]


def batch_norm_act_fake_quantize(x: Tensor) -> Case:
    mean, var, weight, bias = batch_norm_parameters(x)
    lower, upper = x.new_tensor([0.0]), x.new_tensor([2.3])
    scale, zero_point = upper / (2**BITS - 1), torch.zeros(1, dtype=torch.int32, device=x.device)
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]

    def activation():
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=EPS))

    providers = with_compile(
        lambda: SeparateQuantizer.apply(activation(), lower, upper),
        eager=lambda: torch.fake_quantize_per_tensor_affine(activation(), scale, zero_point, 0, 2**BITS - 1),
        ours=lambda: gdfq_ext.batch_norm_act_fake_quantize(
            x, mean, var, weight, bias, lower, upper, BITS, eps=EPS, act="relu"
        ),
    )
    return Case(providers, leaves, 2 * x.nbytes, 3 * x.nbytes)


def batch_norm_act_moments(x: Tensor) -> Case:
    mean, var, weight, bias = batch_norm_parameters(x)
    leaf = x.requires_grad_()

    def released():
        dims = (0, 2, 3)
        batch_mean, batch_var = leaf.mean(dims), leaf.var(dims, correction=0)
        return F.relu(F.batch_norm(leaf, mean, var, weight, bias, training=False, eps=EPS)), batch_mean, batch_var

    ours = {"ours": lambda: gdfq_ext.batch_norm_act_moments(leaf, mean, var, weight, bias, eps=EPS, act="relu")}
    return Case(with_compile(released, **ours), [leaf], 2 * x.nbytes, 3 * x.nbytes)


def bns_loss(x: Tensor) -> Case:
    """Twenty layers of `x`'s channels."""
    values = torch.randn(4, 20, x.shape[1], device=x.device)
    means, variances, running_means, running_vars = ([row.clone() for row in rows] for rows in values)
    leaves = [layer.requires_grad_() for layer in means + variances]

    def released():
        layers = zip(means, variances, running_means, running_vars, strict=True)
        return sum(F.mse_loss(m, rm) + F.mse_loss(v, rv) for m, v, rm, rv in layers) / len(means)

    providers = with_compile(released, ours=lambda: gdfq_ext.bns_loss(means, variances, running_means, running_vars))
    return Case(providers, leaves, values.nbytes, values.nbytes // 2)


def distillation_loss(x: Tensor) -> Case:
    """`x`'s batch, with as many classes as CIFAR-100."""
    student = torch.randn(x.shape[0], 100, device=x.device, requires_grad=True)
    teacher = torch.randn(x.shape[0], 100, device=x.device)
    labels = torch.randint(100, (x.shape[0],), device=x.device)

    def released():
        soft_student = F.log_softmax(student / TEMPERATURE, 1)
        soft_teacher = F.softmax(teacher / TEMPERATURE, 1)
        kl = F.kl_div(soft_student, soft_teacher, reduction="sum") / student.numel()
        return F.cross_entropy(student, labels) + TEMPERATURE**2 * kl

    def ours():
        return gdfq_ext.distillation_loss(student, teacher, labels, temperature=TEMPERATURE)[0]

    return Case(with_compile(released, ours=ours), [student], 2 * student.nbytes, student.nbytes)


OPERATIONS = {
    "fake_quantize": fake_quantize,
    "fake_quantize_clipped": fake_quantize_clipped,
    "fake_quantize_weight": fake_quantize_weight,
    "observe_range": observe_range,
    "batch_norm_act_fake_quantize": batch_norm_act_fake_quantize,
    "batch_norm_act_moments": batch_norm_act_moments,
    "bns_loss": bns_loss,
    "distillation_loss": distillation_loss,
}
PROVIDERS = ("released", "eager", "compile", "ours")
