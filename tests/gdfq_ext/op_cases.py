"""Arguments for every op, and how an implementation is compared with the reference."""

import torch

from gdfq_ext import reference

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
    for scheme in range(3):
        yield i.x(2, 3, 5, 4).requires_grad_(), i.lower, i.upper, 4, scheme, -1
        yield i.x(2, 3, 5, 4).requires_grad_(), -i.channel(), i.channel(), 2, scheme, 1
        yield i.x(17), i.lower, i.upper, 8, scheme, -1
    yield i.x(0, 3, 5, 4), i.lower, i.upper, 4, 0, -1


def fake_quantize_clipped_backward(i):
    for shape in [(2, 3, 5, 4), (13,), (0, 3)]:
        x = i.x(*shape)
        yield i.x(*shape), OPS.fake_quantize_clipped(x, i.lower, i.upper, 4, 0, -1)[1]


def fake_quantize_weights(i):
    yield [i.x(4, 3, 3, 2).requires_grad_(), i.x(7, 2), i.x(5)], [4, 3, 2], [0, 1, 2]
    yield [i.x(4, 0), i.x(7, 2).requires_grad_()], [4, 3], [1, 0]


def count_changed_codes(i):
    def tensors():
        return [i.x(4, 3, 3, 2), i.x(0, 5), i.x(7, 2)]

    for kappas in ([1.0], [2.0**k for k in range(16)]):
        yield tensors(), tensors(), [4, 3, 2], [2, 1, 0], torch.tensor(0.01), torch.tensor(kappas)


def fake_quantize_learned(i):
    step, zero_point = torch.tensor([0.2], requires_grad=True), torch.tensor([3.0])
    for shape, with_choice, bounds in [((2, 3, 5, 4), True, (0, 15)), ((17,), False, (-7, 7)), ((0, 3), True, (0, 3))]:
        x = i.x(*shape)
        choice = torch.randint_like(x, 256).byte() if with_choice else None
        yield x.requires_grad_(), step, zero_point, choice, *bounds, 100, 0.5


def fake_quantize_learned_backward(i):
    for arguments in fake_quantize_learned(i):
        yield i.x(*arguments[0].shape), *copies(arguments)


def round_learned(i):
    for shape, sharpness, bounds in [((4, 3, 3, 2), 20.0, (0, 15)), ((7, 2), 1.0, (-1, 1)), ((5,), 2.0, (0, 255))]:
        channels = shape[0]
        step, zero_point = i.channel(channels).requires_grad_(), (i.channel(channels) * bounds[1]).round()
        base, v = (i.x(*shape) * 3).floor(), i.x(*shape).requires_grad_()
        yield base, v, step, zero_point, torch.tensor([sharpness]), *bounds


def round_learned_backward(i):
    for arguments in round_learned(i):
        yield i.x(*arguments[0].shape), i.channel(1)[0], *copies(arguments)


def observe_range(i):
    yield i.x(2, 3, 5, 4), torch.rand(3), 0.9
    yield i.x(0, 3), torch.rand(3), 0.9


def batch_norm(i, shape, affine):
    x = i.x(*shape)
    pair = (i.channel().requires_grad_(), i.channel().requires_grad_()) if affine else (None, None)
    return x, (i.channel(), i.channel(), *pair)


def batch_norm_act_fake_quantize(i):
    for shape, affine, scheme, act, clipped in [
        ((2, 3, 5, 4), 1, 0, 1, True),
        ((4, 3), 0, 0, 2, False),
        ((2, 3, 5, 4), 1, 1, 1, True),
        ((4, 3), 1, 2, 0, True),
        ((0, 3, 2, 2), 1, 1, 0, True),
    ]:
        x, parameters = batch_norm(i, shape, affine)
        yield x.requires_grad_(), *parameters, i.lower, i.upper, 4, scheme, 1e-5, act, clipped


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
    labels, shares, weight = torch.tensor([0, 4, 1, 2]), torch.rand(4, 5, generator=i.generator), i.channel(4)
    shares[1, 3] = 0
    for targets, sample_weight, batchmean in [
        (labels, None, True),
        (labels, weight, False),
        (shares, None, False),
        (shares, weight, True),
    ]:
        logits = [torch.randn(4, 5, generator=i.generator) for _ in range(2)]
        yield logits[0].requires_grad_(), logits[1], targets, sample_weight, 20.0, 1.0, 0.5, batchmean


