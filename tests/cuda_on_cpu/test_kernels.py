"""The CUDA kernels' own source, run on the CPU, against the reference and against float64.

Seeds change the order in which threads and blocks run: what depends on it, a missing barrier for one, fails under some.
"""

import itertools

import emulation
import pytest
import torch
from op_cases import CASES, COMBINATIONS, DTYPES, LAYOUTS, Inputs, compare

from gdfq_ext import quantizer_grid, reference
from gdfq_ext._schemas import SCHEMES

SEEDS = [0, 1, 2, 3]
OPS = torch.ops.gdfq_cuda_on_cpu


@pytest.fixture(
    autouse=True,
    params=[*SEEDS[:2], *(pytest.param(other, marks=pytest.mark.long) for other in SEEDS[2:])],
    ids="seed{}".format,
)
def seed(request):
    emulation.set_seed(request.param)
    with emulation.guarded_memory():
        yield request.param


@pytest.mark.parametrize(("name", "dtype", "layout"), COMBINATIONS)
def test_small_cases(name, dtype, layout):
    for arguments in CASES[name](Inputs(dtype, layout)):
        compare(OPS, name, arguments)


# Planes of whole vectors and ragged ones, channels of whole vectors and ragged ones, several shares, one channel, no
# spatial dimensions, a grid with idle threads.
SHAPES = [(3, 8, 16, 16), (2, 5, 7, 7), (2, 40, 5, 4), (1, 1, 1, 9001), (700, 3), (3, 264, 1, 2), (40, 2, 20, 20)]


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_larger_shapes(shape, dtype, layout, offset, seed):
    for name, arguments in larger_calls(shape, dtype, layout, SHAPES.index(shape) + offset + seed):
        compare(Placed(OPS, offset=offset), name, arguments)


