"""Tensors of more elements than 32 bits count. Only their ends hold anything but zeros, only the first and the last
blocks of a grid run, and memory that nobody touches takes none: so they cost little more than small ones."""

import math

import emulation
import pytest
import torch
from op_cases import DTYPES, Inputs

from gdfq_ext import reference

OPS = torch.ops.gdfq_cuda_on_cpu
BEYOND = 2**31


@pytest.fixture(autouse=True)
def memory_that_is_not_touched():
    emulation.set_seed(0)
    with emulation.guarded_memory(filled=False), emulation.most_blocks(16):
        yield


def zeros(*shape, dtype=torch.bfloat16, offset=0):
    """Zeros that lie `offset` elements into their memory and have not been written."""
    return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)


def random_like(part, seed):
    """Values for a part of a tensor."""
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)).to(part.dtype)


OFFSETS = pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])


# Tensors (rows, 3, ...) of fewer elements than 31 bits count, of more, and of more than 32 bits; a byte of the mask
# begins with row -32. A single element in a row makes all of it a matter of channels.
@pytest.mark.parametrize("shape", [(33,), ()], ids=["runs", "interleaved"])
@pytest.mark.parametrize("numel", [BEYOND, BEYOND * 3 // 2, 2 * BEYOND + 10_000], ids=["31", "32", "33"])
@OFFSETS
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize(dtype, offset, numel, shape):
    i = Inputs(dtype, torch.contiguous_format)
    rows = numel // math.prod((3, *shape)) // 8 * 8
    x = zeros(rows, 3, *shape, dtype=dtype, offset=offset)
    part = x[-32:].copy_(random_like(x[-32:], 0))
    for limits, scheme, axis in [((i.lower, i.upper), 0, -1), ((-i.channel(), i.channel()), 1, 1)]:
        expected, expected_mask = reference.fake_quantize_clipped(part, *limits, 4, scheme, axis)
        assert torch.equal(OPS.fake_quantize(x, *limits, 4, scheme, axis)[-32:], expected)
        y, mask = OPS.fake_quantize_clipped(x, *limits, 4, scheme, axis)
        assert torch.equal(y[-32:], expected)
        assert torch.equal(mask[-len(expected_mask) :], expected_mask)
        grad_x = OPS.fake_quantize_clipped_backward(x, mask)
        assert torch.equal(grad_x[-32:], reference.fake_quantize_clipped_backward(part, expected_mask))


# Of fewer elements than 31 bits count, of more, and of more than 32 bits: more than all blocks take in a round.
@pytest.mark.parametrize("numel", [BEYOND - 3, BEYOND * 3 // 2 + 3, 2 * BEYOND + 1_003], ids=["31", "32", "33"])
@OFFSETS
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_learned(dtype, offset, numel):
    x, choice = zeros(numel, dtype=dtype, offset=offset), zeros(numel, dtype=torch.uint8, offset=offset)
    width = 1 if offset else 16 // x.element_size()
    round_of_all_blocks = 2048 * 256 * width
    begin = numel // round_of_all_blocks * round_of_all_blocks - 64  # the last block's last, of the last whole round
    ends = [slice(begin, begin + 64), slice(numel - 2, numel)]
    for seed, end in enumerate(ends):
        x[end] = random_like(x[end], seed)
        choice[end] = torch.arange(len(choice[end])).byte() * 3
    learned = torch.tensor([0.2]), torch.tensor([0.0])
    emulation.take_launched()
    y = OPS.fake_quantize_learned(x, *learned, choice, 0, 15, 90, 0.5)
    assert emulation.take_launched() == (1, 2048, 2048 * 256)
    grad_x, grad_step = OPS.fake_quantize_learned_backward(x, x, *learned, choice, 0, 15, 90, 0.5)
    of_ends = []
    for end in ends:
        settings = *learned, choice[end], 0, 15, 90, 0.5
        assert torch.equal(y[end], reference.fake_quantize_learned(x[end], *settings))
        expected, of_end = reference.fake_quantize_learned_backward(x[end], x[end], *settings)
        assert torch.equal(grad_x[end], expected)
        of_ends.append(of_end)
    torch.testing.assert_close(grad_step, sum(of_ends), rtol=1e-5, atol=1e-6)


@OFFSETS
def test_observe_range(offset):
    x = zeros(BEYOND + 2**22 + 3, offset=offset)
    width, round_of_all_blocks = 1 if offset else 8, 1024 * 256
    x[(x.numel() // width // round_of_all_blocks * round_of_all_blocks - 1) * width] = 5.0  # the last block's last
    x[-1] = -3.0
    emulation.take_launched()
    assert OPS.observe_range(x, torch.zeros(3), 0.0).tolist() == [-3.0, 5.0]
    assert emulation.take_launched() == (2, 1024 + 1, 1025 * 256)


def test_fake_quantize_weights():
    weight = zeros(BEYOND // 1024 + 16, 1024)
    part = weight[-8:].copy_(random_like(weight[-8:], 0))
    expected = reference.fake_quantize_weights([part], [4], [0])[0]
    assert torch.equal(OPS.fake_quantize_weights([weight], [4], [0])[0][-8:], expected)


def test_count_changed_codes():
    weight, direction = (zeros(BEYOND // 1024 + 16, 1024, dtype=torch.float32) for _ in range(2))
    parts = [tensor[-8:].copy_(random_like(tensor[-8:], seed)) for seed, tensor in enumerate((weight, direction))]
    sizes = torch.tensor(0.01), torch.tensor([1.0, 4.0])
    # What blocks that do not run leave is 0: the others' channels, all zeros, change nothing either.
    counts = OPS.count_changed_codes([weight], [direction], [4], [0], *sizes)
    assert torch.equal(counts, reference.count_changed_codes(parts[:1], parts[1:], [4], [0], *sizes))
    assert counts.gt(0).all()


def test_round_learned():
    base, v, grad_y = (zeros(BEYOND // 1024 + 16, 1024, dtype=torch.float32) for _ in range(3))
    parts = [tensor[-8:].copy_(random_like(tensor[-8:], seed)) for seed, tensor in enumerate((base, v, grad_y))]
    step, zero_point, sharpness = torch.rand(len(base)) + 0.1, torch.ones(len(base)), torch.tensor([2.0])
    y, _ = OPS.round_learned(base, v, step, zero_point, sharpness, 0, 15)
    expected, _ = reference.round_learned(*parts[:2], step[-8:], zero_point[-8:], sharpness, 0, 15)
    torch.testing.assert_close(y[-8:], expected)
    one = torch.tensor(1.0)
    gradients = OPS.round_learned_backward(grad_y, one, base, v, step, zero_point, sharpness, 0, 15)
    expected = reference.round_learned_backward(parts[2], one, *parts[:2], step[-8:], zero_point[-8:], sharpness, 0, 15)
    torch.testing.assert_close([gradient[-8:] for gradient in gradients], list(expected), rtol=1e-5, atol=1e-5)


def test_distillation_loss():
    classes = 2**20
    student, teacher = (zeros(BEYOND // classes + 1, classes, dtype=torch.float32) for _ in range(2))
    student[-1], teacher[-1] = random_like(student[-1], 0), random_like(teacher[-1], 1)
    for targets in (torch.arange(len(student)), teacher):
        with emulation.most_blocks(1):
            *_, gradient = OPS.distillation_loss(student, teacher, targets, None, 4.0, 1.0, 1.0, True)
        parts = student[-1:], teacher[-1:], targets[-1:]
        *_, expected = reference.distillation_loss(*parts, None, 4.0, 1.0, 1.0, True)
        torch.testing.assert_close(gradient[-1:] * len(student), expected, rtol=1e-4, atol=1e-5)


# x of shape (N, C, ...), and the part of it that is not zeros: planes in shares, a single one, and such that two are
# more than 32 bits count; rows that are vectors and rows that are not, also more of them than 32 bits count.
TENSORS = {
    "planes": ((2**18 + 2, 2, 64, 64), (slice(-1, None),)),
    "as many as 32 bits, which is none": ((2**19, 2, 64, 64), (slice(-1, None),)),
    "one plane": ((1, 1, 1, BEYOND + 2**22), (..., slice(-4096, None))),
    "large planes": ((2, 2, 1, 2**30 + 4096), (slice(-1, None), ..., slice(-4096, None))),
    "rows": ((2**30 + 4096, 2), (slice(-64, None),)),
    "rows of vectors": ((2**28 + 4096, 8), (slice(-64, None),)),
    "many rows": ((BEYOND + 2**22, 2), (slice(-64, None),)),
}
CASES = pytest.mark.parametrize(("name", "offset"), [*((name, 0) for name in TENSORS), ("planes", 1), ("one plane", 1)])


class Parts:
    """Two large tensors of which a part holds values, and those parts."""

    def __init__(self, name, offset):
        shape, self.part = TENSORS[name]
        self.large = [zeros(*shape, offset=offset) for _ in range(2)]
        for seed, tensor in enumerate(self.large):
            tensor[self.part] = random_like(tensor[self.part], seed)
        self.small = [tensor[self.part].contiguous() for tensor in self.large]
        i = Inputs(torch.bfloat16, torch.contiguous_format)
        self.channels = [torch.zeros(shape[1]), *(i.channel(shape[1]) for _ in range(5))]
        self.ratio = self.small[0].numel() / self.large[0].numel()

    def check(self, value, expected):
        torch.testing.assert_close(value[self.part], expected, rtol=1e-2, atol=1e-5)


@CASES
def test_batch_norm_act_fake_quantize(name, offset):
    parts = Parts(name, offset)
    (x, grad), (small_x, small_grad) = parts.large, parts.small
    settings = (*parts.channels[:4], torch.tensor([-1.0]), torch.tensor([1.0]), 4, 0, 1e-5, 1, True)
    emulation.take_launched()
    with emulation.most_blocks(4):
        y = OPS.batch_norm_act_fake_quantize(x, *settings)
        assert 4000 < emulation.take_launched()[1] <= 4096
        grad_x, *sums = OPS.batch_norm_act_fake_quantize_backward(grad, x, *settings)
        assert 2000 < emulation.take_launched()[1] - 1 <= 2048  # and one that finishes the sums
    parts.check(y, reference.batch_norm_act_fake_quantize(small_x, *settings))
    expected, *expected_sums = reference.batch_norm_act_fake_quantize_backward(small_grad, small_x, *settings)
    parts.check(grad_x, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)


@CASES
def test_batch_norm_act_moments(name, offset):
    parts = Parts(name, offset)
    (x, grad), (small_x, small_grad) = parts.large, parts.small
    settings = (*parts.channels[:4], 1e-5, 1)
    grad_mean, grad_var = parts.channels[4:]
    with emulation.most_blocks(4):
        y, mean, var = OPS.batch_norm_act_moments(x, *settings)
        grad_x = OPS.batch_norm_act_moments_backward(grad, grad_mean, grad_var, x, mean, *settings)
    expected, small_mean, small_var = reference.batch_norm_act_moments(small_x, *settings)
    parts.check(y, expected)
    torch.testing.assert_close(mean, small_mean * parts.ratio, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(var, (small_var + small_mean**2) * parts.ratio, rtol=1e-5, atol=1e-12)
    # So many elements share the gradients of the statistics that each gets next to nothing.
    nothing = torch.zeros_like(mean)
    parts.check(
        grad_x, reference.batch_norm_act_moments_backward(small_grad, nothing, nothing, small_x, mean, *settings)
    )


def test_planes_of_one_channel_that_lie_far_apart():
    x = zeros(BEYOND // 2**18 + 2, 2**12, 8, 8)
    last = x[-1:, -1:].copy_(random_like(x[-1:, -1:], 0))
    i = Inputs(torch.bfloat16, torch.contiguous_format)
    bn, limits = [i.channel(x.shape[1]) for _ in range(4)], (torch.tensor([-1.0]), torch.tensor([1.0]))
    with emulation.most_blocks(2):
        y = OPS.batch_norm_act_fake_quantize(x, *bn, *limits, 4, 0, 1e-5, 1, True)
    expected = reference.batch_norm_act_fake_quantize(last, *(p[-1:] for p in bn), *limits, 4, 0, 1e-5, 1, True)
    torch.testing.assert_close(y[-1:, -1:], expected)


# Large samples, and many of them.
@pytest.mark.parametrize("name", ["large planes", "rows"])
def test_conditional_batch_norm_act(name):
    parts = Parts(name, 0)
    x, small_x = parts.large[0], parts.small[0]
    weight, bias = (values.view(1, -1) for values in parts.channels[2:4])
    mean, var = parts.channels[:2]
    labels = zeros(len(x), dtype=torch.int64)
    with emulation.most_blocks(4):
        y, mean, inv_std, *_ = OPS.conditional_batch_norm_act(x, weight, bias, labels, mean, var, 0.1, 1e-5, 0.2)
    mean, inv_std, weight, bias = (values.view(1, -1, *[1] * (x.dim() - 2)) for values in (mean, inv_std, weight, bias))
    expected = torch.nn.functional.leaky_relu((small_x - mean) * inv_std * weight + bias, 0.2)
    torch.testing.assert_close(y[parts.part][-1:], expected.bfloat16()[-1:], rtol=1e-2, atol=1e-5)


def test_planes_that_are_too_large_for_single_elements_are_refused():
    x = zeros(2, 2, 1, 2**30 + 4096, offset=1)
    with pytest.raises(RuntimeError, match="planes of over 2\\^30 vectors"):
        OPS.batch_norm_act_moments(x, torch.zeros(2), torch.ones(2), None, None, 1e-5, 1)