def conditional_batch_norm_act(i):
    for shape, classes, slope in [((3, 3, 5, 4), 4, 0.2), ((4, 3), 1, 1.0), ((2, 3, 1, 1), 2, 0.0)]:
        tables = (torch.randn(classes, 3, generator=i.generator).requires_grad_() for _ in range(2))
        labels = torch.randint(classes, shape[:1], generator=i.generator)
        yield i.x(*shape).requires_grad_(), *tables, labels, i.channel(), i.channel(), 0.1, 1e-5, slope


def conditional_batch_norm_act_backward(i):
    for x, weight, bias, labels, *_, slope in conditional_batch_norm_act(i):
        statistics = i.channel(), i.channel()
        yield i.x(*x.shape), x.detach(), weight.detach(), bias.detach(), labels, *statistics, slope


CASES = {
    "fake_quantize": fake_quantize,
    "fake_quantize_clipped": fake_quantize,
    "fake_quantize_clipped_backward": fake_quantize_clipped_backward,
    "fake_quantize_weights": fake_quantize_weights,
    "count_changed_codes": count_changed_codes,
    "fake_quantize_learned": fake_quantize_learned,
    "fake_quantize_learned_backward": fake_quantize_learned_backward,
    "round_learned": round_learned,
    "round_learned_backward": round_learned_backward,
    "observe_range": observe_range,
    "batch_norm_act_fake_quantize": batch_norm_act_fake_quantize,
    "batch_norm_act_fake_quantize_backward": batch_norm_act_fake_quantize_backward,
    "batch_norm_act_moments": batch_norm_act_moments,
    "batch_norm_act_moments_backward": batch_norm_act_moments_backward,
    "bns_loss": bns_loss,
    "distillation_loss": distillation_loss,
    "conditional_batch_norm_act": conditional_batch_norm_act,
    "conditional_batch_norm_act_backward": conditional_batch_norm_act_backward,
}
PLAIN = DTYPES[0], LAYOUTS[0]
FLOAT32_ONLY = {"bns_loss", "count_changed_codes", "distillation_loss", "round_learned", "round_learned_backward"}
COMBINATIONS = [
    (name, dtype, layout)
    for name in CASES
    for dtype in DTYPES
    for layout in LAYOUTS
    if name not in FLOAT32_ONLY or dtype == PLAIN[0]
]

# Results that are sums over many elements, whose order of addition is free. All others must be equal bit for bit.
SUMS = {
    "fake_quantize_learned_backward": (1,),
    "round_learned": (1,),
    "round_learned_backward": (1,),
    "batch_norm_act_fake_quantize_backward": (1, 2),
    "batch_norm_act_moments": (1, 2),
    "bns_loss": (0,),
    "distillation_loss": (0, 1, 2, 3),
    "conditional_batch_norm_act": (0, 1, 2, 3, 4),
    "conditional_batch_norm_act_backward": (0, 1, 2),
}
# grad_x of the moments adds three terms per element; kernels may gather the constants first. Soft weights are made of
# exponentials, which every library rounds in its own way.
CLOSE = {
    "batch_norm_act_moments_backward": (0,),
    "bns_loss": (1,),
    "round_learned": (0,),
    "round_learned_backward": (0,),
}


def copies(arguments):
    """Detached arguments, with in-place state cloned."""
    if isinstance(arguments, (list, tuple)):
        return [copies(argument) for argument in arguments]
    return arguments.detach().clone() if isinstance(arguments, torch.Tensor) else arguments


def results(function, arguments):
    """All results of a call, and the arguments after it, as one flat list."""
    arguments = copies(arguments)
    result = function(*arguments)
    result = list(result) if isinstance(result, (list, tuple)) else [result]
    return [*result, *(a for a in arguments if isinstance(a, torch.Tensor))]


def compare(ops, name, arguments):
    """`ops.name(*arguments)` against the reference: values, types and layouts."""
    values = results(getattr(ops, name), arguments)
    expected = results(getattr(reference, name), arguments)
    for index, (value, reference_value) in enumerate(zip(values, expected, strict=True)):
        loose = index in SUMS.get(name, ()) or index in CLOSE.get(name, ())
        low_precision = value.dtype in (torch.float16, torch.bfloat16)
        tolerance = {"rtol": 1e-2 if low_precision else 2e-5, "atol": 1e-5} if loose else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(value, reference_value, **tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}")
        assert value.stride() == reference_value.stride() or value.numel() <= 1 or 1 in value.shape
