"""The compiled CPU kernels against the reference: the same levels, masks and gradients, whatever the thread count."""

import pytest
import torch
from op_cases import CASES, COMBINATIONS, DTYPES, LAYOUTS, OPS, PLAIN, Inputs, compare

import gdfq_ext
from gdfq_ext import reference

REPORT = gdfq_ext.backend_report()
NATIVE = [name for name, devices in REPORT.ops.items() if devices["cpu"].backend == "native"]

pytestmark = pytest.mark.skipif(not NATIVE, reason=f"no native CPU kernels: {REPORT.cause}")


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "dtype", "layout"), [case for case in COMBINATIONS if case[0] in NATIVE])
def test_native_is_the_reference_on_small_cases(name, dtype, layout, threads):
    for arguments in CASES[name](Inputs(dtype, layout)):
        compare(OPS, name, arguments)


LARGE = [(16, 16, 24, 24), (5, 37, 13, 11), (1, 1, 1, 40_001), (20_001, 3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("scheme", range(3))
def test_native_quantizers_agree_level_by_level_over_threads(shape, dtype, layout, scheme, threads):
    i = Inputs(dtype, layout)
    x = i.x(*shape)
    channels = shape[1]
    lower, upper = -i.channel(channels), i.channel(channels) * 2
    special = x.clone()
    special[0, 0].view(-1)[:1], special[-1, -1].view(-1)[-1:] = torch.nan, torch.inf
    for name, arguments in {
        "fake_quantize": (special, i.lower, i.upper, 4, scheme, -1),
        "fake_quantize_clipped": (special, lower, upper, 3, scheme, 1),
        "fake_quantize_clipped_backward": (x, torch.arange((x.numel() + 7) // 8).to(torch.uint8)),
        "fake_quantize_weights": ([x], [4], [scheme]),
        "observe_range": (x, torch.tensor([-0.1, 0.2, 0.3]), 0.9),
    }.items():
        compare(OPS, name, arguments)


@pytest.mark.parametrize("schemes", [[0, 0, 0], [1, 2, 1], [2, 1, 2]])
def test_native_counts_the_codes_that_the_reference_counts(schemes, threads):
    i = Inputs(torch.float32, torch.channels_last)
    weights, directions = ([i.x(*shape) for shape in [(64, 37, 3, 3), (3, 20_001), (300, 1, 3, 3)]] for _ in range(2))
    weights[0][5, 1, 2, 0], directions[1][2, 7] = torch.inf, torch.nan
    kappas = torch.tensor([2.0**k for k in range(-2, 14)])
    compare(OPS, "count_changed_codes", (weights, directions, [4, 8, 3], schemes, torch.tensor(1e-3), kappas))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("threshold", [None, 77])
def test_native_learned_quantizer_agrees_over_threads(shape, dtype, layout, threshold, threads):
    i = Inputs(dtype, layout)
    x, grad = i.x(*shape), i.x(*shape)
    choice = None if threshold is None else torch.randint_like(x, 256).byte()
    for step, zero_point, bounds in [(0.2, 3.0, (0, 15)), (0.01, 0.0, (-127, 127)), (1e-40, 1.0, (0, 3))]:
        settings = torch.tensor([step]), torch.tensor([zero_point]), choice, *bounds, threshold or 0
        small = (grad / x.numel() ** 0.5 / max(map(abs, bounds))).to(dtype)  # sums of order one
        compare(OPS, "fake_quantize_learned_backward", (small, x, *settings, 0.3))
        special = x.clone()
        special[0, 0].view(-1)[:1], special[-1, -1].view(-1)[-1:] = torch.nan, torch.inf
        compare(OPS, "fake_quantize_learned", (special, *settings, 0.3))
        compare(OPS, "fake_quantize_learned_backward", (small, special, *settings, 0.3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(64, 37, 3, 3), (3, 20_001), (300, 1, 3, 3), (5,)])
@pytest.mark.parametrize("sharpness", [1.0, 2.0, 20.0])
def test_native_soft_weights_agree_over_threads(shape, sharpness, layout, threads):
    i = Inputs(torch.float32, layout)
    base, v, grad = (i.x(*shape) * 4).floor(), i.x(*shape) * 3, i.x(*shape)
    for channel, value in enumerate((200.0, -200.0, 0.0)):
        v[channel, *[0] * (v.dim() - 1)] = value
    step, zero_point = i.channel(shape[0]), (i.channel(shape[0]) * 9).round()
    grad_penalty = torch.tensor(-0.3)
    for bounds in [(0, 15), (-1, 1)]:
        arguments = base, v, step, zero_point, torch.tensor([sharpness]), *bounds
        compare(OPS, "round_learned", arguments)
        compare(OPS, "round_learned_backward", (grad / base[0].numel() ** 0.5, grad_penalty, *arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "act"), [*zip(LARGE, (1, 2, 0, 1), strict=True), (LARGE[1], 0), (LARGE[1], 1)])
def test_native_batch_norm_agrees_over_threads(shape, dtype, layout, act, threads):
    i = Inputs(dtype, layout)
    x, grad = i.x(*shape), i.x(*shape)
    mean, var, weight, bias, grad_mean, grad_var = (i.channel(shape[1]) for _ in range(6))
    bn = (mean, var, weight - 0.5, bias - 0.5)
    small = grad / x.numel() ** 0.5  # sums of order one, so that one absolute tolerance fits
    for scheme in range(3):
        settings = (i.lower, i.upper, 4, scheme, 1e-5, act, True)
        compare(OPS, "batch_norm_act_fake_quantize", (x, *bn, *settings))
        compare(OPS, "batch_norm_act_fake_quantize_backward", (small.to(dtype), x, *bn, *settings))
    compare(OPS, "batch_norm_act_moments", (x, *bn, 1e-5, act))
    compare(OPS, "batch_norm_act_moments_backward", (grad, grad_mean, grad_var, x, mean, *bn, 1e-5, act))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "slope"), [*zip(LARGE[:3], (0.2, 0.0, 1.0), strict=True), ((301, 33), 0.2), ((40, 20, 3, 3), 0.2)]
)
def test_native_conditional_batch_norm_agrees_over_threads(shape, dtype, layout, slope, threads):
    i = Inputs(dtype, layout)
    x, grad = i.x(*shape), i.x(*shape)
    running_mean, running_var, mean, inv_std = (i.channel(shape[1]) for _ in range(4))
    tables = [torch.randn(7, shape[1], generator=i.generator) for _ in range(2)]
    labels = torch.arange(shape[0]).square() % 7
    compare(OPS, "conditional_batch_norm_act", (x, *tables, labels, running_mean, running_var, 0.1, 1e-5, slope))
    small = (grad / x.numel() ** 0.5).to(dtype)  # sums of order one, so that one absolute tolerance fits
    compare(OPS, "conditional_batch_norm_act_backward", (small, x, *tables, labels, mean, inv_std, slope))


def test_native_conditional_batch_norm_without_a_row_is_the_reference(threads):
    i = Inputs(torch.float32, torch.channels_last)
    tables, statistics = [torch.randn(3, 20, generator=i.generator) for _ in range(2)], [i.channel(20), i.channel(20)]
    labels = torch.tensor([1, -1, 0, 3])
    arguments = i.x(4, 20, 5, 5), *tables, labels, *statistics
    compare(OPS, "conditional_batch_norm_act", (*arguments, 0.1, 1e-5, 0.2))
    compare(OPS, "conditional_batch_norm_act_backward", (i.x(4, 20, 5, 5), *arguments, 0.2))


def test_native_conditional_batch_norm_of_nothing_is_the_reference():
    i = Inputs(*PLAIN)
    x, tables, labels = i.x(0, 3, 4, 4), [torch.randn(2, 3) for _ in range(2)], torch.zeros(0, dtype=torch.int64)
    compare(OPS, "conditional_batch_norm_act", (x, *tables, labels, i.channel(), i.channel(), 0.1, 1e-5, 0.2))
    compare(OPS, "conditional_batch_norm_act_backward", (x, x, *tables, labels, i.channel(), i.channel(), 0.2))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_native_takes_misaligned_slices(offset, threads):
    base = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
    x = base[offset:]
    assert torch.equal(
        torch.ops.gdfq_ext.fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 4, 0, -1),
        reference.fake_quantize(x, torch.tensor([-1.0]), torch.tensor([1.0]), 4, 0, -1),
    )


def test_native_is_deterministic():
    i = Inputs(torch.float32, torch.contiguous_format)
    arguments = i.x(16, 16, 32, 32), i.x(16, 16, 32, 32), *(i.channel(16) for _ in range(4))
    arguments += (i.lower, i.upper, 4, 0, 1e-5, 1, True)
    first, second = (torch.ops.gdfq_ext.batch_norm_act_fake_quantize_backward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
