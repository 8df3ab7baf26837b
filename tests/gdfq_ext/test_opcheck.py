"""PyTorch's own consistency checks of schema, fake kernel, autograd registration and tracing, for every op."""

import pytest
import torch
from torch.library import opcheck

from gdfq_ext._schemas import SCHEMAS

OPS = torch.ops.gdfq_ext
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Inputs:
    """Random arguments of one type and layout."""

    def __init__(self, dtype, layout):
        self.dtype, self.layout = dtype, layout
        self.generator = torch.Generator().manual_seed(0)
        self.lower, self.upper = torch.tensor([-1.0]), torch.tensor([1.0])

    def x(self, *shape):
        value = torch.randn(shape, generator=self.generator).to(self.dtype)
        return value.contiguous(memory_format=self.layout) if len(shape) == 4 else value

    def channel(self, count=3):
        return torch.rand(count, generator=self.generator) + 0.1


def fake_quantize(i):
    yield i.x(2, 3, 5, 4).requires_grad_(), i.lower, i.upper, 4, -1
    yield i.x(2, 3, 5, 4).requires_grad_(), -i.channel(), i.channel(), 2, 1
    yield i.x(0, 3, 5, 4), i.lower, i.upper, 4, -1
    yield i.x(17), i.lower, i.upper, 8, -1


def fake_quantize_clipped_backward(i):
    for shape in [(2, 3, 5, 4), (13,), (0, 3)]:
        x = i.x(*shape)
        yield i.x(*shape), OPS.fake_quantize_clipped(x, i.lower, i.upper, 4, -1)[1]


def fake_quantize_weight(i):
    yield i.x(4, 3, 3, 2).requires_grad_(), 4
    yield i.x(5).requires_grad_(), 2
    yield i.x(0, 3, 3, 3), 8


def fake_quantize_weights(i):
    yield [i.x(4, 3, 3, 2).requires_grad_(), i.x(7, 2)], [4, 3]
    yield [i.x(4, 0), i.x(7, 2).requires_grad_()], [4, 3]


def observe_range(i):
    yield i.x(2, 3, 5, 4), torch.rand(3), 0.9
    yield i.x(0, 3), torch.rand(3), 0.9


def batch_norm(i, shape, affine):
    x = i.x(*shape)
    pair = (i.channel().requires_grad_(), i.channel().requires_grad_()) if affine else (None, None)
    return x, (i.channel(), i.channel(), *pair)


def batch_norm_act_fake_quantize(i):
    for shape, affine, act, clipped in [((2, 3, 5, 4), 1, 1, True), ((4, 3), 0, 2, False), ((0, 3, 2, 2), 1, 0, True)]:
        x, parameters = batch_norm(i, shape, affine)
        yield x.requires_grad_(), *parameters, i.lower, i.upper, 4, 1e-5, act, clipped


def batch_norm_act_fake_quantize_backward(i):
    for arguments in batch_norm_act_fake_quantize(i):
        arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        yield i.x(*arguments[0].shape), *arguments


def batch_norm_act_moments(i):
    for shape, act in [
        ((2, 3, 5, 4), 1),
        ((4, 3), 2),
        ((2, 3, 2, 2), 0),
    ]:  # opcheck takes the NaN of empty x for a fault
        x, (mean, var, weight, _) = batch_norm(i, shape, True)
        yield x.requires_grad_(), mean, var, weight.detach(), None, 1e-5, act


def batch_norm_act_moments_backward(i):
    for x, *rest in batch_norm_act_moments(i):
        yield i.x(*x.shape), i.channel(), i.channel(), x.detach(), i.channel(), *rest


def bns_loss(i):
    def layers(train):
        return [i.channel(count).requires_grad_(train) for count in (3, 5)]

    for mean in (True, False):
        yield layers(True), layers(True), layers(False), layers(False), mean


def distillation_loss(i):
    for batchmean in (True, False):
        yield (
            torch.randn(4, 5, requires_grad=True),
            torch.randn(4, 5),
            torch.tensor([0, 4, 1, 2]),
            20.0,
            1.0,
            0.5,
            batchmean,
        )


CASES = {
    "fake_quantize": fake_quantize,
    "fake_quantize_clipped": fake_quantize,
    "fake_quantize_clipped_backward": fake_quantize_clipped_backward,
    "fake_quantize_weight": fake_quantize_weight,
    "fake_quantize_weights": fake_quantize_weights,
    "observe_range": observe_range,
    "batch_norm_act_fake_quantize": batch_norm_act_fake_quantize,
    "batch_norm_act_fake_quantize_backward": batch_norm_act_fake_quantize_backward,
    "batch_norm_act_moments": batch_norm_act_moments,
    "batch_norm_act_moments_backward": batch_norm_act_moments_backward,
    "bns_loss": bns_loss,
    "distillation_loss": distillation_loss,
}
FLOAT32_ONLY = {"bns_loss", "distillation_loss"}


def test_every_op_has_cases():
    assert set(CASES) == set(SCHEMAS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype, layout):
    if name in FLOAT32_ONLY and (dtype, layout) != (DTYPES[0], LAYOUTS[0]):
        return
    cases = list(CASES[name](Inputs(dtype, layout)))
    for arguments in cases if (dtype, layout) == (DTYPES[0], LAYOUTS[0]) else cases[:1]:
        opcheck(getattr(OPS, name), arguments)
