"""The layers of `gdfq` that are built on `gdfq_ext`, from PyTorch's own operations, one after the other."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ops.operations import SeparateQuantizer
from gdfq.images.networks import ConditionalBatchNorm, UpsampledConvolution
from gdfq.nn import BatchNormActFakeQuantize, FakeQuantize, WeightFakeQuantize
from gdfq_ext import Scheme


class SteppedQuantizer(torch.autograd.Function):
    """`affine` or `symmetric`, one tensor operation per operation sign, with the identity gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, lower: Tensor, upper: Tensor, bits: int, symmetric: bool) -> Tensor:
        if symmetric:
            high = 2 ** (bits - 1) - 1
            step = torch.clamp(torch.maximum(-lower, upper), min=5e-9) / high
            y = torch.clamp(torch.round(x / step), -high, high) * step
        else:
            below, above = -torch.clamp(lower, max=0), torch.clamp(upper, min=0)
            step = torch.clamp(below + above, min=1e-8) / (2**bits - 1)
            zero_point = torch.round(below / step)
            y = (torch.clamp(torch.round(x / step) + zero_point, 0, 2**bits - 1) - zero_point) * step
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None, None, None


def separate_quantizer(x: Tensor, lower: Tensor, upper: Tensor, bits: int, scheme: Scheme) -> Tensor:
    if scheme == "eq6":
        return SeparateQuantizer.apply(x, lower, upper, bits, False)
    return SteppedQuantizer.apply(x, lower, upper, bits, scheme == "symmetric")


class SeparateWeightQuantizer(nn.Module):
    """Layer by layer, per output channel."""

    def __init__(self, bits: list[int], schemes: list[Scheme]) -> None:
        super().__init__()
        self.bits, self.schemes = bits, schemes

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        return list(map(self.quantize, weights, self.bits, self.schemes))

    def quantize(self, weight: Tensor, bits: int, scheme: Scheme) -> Tensor:
        rows = weight.detach().reshape(len(weight), -1)
        shape = [-1] + [1] * (weight.dim() - 1)
        lower, upper = rows.min(1).values.view(shape), rows.max(1).values.view(shape)
        return separate_quantizer(weight, lower, upper, bits, scheme)


class SeparateActivationQuantizer(nn.Module):
    """Per tensor, with the fixed range of `quantizer`; see `Variant.observe_ranges`."""

    def __init__(self, quantizer: FakeQuantize, observe: bool) -> None:
        super().__init__()
        self.bits, self.scheme = quantizer.bits, quantizer.scheme
        self.register_buffer("range", quantizer.range.clone())
        self.observed = [0.0, 0.0] if observe else None

    def forward(self, x: Tensor) -> Tensor:
        if self.observed is not None:
            lower, upper = x.detach().min().item(), x.detach().max().item()
            self.observed = [0.9 * self.observed[0] + 0.1 * lower, 0.9 * self.observed[1] + 0.1 * upper]
        return separate_quantizer(x.float(), self.range[0], self.range[1], self.bits, self.scheme).to(x.dtype)


class BatchNormActThenQuantizer(nn.Module):
    """BatchNorm, activation and quantizer one after the other."""

    def __init__(self, batch_norm_act: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.batch_norm_act = batch_norm_act
        self.quantizer = quantizer

    def forward(self, *args: Tensor) -> Tensor:
        return self.quantizer(self.batch_norm_act(*args))


def with_separate_quantizers(student: nn.Module, observe: bool) -> nn.Module:
    """Q with its quantizing modules exchanged in place; its parameters stay the same objects. What rounds biases is of
    PyTorch's own operations already."""
    for name, child in list(student.named_children()):
        if isinstance(child, WeightFakeQuantize):
            setattr(student, name, SeparateWeightQuantizer(child.bits, child.schemes))
        elif isinstance(child, FakeQuantize):
            setattr(student, name, SeparateActivationQuantizer(child, observe))
        elif isinstance(child, BatchNormActFakeQuantize):
            quantizer = SeparateActivationQuantizer(child.quantizer, observe)
            setattr(student, name, BatchNormActThenQuantizer(child.batch_norm_act, quantizer))
        else:
            with_separate_quantizers(child, observe)
    return student


class UpsamplingThenConvolution(nn.Module):
    """Nearest up-sampling and a 3x3 convolution one after the other."""

    def __init__(self, convolution: UpsampledConvolution) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)


class BatchNormThenActivation(nn.Module):
    """BatchNorm of the batch, gamma and beta looked up by label where there are more than one, and LeakyReLU."""

    def __init__(self, norm: ConditionalBatchNorm) -> None:
        super().__init__()
        self.gamma, self.beta = norm.gamma, norm.beta
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.momentum, self.eps, self.negative_slope = norm.momentum, norm.eps, norm.negative_slope

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        conditional = len(self.gamma) > 1
        affine = (None, None) if conditional else (self.gamma[0], self.beta[0])
        x = F.batch_norm(x, self.running_mean, self.running_var, *affine, True, self.momentum, self.eps)
        if conditional:
            gamma, beta = (F.embedding(labels, table)[:, :, None, None] for table in (self.gamma, self.beta))
            x = torch.addcmul(beta, x, gamma)
        return x if self.negative_slope == 1 else F.leaky_relu(x, self.negative_slope)


def with_separate_layers(generator: nn.Module) -> nn.Module:
    """G with its fused layers exchanged in place; its parameters stay the same objects."""
    exchanged = {UpsampledConvolution: UpsamplingThenConvolution, ConditionalBatchNorm: BatchNormThenActivation}
    for name, child in list(generator.named_children()):
        if type(child) in exchanged:
            setattr(generator, name, exchanged[type(child)](child))
    return generator
