"""Eq. 6 with a given range: values, gradients, layouts, borders, messages."""

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gdfq_ext

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = range(2, 9)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def sample(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_per_tensor_is_the_equation_bit_for_bit(bits, dtype):
    x = sample((3, 5, 7, 7), dtype)
    y = gdfq_ext.fake_quantize(x, tensor(-1.37), tensor(2.11), bits)
    assert y.dtype == dtype
    oracle.exactly(y, oracle.quantize(oracle.to_numpy(x), -1.37, 2.11, bits))


@pytest.mark.parametrize("axis", [0, 1, 3, -1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
def test_per_channel_is_the_equation_bit_for_bit(axis, layout, straight_through):
    x = sample((4, 6, 5, 3)).contiguous(memory_format=layout).requires_grad_()
    count = x.shape[axis]
    lower, upper = -1 - torch.arange(count) / 7, 1 + torch.arange(count) / 5
    y = gdfq_ext.fake_quantize(x, lower, upper, 4, axis=axis, straight_through=straight_through)
    shape = [1] * 4
    shape[axis] = count
    low, high = lower.numpy().reshape(shape), upper.numpy().reshape(shape)
    oracle.exactly(y, oracle.quantize(oracle.to_numpy(x), low, high, 4))
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("bits", BITS)
def test_float64_levels_agree_away_from_rounding_boundaries(bits):
    x = oracle.to_numpy(sample((20000,), seed=bits), np.float64)
    lower, upper = float(np.float32(-0.83)), float(np.float32(1.91))
    y = gdfq_ext.fake_quantize(torch.from_numpy(x).float(), tensor(lower), tensor(upper), bits).double().numpy()
    expected = oracle.quantize(x, lower, upper, bits, np.float64)
    step = (upper - lower) / (2**bits - 1)
    difference = np.abs(y - expected) / step
    near = oracle.near_boundary(x, lower, upper, bits)
    assert difference[~near].max() < 1e-3
    assert difference.max() < 1 + 1e-3
    assert near.mean() < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_ties_round_half_to_even(bits):
    top = 2**bits - 1  # range 0..top: scale 1, so every n + 0.5 is an exact tie
    x = torch.arange(-2, top + 2) + 0.5
    y = gdfq_ext.fake_quantize(x, tensor(0), tensor(top), bits)
    assert y.tolist() == np.clip(np.rint(x.numpy()), 0, top).tolist()
    assert y[2:5].tolist() == [0, 2, 2]


def test_nan_stays_and_infinity_takes_the_end_level():
    x = tensor(torch.nan, torch.inf, -torch.inf, 0.2)
    y = gdfq_ext.fake_quantize(x, tensor(0), tensor(3), 2)
    assert y[0].isnan()
    assert y[1:].tolist() == [3, 0, 0]


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(1, -1), (torch.nan, 1), (0, torch.nan), (-torch.inf, 1), (0, torch.inf), (torch.inf, torch.inf),
     (0, -torch.inf), (-3e38, 3e38)],
)  # fmt: skip
@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
def test_a_bad_range_gives_nan_never_a_number(lower, upper, straight_through):
    x = tensor(-5, -0.5, 0, 0.5, 5).requires_grad_()
    assert gdfq_ext.fake_quantize(x, tensor(lower), tensor(upper), 4, straight_through=straight_through).isnan().all()


def test_a_bad_channel_leaves_the_others_alone():
    x = sample((3, 4))
    y = gdfq_ext.fake_quantize(x, tensor(-1, 1, -1), tensor(1, -1, 1), 4, axis=0)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [0.0, 3.5, -1000.0])