@pytest.mark.parametrize("offset", [(0, 1), (1, 0)], ids=["second", "first"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_two_inputs_is_misaligned(dtype, layout, offset):
    for name, arguments in larger_calls(SHAPES[0], dtype, layout, 1):
        compare(Placed(OPS, offset=offset), name, arguments)


def larger_calls(shape, dtype, layout, setting):
    """Calls of every op that takes an x of this shape; of six settings in a row all schemes, activations and gradients
    occur."""
    i = Inputs(dtype, layout)
    channels = shape[1]
    x, grad = i.x(*shape), i.x(*shape)
    mean, var, weight, bias, grad_mean, grad_var = (i.channel(channels) for _ in range(6))
    bn = (mean, var, weight - 0.5, bias - 0.5)
    scheme = setting % 3
    quantizer = (i.lower, i.upper, 4, scheme, 1e-5, setting // 2 % 3, setting % 2 == 0)
    small = (grad / x.numel() ** 0.5).to(dtype)  # sums of order one: one absolute tolerance fits
    labels = torch.randint(3, shape[:1], generator=i.generator)
    tables = (torch.randn(3, channels, generator=i.generator) for _ in range(2))
    conditional = (*tables, labels)
    special = x.clone()
    special[0, 0].view(-1)[:1], special[-1, -1].view(-1)[-1:] = torch.nan, torch.inf
    mask = torch.arange((x.numel() + 7) // 8).to(torch.uint8)
    yield "fake_quantize", (special, i.lower, i.upper, 4, scheme, -1)
    yield "fake_quantize", (special, -mean, var, 5, scheme, 1)
    yield "fake_quantize_clipped", (special, i.lower, i.upper, 4, scheme, -1)
    yield "fake_quantize_clipped", (special, -mean, var, 3, scheme, 1)
    yield "fake_quantize_clipped_backward", (x, mask)
    yield "fake_quantize_weights", ([x, special], [4, 8], [scheme, (scheme + 1) % 3])
    yield "observe_range", (x, torch.tensor([-0.1, 0.2, 0.3]), 0.9)
    yield "observe_range", (special, torch.tensor([-0.1, 0.2, 0.3]), 0.9)
    choice = torch.randint_like(x, 256).byte() if setting % 4 else None
    learned = torch.tensor([0.13]), torch.tensor([3.0]), choice, 0, 15, 77 if setting % 4 else 0, 0.2
    yield "fake_quantize_learned", (special, *learned)
    yield "fake_quantize_learned_backward", (small, x, *learned)
    yield "batch_norm_act_fake_quantize", (special, *bn, *quantizer)
    yield "batch_norm_act_fake_quantize_backward", (small, x, *bn, *quantizer)
    yield "batch_norm_act_moments", (x, *bn, 1e-5, setting % 3)
    yield "batch_norm_act_moments_backward", (grad, grad_mean, grad_var, x, mean, *bn, 1e-5, setting % 3)
    yield "conditional_batch_norm_act", (x, *conditional, mean, var, 0.1, 1e-5, 0.2)
    yield "conditional_batch_norm_act_backward", (small, x, *conditional, mean, var, 0.2)


class Placed:
    """Ops that first move their arguments to `device`, `offset` elements into buffers of their own; several offsets are
    taken in turns."""

    def __init__(self, ops, device="cpu", offset=0):
        self.ops, self.device, self.offsets = ops, device, offset if isinstance(offset, tuple) else (offset,)

    def __getattr__(self, name):
        def call(*arguments):
            pairs = zip(arguments, itertools.cycle(self.offsets))
            moved = [placed(argument, self.device, offset) for argument, offset in pairs]
            result = getattr(self.ops, name)(*moved)
            for argument, after in zip(arguments, moved, strict=True):
                if isinstance(argument, torch.Tensor):
                    argument.copy_(after)  # what was updated in place
            return placed(result, "cpu", 0)

        return call


def placed(value, device, offset):
    """The same values and layouts in new memory; `offset` is what they have already where it is 0."""
    if isinstance(value, (list, tuple)):
        return [placed(element, device, offset) for element in value]
    if not isinstance(value, torch.Tensor):
        return value
    offset = offset or value.storage_offset()
    buffer = torch.empty(value.numel() + offset, dtype=value.dtype, device=device)
    copy = buffer[offset:].as_strided(value.shape, value.stride(), offset).copy_(value.detach())
    return copy.requires_grad_(value.requires_grad)


# One plane and interleaved rows in more shares than a warp has lanes; several shares of whole vectors within a plane.
@pytest.mark.parametrize("shape", [(1, 1, 261, 301), (1, 3, 151, 153), (1, 2, 80, 80)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_shares(shape, layout):
    i = Inputs(torch.float32, layout)
    x, bn = i.x(*shape), [i.channel(shape[1]) for _ in range(4)]
    small = i.x(*shape) / x.numel() ** 0.5
    compare(OPS, "batch_norm_act_moments", (x, *bn, 1e-5, 1))
    compare(OPS, "batch_norm_act_fake_quantize_backward", (small, x, *bn, i.lower, i.upper, 4, 0, 1e-5, 1, True))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_range_takes_in_every_element(dtype, offset):
    for position in range(19):
        x = torch.zeros(19, dtype=dtype)
        x[position] = 3.0 if position % 2 else -3.0
        compare(Placed(OPS, offset=offset), "observe_range", (x, torch.zeros(3), 0.9))


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_the_range_takes_in_every_block(offset):
    """More blocks than a block has threads, and where vectors are single elements, more than a grid has."""
    x = torch.zeros(1_100_003)
    x[-1], x[-5000], x[600_000] = -2.0, 2.0, 1.0
    state = torch.zeros(3)
    assert Placed(OPS, offset=offset).observe_range(x, state, 0.0).tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_about_as_long_as_a_warp_takes(dtype):
    i = Inputs(dtype, torch.contiguous_format)
    for scheme, length in enumerate((1023, 1024, 1025, 1032)):
        compare(OPS, "fake_quantize_weights", ([i.x(19, length), i.x(3, 5)], [4, 8], [scheme % 3, 1]))


@pytest.mark.parametrize("offset", [0, 1, (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("kappas", [1, 9, 16])
def test_changed_codes_of_short_and_long_channels(kappas, offset):
    i = Inputs(torch.float32, torch.contiguous_format)
    weights, directions = ([i.x(19, length) for length in (5, 36, 1023, 1024, 1025, 1032)] for _ in range(2))
    weights[1][3, 4], weights[4][2, 0], directions[5][0, 0] = torch.nan, torch.inf, torch.inf
    sizes = torch.tensor(1e-3), torch.tensor([2.0**k for k in range(kappas)])
    quantizers = [2, 3, 4, 5, 6, 8], [0, 1, 2, 0, 1, 2]
    compare(Placed(OPS, offset=offset), "count_changed_codes", (weights, directions, *quantizers, *sizes))


def test_no_warp_reads_the_sizes_of_steps_before_they_are_there():
    """In memory that blocks share lie those of the call before."""
    weights, directions = torch.randn(8, 5), torch.randn(8, 5)
    for seed in range(1, 33):  # of the order of threads, and which warp is late
        emulation.set_seed(seed)
        sizes = torch.tensor(1e-2), torch.tensor([2.0 ** (seed % 7), 4.0])
        compare(OPS, "count_changed_codes", ([weights], [directions], [4], [0], *sizes))


def test_steps_of_weights_without_elements():
    weights = [torch.zeros(4, 0), torch.zeros(0, 3)]
    sizes = torch.tensor(1.0), torch.tensor([1.0, 2.0])
    compare(OPS, "count_changed_codes", (weights, weights, [4, 4], [0, 1], *sizes))


# More blocks than a block has threads, and where vectors are single elements, more than a grid has.
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_learned_steps_of_every_block(offset):
    i = Inputs(torch.float32, torch.contiguous_format)
    x, grad = i.x(1_100_003), i.x(1_100_003) / 1000
    learned = torch.tensor([0.2]), torch.tensor([3.0]), torch.randint_like(x, 256).byte(), 0, 15, 128, 0.2
    compare(Placed(OPS, offset=offset), "fake_quantize_learned", (x, *learned))
    compare(Placed(OPS, offset=offset), "fake_quantize_learned_backward", (grad, x, *learned))


@pytest.mark.parametrize("position", [0, 1, 4], ids=["grad_y", "x", "choice"])
def test_one_tensor_of_learned_steps_is_misaligned(position):
    i = Inputs(torch.float32, torch.contiguous_format)
    x, grad = i.x(300), i.x(300)
    learned = torch.tensor([0.2]), torch.tensor([3.0]), torch.randint_like(x, 256).byte(), 0, 15, 128, 0.2
    offset = tuple(int(k == position) for k in range(9))
    compare(Placed(OPS, offset=offset), "fake_quantize_learned_backward", (grad, x, *learned))
    compare(Placed(OPS, offset=offset[1:]), "fake_quantize_learned", (x, *learned))


# Of steps this small, or large, float32 does not hold the reciprocals.
@pytest.mark.parametrize("step", [1e-45, 1e-40, 1e-30, 5e-20, 1.7e-3, 2.0, 1e19, 1e30, 3e38, 0.0, -1.0, torch.nan])
def test_learned_steps_of_any_size(step):
    step = torch.tensor([step])
    most = torch.tensor(torch.finfo(torch.float32).max)
    halves = (torch.arange(-20, 20) + 0.5) * step
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, most, -most, 0.0, -0.0, 1e-45, -1e-45])
    x = torch.cat([halves, halves.nextafter(most), halves.nextafter(-most), special])
    for choice, threshold in [(None, 0), (torch.arange(len(x)).byte(), 30)]:
        learned = step, torch.tensor([6.0]), choice, 0, 15, threshold, 0.2
        compare(OPS, "fake_quantize_learned", (x, *learned))
        compare(OPS, "fake_quantize_learned_backward", (torch.ones_like(x), x, *learned))
        finite = x[~x.isnan()]
        learned = step, torch.tensor([6.0]), None, 0, 15, 0, 0.2
        compare(OPS, "fake_quantize_learned_backward", (torch.ones_like(finite), finite, *learned))


@pytest.mark.parametrize("offset", [0, 1, (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("sharpness", [1.0, 2.0, 20.0])
@pytest.mark.parametrize("length", [5, 36, 1023, 1024, 1025, 1032])
def test_soft_weights_of_short_and_long_channels(length, sharpness, offset):
    i = Inputs(torch.float32, torch.contiguous_format)
    base, v, grad = (i.x(19, length) * 4).floor(), i.x(19, length) * 3, i.x(19, length) / length**0.5
    v[2, 3], v[4, 1], v[6, 0] = 200.0, -200.0, 0.0
    step, zero_point = i.channel(19), (i.channel(19) * 9).round()
    for bounds in [(0, 15), (-1, 1)]:
        arguments = base, v, step, zero_point, torch.tensor([sharpness]), *bounds
        compare(Placed(OPS, offset=offset), "round_learned", arguments)
        compare(Placed(OPS, offset=offset), "round_learned_backward", (grad, torch.tensor(-0.3), *arguments))


def test_penalties_of_more_channels_than_a_block_has_threads():
    i = Inputs(torch.float32, torch.contiguous_format)
    base, v, step = i.x(600, 3).floor(), i.x(600, 3), i.channel(600)
    compare(OPS, "round_learned", (base, v, step, torch.zeros(600), torch.tensor([2.0]), -7, 7))


@pytest.mark.parametrize("position", [0, 2, 3], ids=["grad_y", "base", "v"])
def test_one_tensor_of_soft_weights_is_misaligned(position):
    i = Inputs(torch.float32, torch.contiguous_format)
    arguments = i.x(7, 36).floor(), i.x(7, 36), i.channel(7), i.channel(7).round(), torch.tensor([2.0]), -7, 7
    offset = tuple(int(k == position) for k in range(9))
    compare(Placed(OPS, offset=offset), "round_learned_backward", (i.x(7, 36), torch.tensor(0.5), *arguments))
    compare(Placed(OPS, offset=offset[2:]), "round_learned", arguments)


def test_soft_weights_that_are_not_finite_or_have_no_step():
    v = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0]] * 4)
    steps = torch.tensor([1.0, 0.0, -1.0, torch.nan])
    arguments = torch.ones(4, 4), v, steps, torch.zeros(4), torch.tensor([1.0]), 0, 15
    compare(OPS, "round_learned", arguments)
    compare(OPS, "round_learned_backward", (torch.ones(4, 4), torch.tensor(1.0), *arguments))


def test_learned_quantizers_of_nothing():
    one, none = torch.ones(1), torch.empty(0)
    compare(OPS, "fake_quantize_learned", (none, one, one, None, 0, 15, 0, 1.0))
    compare(OPS, "fake_quantize_learned_backward", (none, none, one, one, None, 0, 15, 0, 1.0))
    for shape in [(0, 3), (4, 0)]:
        weight, steps = torch.empty(shape), torch.ones(shape[0])
        arguments = weight, weight, steps, steps, one, 0, 15
        compare(OPS, "round_learned", arguments)
        compare(OPS, "round_learned_backward", (weight, torch.tensor(1.0), *arguments))


def test_blocks_of_learned_steps_are_joined_in_double():
    """Their sums are numbers that float32 holds, but not one with another: 2^24 - 1, its opposite, and 4."""
    grad = torch.zeros(2, 17, 1024)  # the vectors of a block lie in two places
    grad[:, 0], grad[1, 0, -1] = 8192.0, 8191.0
    grad[:, 8], grad[0, 16, 0] = -grad[:, 0], 4.0
    beyond, one = torch.full((17 * 2048,), 10.0), torch.ones(1)
    _, grad_step = OPS.fake_quantize_learned_backward(grad.view(-1), beyond, one, 0 * one, None, 0, 1, 0, 1.0)
    assert grad_step.tolist() == [4.0]


def test_shares_are_joined_in_double():
    """A block's sums are integers that float32 holds, their sum over all blocks is not; and in the second tensor the
    variance is a thousandth of the mean square, so that rounding the sums to float32 shows."""
    x = torch.full((1, 1, 1024, 1200), 62.0)
    x[..., ::2] = 64.0
    y, mean, var = OPS.batch_norm_act_moments(x, torch.zeros(1), torch.ones(1), None, None, 0.0, 0)
    assert (mean.item(), var.item()) == (63.0, 1.0)
    tables, labels = (torch.ones(1, 1), torch.zeros(1, 1)), torch.zeros(1, dtype=torch.int64)
    statistics = torch.zeros(1), torch.ones(1)
    _, mean, inv_std, _, _ = OPS.conditional_batch_norm_act(x, *tables, labels, *statistics, 0.1, 0.0, 1.0)
    assert (mean.item(), inv_std.item()) == (63.0, 1.0)
    assert torch.equal(y, x)

    x = torch.randint(16, 18, (1, 1, 512, 512), generator=torch.Generator().manual_seed(0)).float()
    _, mean, var = OPS.batch_norm_act_moments(x, torch.zeros(1), torch.ones(1), None, None, 1e-5, 1)
    torch.testing.assert_close(mean.double(), x.double().mean()[None], rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var(correction=0)[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_infinite_or_too_large_for_the_type_becomes_infinite(dtype):
    x = torch.tensor([[torch.inf, -torch.inf, torch.finfo(dtype).max, -1.0]] * 2, dtype=dtype)
    large = [torch.zeros(4), torch.ones(4), torch.full((4,), 3.0), torch.zeros(4)]
    y, *_ = OPS.batch_norm_act_moments(x, *large, 0.0, 0)
    assert y[0].tolist() == [torch.inf, -torch.inf, torch.inf, -3.0]


def test_the_greatest_level_of_a_range_may_be_infinite():
    x = torch.tensor([3.4e38, 3.2e38, -torch.inf, torch.nan])
    lower, upper = torch.tensor([3.1e38]), torch.tensor([3.4028e38])  # a step is more than is left above the range
    assert OPS.fake_quantize(x, lower, upper, 2, 0, -1)[0] == torch.inf
    for scheme in range(3):
        compare(OPS, "fake_quantize", (x, lower, upper, 2, scheme, -1))


NO_NORM = (torch.zeros(1), torch.ones(1), None, None)


# From the empty range to as far as float32 goes: the widest have steps whose reciprocals it does not hold.
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [0.0, 1e-30, 1.7e-3, 0.3, 2.0, 1e19, 2e19, 3.1e38, 3.4028e38])
def test_quotients_by_the_step_fall_on_the_right_side_of_a_half(width, bits, scheme):
    most = torch.tensor(torch.finfo(torch.float32).max)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, most, -most, 0.0, -0.0, 1e-45, -1e-45])
    for ends in [(-0.1, 0.9), (0.2, 1.0), (-1.0, -0.2)]:
        lower, upper = (torch.tensor([end * width]) for end in ends)
        step = quantizer_grid(lower, upper, bits, scheme).step
        halves = (torch.arange(-(2.0**bits), 2**bits + 2) + 0.5) * step
        x = torch.cat([halves, halves.nextafter(most), halves.nextafter(-most), special])
        quantizer = lower, upper, bits, SCHEMES[scheme]
        compare(OPS, "fake_quantize_clipped", (x, *quantizer, -1))
        compare(OPS, "fake_quantize_clipped", (x[None], *quantizer, 0))
        normed = *NO_NORM, *quantizer, 0.0, 0, True
        compare(OPS, "batch_norm_act_fake_quantize", (x.view(-1, 1), *normed))
        for y in (OPS.fake_quantize(x, *quantizer, -1), OPS.batch_norm_act_fake_quantize(x.view(-1, 1), *normed)):
            assert not y[y == 0].signbit().any()
        finite = x[x.isfinite()].view(-1, 1)
        grad_x, _, _ = OPS.batch_norm_act_fake_quantize_backward(torch.ones_like(finite), finite, *normed)
        passes = reference.batch_norm_act_fake_quantize_backward(torch.ones_like(finite), finite, *normed)[0]
        assert torch.equal(grad_x, passes)


@pytest.mark.parametrize("scheme", SCHEMES.values())
def test_bad_ranges(scheme):
    ends = [1.0, -1.0, torch.nan, torch.inf, -torch.inf]
    lower, upper = (torch.tensor(values) for values in zip(*itertools.product(ends, ends), strict=True))
    x = torch.tensor([-torch.inf, -5.0, 0.0, 0.3, torch.inf, torch.nan]).repeat(len(lower), 1)
    compare(OPS, "fake_quantize_clipped", (x, lower, upper, 4, scheme, 0))
    for pair in zip(lower.split(1), upper.split(1), strict=True):
        compare(OPS, "fake_quantize_clipped", (x, *pair, 4, scheme, -1))
        compare(OPS, "batch_norm_act_fake_quantize", (x.view(-1, 1), *NO_NORM, *pair, 4, scheme, 0.0, 0, True))


def test_gradients_at_the_corners_of_activations():
    x = torch.tensor([[0.0, -0.0, 6.0, -1e-45]]).expand(3, 4).contiguous()
    zeros, ones = torch.zeros(4), torch.ones(4)
    bn = (zeros, ones, ones, zeros)
    grad, labels = torch.full_like(x, 2.0), torch.zeros(3, dtype=torch.int64)
    for act in (0, 1, 2):
        quantizer = (torch.tensor([-8.0]), torch.tensor([8.0]), 8, act, 0.0, act, True)
        compare(OPS, "batch_norm_act_fake_quantize_backward", (grad, x, *bn, *quantizer))
        compare(OPS, "batch_norm_act_moments_backward", (grad, zeros, zeros, x, zeros, *bn, 0.0, act))
    compare(OPS, "conditional_batch_norm_act_backward", (grad, x, ones[None], zeros[None], labels, zeros, ones, 0.25))


def test_labels_that_are_no_class():
    i = Inputs(torch.float32, torch.contiguous_format)
    labels = torch.tensor([2, -1, 3, 2**32])  # the last is 0 in 32 bits
    tables, statistics = [torch.randn(3, 2) for _ in range(2)], [i.channel(2) for _ in range(2)]
    compare(OPS, "distillation_loss", (i.x(4, 3), i.x(4, 3), labels, None, 4.0, 1.0, 1.0, True))
    compare(OPS, "conditional_batch_norm_act", (i.x(4, 2, 5), *tables, labels, *statistics, 0.1, 1e-5, 0.2))
    compare(OPS, "conditional_batch_norm_act_backward", (i.x(4, 2, 5), i.x(4, 2, 5), *tables, labels, *statistics, 0.2))


# No samples, no channels, no pixels.
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty_inputs(shape):
    i = Inputs(torch.float32, torch.contiguous_format)
    x, labels = i.x(*shape), torch.zeros(shape[0], dtype=torch.int64)
    bn, tables = [i.channel(shape[1]) for _ in range(4)], [torch.randn(2, shape[1]) for _ in range(2)]
    quantizer = (i.lower, i.upper, 4, 1, 1e-5, 1, True)
    compare(OPS, "fake_quantize_clipped_backward", (x, torch.empty(0, dtype=torch.uint8)))
    compare(OPS, "batch_norm_act_fake_quantize", (x, *bn, *quantizer))
    compare(OPS, "batch_norm_act_fake_quantize_backward", (x, x, *bn, *quantizer))
    compare(OPS, "batch_norm_act_moments", (x, *bn, 1e-5, 1))
    compare(OPS, "batch_norm_act_moments_backward", (x, *bn[:2], x, *bn[:3], None, None, 1e-5, 1))
    compare(OPS, "conditional_batch_norm_act", (x, *tables, labels, *bn[:2], 0.1, 1e-5, 0.2))
    compare(OPS, "conditional_batch_norm_act_backward", (x, x, *tables, labels, *bn[:2], 0.2))


def test_a_table_of_one_row_that_no_sample_has():
    x, one, labels = torch.randn(2, 1, 3), torch.ones(1), torch.tensor([-1, -1])
    compare(OPS, "conditional_batch_norm_act_backward", (x, x, one[None], one[None], labels, one, one, 0.2))


def test_no_images():
    i = Inputs(torch.float32, torch.contiguous_format)
    for targets in (torch.zeros(0, dtype=torch.int64), i.x(0, 3)):
        compare(OPS, "distillation_loss", (i.x(0, 3), i.x(0, 3), targets, i.channel(0), 4.0, 1.0, 1.0, True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_far_from_the_running_mean(layout):
    """Sums are shifted by the running mean: what is left of the variance is what float32 inputs allow."""
    x = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0)) + 1000.0
    x = x.contiguous(memory_format=layout)
    center = x.mean((0, 2, 3)) + 0.3
    _, mean, var = OPS.batch_norm_act_moments(x, center, torch.ones(8), None, None, 1e-5, 0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


def test_many_layers_in_several_launches():
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(3 + k % 5, 1 + 37 * (k % 40), generator=g) for k in range(150)]
    compare(OPS, "fake_quantize_weights", (weights, [2 + k % 7 for k in range(150)], [k % 3 for k in range(150)]))
    directions = [torch.randn(weight.shape, generator=g) for weight in weights]
    bits, schemes = [2 + k % 7 for k in range(150)], [k // 7 % 3 for k in range(150)]
    sizes = torch.tensor(0.01), torch.tensor([1.0, 8.0])
    compare(OPS, "count_changed_codes", (weights, directions, bits, schemes, *sizes))
    layers = [[torch.randn(1 + k % 300, generator=g) for k in range(150)] for _ in range(4)]
    for mean in (True, False):
        compare(OPS, "bns_loss", (*layers, mean))


@pytest.mark.parametrize(("batch", "classes"), [(33, 1), (33, 10), (33, 1000), (300, 33)])
def test_distillation_loss_against_float64(batch, classes):
    g = torch.Generator().manual_seed(classes)
    student, teacher = (torch.randn(batch, classes, generator=g) * 3 for _ in range(2))
    labels = torch.randint(classes, (batch,), generator=g)
    shares = torch.randn(batch, classes, generator=g).softmax(1) * 1.5  # F.cross_entropy takes any sum
    sample_weight = torch.rand(batch, generator=g)
    for targets, batchmean in itertools.product((labels, shares), (True, False)):
        loss, cross_entropy, kl, gradient = OPS.distillation_loss(
            student, teacher, targets, sample_weight, 4.0, 0.5, 2.0, batchmean
        )
        leaf = student.double().requires_grad_()
        soft = torch.log_softmax(leaf / 4, 1), torch.log_softmax(teacher.double() / 4, 1)
        kl64 = torch.nn.functional.kl_div(*soft, log_target=True, reduction="batchmean" if batchmean else "mean")
        targets64 = targets if targets is labels else targets.double()
        terms = torch.nn.functional.cross_entropy(leaf, targets64, reduction="none")
        cross_entropy64 = (sample_weight * terms).mean()
        loss64 = 0.5 * cross_entropy64 + 2.0 * 16 * kl64
        (gradient64,) = torch.autograd.grad(loss64, leaf)
        for value, exact in ((loss, loss64), (cross_entropy, cross_entropy64), (kl, kl64), (gradient, gradient64)):
            torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-5, atol=1e-6)


def layers(*lengths):
    return [[torch.ones(length) for length in lengths] for _ in range(4)]


def steps(*shapes):
    tensors = [torch.ones(shape) for shape in shapes]
    return tensors, tensors, [4] * len(shapes), [1] * len(shapes), torch.tensor(0.1), torch.ones(2)


def activations(*shape, layout=torch.contiguous_format, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype).contiguous(memory_format=layout)


def soft(*shape):
    return activations(*shape), activations(*shape), *[torch.ones(shape[0])] * 2, torch.ones(1), 0, 15


ONES = [torch.ones(1)] * 2
LEARNED = (*ONES, None, 0, 15, 0, 1.0)
# The arguments of an op, and what is launched for it: kernels, blocks, threads.
LAUNCHES = {
    # Four vectors of 16 bytes a thread, 256 threads a block.
    "two blocks": ("fake_quantize", (activations(2 * 4096), *ONES, 4, 0, -1), (1, 2, 2 * 256)),
    "a third": ("fake_quantize", (activations(2 * 4096 + 1), *ONES, 4, 0, -1), (1, 3, 3 * 256)),
    "halves": ("fake_quantize", (activations(2 * 8192, dtype=torch.float16), *ONES, 4, 0, -1), (1, 2, 2 * 256)),
    "range of two blocks": ("observe_range", (activations(2 * 4096), torch.zeros(3), 0.9), (2, 3, 3 * 256)),
    "range of a third": ("observe_range", (activations(2 * 4096 + 1), torch.zeros(3), 0.9), (2, 4, 4 * 256)),
    # Eight short channels a block, or a long one; 64 layers a launch.
    "short weights": ("fake_quantize_weights", ([activations(17, 1024)], [4], [0]), (1, 3, 3 * 256)),
    "long weights": ("fake_quantize_weights", ([activations(17, 1025)], [4], [0]), (1, 17, 17 * 256)),
    "64 weights": ("fake_quantize_weights", ([activations(8, 2)] * 64, [4] * 64, [1] * 64), (1, 64, 64 * 256)),
    "65 weights": ("fake_quantize_weights", ([activations(8, 2)] * 65, [4] * 65, [1] * 65), (2, 65, 65 * 256)),
    # Divided like those, and a block for each layer that adds.
    "steps": ("count_changed_codes", steps((17, 1024), (17, 1025), (0, 3)), (2, 3 + 17 + 3, 23 * 256)),
    "64 steps": ("count_changed_codes", steps(*[(8, 2)] * 64), (2, 128, 128 * 256)),
    "65 steps": ("count_changed_codes", steps(*[(8, 2)] * 65), (4, 130, 130 * 256)),
    # Two vectors of 16 bytes of each tensor a thread, at most 2,048 blocks, and one that adds.
    "learned": ("fake_quantize_learned", (activations(2 * 2048), *LEARNED), (1, 2, 2 * 256)),
    "learned halves": ("fake_quantize_learned", (activations(4097, dtype=torch.float16), *LEARNED), (1, 2, 2 * 256)),
    "learned gradient": (
        "fake_quantize_learned_backward",
        (activations(2 * 2048 + 1), activations(2 * 2048 + 1), *LEARNED),
        (2, 3 + 1, 4 * 256),
    ),
    "short soft weights": ("round_learned", soft(17, 1024), (2, 3 + 1, 4 * 256)),
    "long soft weights": ("round_learned", soft(17, 1025), (2, 17 + 1, 18 * 256)),
    "gradient of soft weights": (
        "round_learned_backward",
        (activations(17, 1025), torch.tensor(1.0), *soft(17, 1025)),
        (1, 17, 17 * 256),
    ),
    # A block for each layer, 64 in a launch, and a warp that adds.
    "64 layers": ("bns_loss", (*layers(*[3] * 64), True), (2, 65, 64 * 256 + 32)),
    "65 layers": ("bns_loss", (*layers(*[3] * 65), True), (3, 66, 65 * 256 + 32)),
    # A block for each image, of as many warps as hold the classes, and one that adds.
    "32 classes": (
        "distillation_loss",
        (activations(5, 32), activations(5, 32), torch.zeros(5, dtype=torch.int64), None, 4.0, 1.0, 1.0, True),
        (2, 6, 5 * 32 + 256),
    ),
    "33 classes": (
        "distillation_loss",
        (activations(5, 33), activations(5, 33), torch.zeros(5, dtype=torch.int64), None, 4.0, 1.0, 1.0, True),
        (2, 6, 5 * 64 + 256),
    ),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_how_work_is_divided(name, seed):
    op, arguments, launched = LAUNCHES[name]
    emulation.take_launched()
    getattr(OPS, op)(*arguments)
    assert emulation.take_launched() == launched


# x, and the blocks and threads of a kernel with one input and with two, without sums and with them.
DIVISIONS = {
    # A block for each channel, of as few warps as take four vectors a thread, two of them where inputs are two.
    "planes": (activations(3, 8, 16, 16), (8, 64), (8, 96), (8, 64), (8, 96)),
    # At most 4,096 blocks, and 2,048 where sums are taken, of whole rounds of 256 threads.
    "shares": (activations(2, 2, 64, 64), (4, 256), (8, 256), (4, 256), (8, 256)),
    # Vectors of one element, eight of them a thread, four where inputs are two.
    "elements": (activations(40, 2, 7, 7), (2, 256), (4, 256), (2, 256), (4, 256)),
    # Rows: 32 vectors side by side at most, in as many rows as fill a block; four or two rows a thread, eight for sums.
    "rows": (activations(3, 8, 16, 16, layout=torch.channels_last), (2, 256), (3, 256), (1, 256), (1, 256)),
    "tiles": (activations(2, 132, 8, 8, layout=torch.channels_last), (6, 256), (10, 256), (4, 256), (4, 256)),
    "few": (activations(50, 3), (1, 160), (1, 160), (1, 160), (1, 160)),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_how_channels_are_divided(name):
    x, *kernels = DIVISIONS[name]
    one_input, two_inputs, one_input_summed, two_inputs_summed = [(blocks, blocks * size) for blocks, size in kernels]
    channels = x.shape[1]
    warps = -(-channels // 8)  # a warp finishes the sums of a channel
    finish = warps, warps * 256
    bn, settings = [torch.ones(channels)] * 4, (1e-5, 1)
    emulation.take_launched()

    def launched(*kernels):
        blocks, threads = zip(*kernels, strict=True)
        return emulation.take_launched() == (len(kernels), sum(blocks), sum(threads))

    OPS.batch_norm_act_fake_quantize(x, *bn, *ONES, 4, 0, *settings, True)
    assert launched(one_input)
    OPS.batch_norm_act_fake_quantize_backward(x, x, *bn, *ONES, 4, 0, *settings, True)
    assert launched(two_inputs_summed, finish)
    OPS.batch_norm_act_moments(x, *bn, *settings)
    assert launched(one_input_summed, finish)
    OPS.batch_norm_act_moments_backward(x, *bn[:2], x, bn[0], *bn, *settings)
    assert launched(two_inputs)


def test_how_channels_of_samples_are_divided():
    x, labels = activations(3, 8, 16, 16), torch.tensor([1, 0, 1])
    tables, one = [torch.ones(40, 8)] * 2, torch.ones(8)
    emulation.take_launched()
    OPS.conditional_batch_norm_act(x, *tables, labels, one, one, 0.1, 1e-5, 0.2)
    # Sums of 8 channels, finished by a warp each, and 24 channels of samples.
    assert emulation.take_launched() == (3, 8 + 1 + 24, 8 * 64 + 256 + 24 * 32)
    OPS.conditional_batch_norm_act_backward(x, x, *tables, labels, one, one, 0.2)
    # The tables cleared; sums of 24 channels of samples, finished by a warp each; a warp for each channel and a thread
    # for each of a sample; the gradient.
    assert emulation.take_launched() == (6, 2 + 24 + 3 + 1 + 1 + 24, (2 + 3 + 1 + 1) * 256 + 2 * 24 * 32)


def test_one_element():
    i = Inputs(torch.float32, torch.contiguous_format)
    x, bn = i.x(1, 1), [i.channel(1) for _ in range(4)]
    compare(OPS, "batch_norm_act_moments", (x, *bn, 1e-5, 1))
    compare(OPS, "batch_norm_act_moments_backward", (x, *bn[:2], x, bn[0], *bn, 1e-5, 1))
    compare(OPS, "observe_range", (x, torch.zeros(3), 0.9))


def test_results_repeat_bit_for_bit():
    i = Inputs(torch.float32, torch.contiguous_format)
    x, grad = i.x(8, 6, 24, 24), i.x(8, 6, 24, 24)
    parameters = [i.channel(6) for _ in range(4)]
    results = []
    for seed in SEEDS:
        emulation.set_seed(seed)
        results.append(
            (
                *OPS.batch_norm_act_moments(x, *parameters, 1e-5, 1),
                *OPS.batch_norm_act_fake_quantize_backward(grad, x, *parameters, i.lower, i.upper, 4, 0, 1e-5, 1, True),
                *OPS.fake_quantize_learned_backward(grad, x, *LEARNED),
                *OPS.round_learned(x, grad, *soft(8, 1)[2:]),
                *OPS.round_learned_backward(x, torch.tensor(1.0), x, grad, *soft(8, 1)[2:]),
            )
        )
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_wrong_arguments_are_refused_before_a_launch():
    x, one = torch.randn(2, 3, 4, 4), torch.ones(1)
    wrong = {
        "lower has 2 elements": lambda: OPS.fake_quantize(x, torch.ones(2), one, 4, 0, -1),
        "bits is 9": lambda: OPS.fake_quantize(x, -one, one, 9, 0, -1),
        "scheme is 3": lambda: OPS.fake_quantize(x, -one, one, 4, 3, -1),
        "2 weights, 2 bits and 1 schemes": lambda: OPS.fake_quantize_weights([x, x], [4, 4], [1]),
        "unsupported type": lambda: OPS.fake_quantize(x.double(), -one, one, 4, 0, -1),
        "labels must be 2": lambda: OPS.conditional_batch_norm_act(
            x, *[torch.ones(1, 3)] * 2, torch.zeros(3, dtype=torch.int64), *[torch.ones(3)] * 2, 0.1, 1e-5, 1.0
        ),
        "act is 3": lambda: OPS.batch_norm_act_moments(x, *[torch.ones(3)] * 2, None, None, 1e-5, 3),
    }
    for message, call in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call()