def test_a_degenerate_range_gives_its_value(value):
    y = gdfq_ext.fake_quantize(tensor(value), tensor(value), tensor(value), 4)
    torch.testing.assert_close(y, tensor(value), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("shape", [(0,), (4, 0, 3), (), (1,), (1, 1, 1, 1), (13,), (3, 7, 1, 5), (2, 3, 4, 5, 6)])
def test_any_shape(shape, straight_through):
    x = sample(shape).requires_grad_()
    y = gdfq_ext.fake_quantize(x, tensor(-1), tensor(1.2), 3, straight_through=straight_through)
    assert y.shape == x.shape
    oracle.exactly(y, oracle.quantize(oracle.to_numpy(x), -1, 1.2, 3))
    y.sum().backward()
    assert x.grad.shape == x.shape


def channels_last(shape):
    return sample(shape).contiguous(memory_format=torch.channels_last)


VIEWS = {
    "misaligned": lambda: sample((1001,))[1:],
    "strided": lambda: sample((40, 6))[::3, 1::2],
    "transposed": lambda: sample((5, 9)).t(),
    "batch slice of channels_last": lambda: channels_last((4, 3, 5, 5))[1:],
    "channel slice of channels_last": lambda: channels_last((4, 6, 5, 5))[:, 2:5],
    "expanded": lambda: sample((1, 7)).expand(5, 7),
}


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_what_their_copies_give(view, straight_through):
    def run(x):
        x = x.detach().requires_grad_()
        y = gdfq_ext.fake_quantize(x, tensor(-1), tensor(1.2), 3, straight_through=straight_through)
        y.backward(torch.arange(x.numel(), dtype=torch.float32).reshape(x.shape))
        return y.detach(), x.grad

    x = VIEWS[view]()
    torch.testing.assert_close(run(x), run(x.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_passes_the_gradient_unchanged(dtype):
    x = sample((4, 5), dtype).requires_grad_()
    gradient = sample((4, 5), dtype, seed=1)
    gdfq_ext.fake_quantize(x, tensor(-0.1), tensor(0.1), 4).backward(gradient)
    assert torch.equal(x.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gradient_layout", [torch.contiguous_format, torch.channels_last])
def test_clipped_zeroes_the_gradient_of_clamped_levels_only(dtype, layout, gradient_layout):
    x = sample((3, 5, 4, 7), dtype).contiguous(memory_format=layout).requires_grad_()
    gradient = sample((3, 5, 4, 7), dtype, seed=1).contiguous(memory_format=gradient_layout)
    gdfq_ext.fake_quantize(x, tensor(-0.7), tensor(0.9), 3, straight_through="clipped").backward(gradient)
    passes = oracle.inside(oracle.to_numpy(x), -0.7, 0.9, 3)
    assert 0 < passes.sum() < passes.size
    oracle.exactly(x.grad, np.where(passes, oracle.to_numpy(gradient), 0))


def test_clipped_judges_the_rounded_level_not_the_value():
    # Range 0..3 with 2 bits: 3.4 rounds to the top level, which is no clamp; 3.6 rounds past it.
    x = tensor(-0.6, -0.4, 3.4, 3.6).requires_grad_()
    gdfq_ext.fake_quantize(x, tensor(0), tensor(3), 2, straight_through="clipped").sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_clipped_hides_neither_nan_nor_infinity():
    x = tensor(torch.nan, torch.inf, 0.5).requires_grad_()
    y = gdfq_ext.fake_quantize(x, tensor(0), tensor(3), 2, straight_through="clipped")
    y.backward(tensor(5, torch.inf, torch.nan))
    assert x.grad[0] == 5
    assert x.grad[1] == 0
    assert x.grad[2].isnan()


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (21,)])
def test_mask_is_one_little_endian_bit_per_element(shape):
    x = sample(shape)
    _, mask = torch.ops.gdfq_ext.fake_quantize_clipped(x, tensor(-0.5), tensor(0.5), 4, 0, -1)
    expected = np.packbits(oracle.inside(x.numpy(), -0.5, 0.5, 4), bitorder="little")
    assert mask.dtype == torch.uint8
    assert mask.tolist() == expected.tolist()


def test_clipped_without_a_gradient_saves_no_mask():
    x = sample((5,)).requires_grad_()
    with torch.no_grad():
        y = gdfq_ext.fake_quantize(x, tensor(-1), tensor(1), 4, straight_through="clipped")
    assert y.grad_fn is None
    assert torch.equal(y, gdfq_ext.fake_quantize(x.detach(), tensor(-1), tensor(1), 4))


def test_clipped_refuses_a_second_derivative():
    x = sample((5,)).requires_grad_()
    y = gdfq_ext.fake_quantize(x, tensor(-1), tensor(1), 4, straight_through="clipped").square().sum()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
def test_compiles_without_graph_breaks(straight_through):
    def step(x, lower, upper):
        return gdfq_ext.fake_quantize(x * 2, lower, upper, 4, straight_through=straight_through).square().sum()

    def gradient(function):
        x = sample((3, 4, 5, 5)).contiguous(memory_format=torch.channels_last).requires_grad_()
        function(x, tensor(-1), tensor(1)).backward()
        return x.grad

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), gradient(step), rtol=0, atol=0)


WIDTHS = st.floats(0.0625, 1000, width=32)
VALUES = st.lists(st.floats(-2000, 2000, width=32), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(values=VALUES, lower=st.floats(-100, 100, width=32), width=WIDTHS, bits=st.integers(2, 8))
def test_properties_of_a_quantizer(values, lower, width, bits):
    x = tensor(*values).sort().values
    low, high = tensor(lower), tensor(lower) + tensor(width)
    y = gdfq_ext.fake_quantize(x, low, high, bits)
    oracle.exactly(y, oracle.quantize(x.numpy(), low.numpy(), high.numpy(), bits))
    assert y.unique().numel() <= 2**bits
    assert (y.diff() >= 0).all()
    assert torch.equal(gdfq_ext.fake_quantize(y, low, high, bits), y)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(3, dtype=torch.float64), ONE, ONE, 4), {}, TypeError, r"x is torch.float64; allowed are float32"),
        ((torch.ones(3, dtype=torch.int64), ONE, ONE, 4), {}, TypeError, r"x is torch.int64"),
        ((torch.ones(3), ONE, ONE, 1), {}, ValueError, r"bits is 1; allowed is an integer from 2 to 8"),
        ((torch.ones(3), ONE, ONE, 9), {}, ValueError, r"bits is 9"),
        ((torch.ones(3), ONE, ONE, 4.0), {}, ValueError, r"bits is 4.0"),
        (
            (torch.ones(3), ONE, ONE, 4),
            {"straight_through": "none"},
            ValueError,
            r"straight_through is 'none'; allowed are 'identity'",
        ),
        ((torch.ones(3), torch.ones(2), ONE, 4), {}, ValueError, r"lower has shape \(2,\); allowed is \(1,\)"),
        ((torch.ones(3, 4), torch.ones(3), ONE, 4), {"axis": 0}, ValueError, r"upper has shape \(1,\)"),
        ((torch.ones(3), ONE, ONE, 4), {"axis": 1}, ValueError, r"axis is 1; x has 1 dimensions"),
        ((torch.ones(3), ONE.to("meta"), ONE, 4), {}, ValueError, r"lower is on meta, the input on cpu"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gdfq_ext.fake_quantize(*arguments, **options)
