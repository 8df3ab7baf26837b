"""The affine and the symmetric quantizer: ONNX's values, 0 among them, gradients, borders, messages; the grid."""

from fractions import Fraction

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gdfq_ext

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BITS = range(2, 9)
STEPPED = ["affine", "symmetric"]
SCHEMES = ["eq6", *STEPPED]
RANGES = [(-1.37, 2.11), (0.0, 3.3), (0.4, 2.0), (-2.5, -0.3), (-1.0, 0.0), (-1e-3, 5.0)]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def sample(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", STEPPED)
@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_per_tensor_is_onnx_bit_for_bit(limits, scheme, bits, dtype):
    x = sample((3, 5, 7, 7), dtype)
    y = gdfq_ext.fake_quantize(x, *map(tensor, limits), bits, scheme=scheme)
    assert y.dtype == dtype
    oracle.exactly(y, oracle.onnx_quantize(oracle.to_numpy(x), *limits, bits, scheme))


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("scheme", STEPPED)
def test_per_channel_is_onnx_bit_for_bit(scheme, axis, layout, straight_through):
    x = sample((4, 6, 5, 3)).contiguous(memory_format=layout).requires_grad_()
    count = x.shape[axis]
    lower, upper = 0.5 - torch.arange(count) / 3, 1 + torch.arange(count) / 5
    y = gdfq_ext.fake_quantize(x, lower, upper, 4, axis=axis, scheme=scheme, straight_through=straight_through)
    low, high = (oracle.to_numpy(limit).reshape([-1 if d == axis else 1 for d in range(4)]) for limit in (lower, upper))
    oracle.exactly(y, oracle.onnx_quantize(oracle.to_numpy(x), low, high, 4, scheme))
    y.sum().backward()
    inside = oracle.onnx_inside(oracle.to_numpy(x), low, high, 4, scheme)
    assert torch.equal(x.grad, torch.tensor(inside if straight_through == "clipped" else np.ones_like(inside)).float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_against_the_mathematics(limits, bits):
    """The nearest code by exact fractions, where float32 cannot fall on the other side."""
    grid = gdfq_ext.quantizer_grid(*map(tensor, limits), bits, "affine")
    lower, upper = (Fraction(float(np.float32(limit))) for limit in limits)
    step = (max(upper, Fraction(0)) - min(lower, Fraction(0))) / (2**bits - 1)
    assert grid.step.item() == pytest.approx(float(step), rel=2**-23)
    zero_point = round(-min(lower, Fraction(0)) / step)
    assert grid.zero_point.item() == zero_point
    x = sample((500,), seed=bits)
    for value, y in zip(x, gdfq_ext.fake_quantize(x, *map(tensor, limits), bits, scheme="affine"), strict=True):
        code = Fraction(value.item()) / step + zero_point
        if abs(code - round(code)) < Fraction(499, 1000):
            code = min(max(round(code), 0), 2**bits - 1)
            assert y.item() == pytest.approx(float((code - zero_point) * step), rel=1e-6)


@pytest.mark.parametrize("exponent", [-20, 0, 30, 110])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", STEPPED)
def test_ties_round_half_to_even(scheme, bits, exponent):
    low, high = (-3, 2**bits - 4) if scheme == "affine" else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    low, high = (-1, 2) if scheme == "affine" and bits == 2 else (low, high)
    step = 2.0**exponent  # a power of two: every half step is an exact tie
    halves = torch.arange(low - 2, high + 2) + 0.5
    y = gdfq_ext.fake_quantize(halves * step, tensor(low * step), tensor(high * step), bits, scheme=scheme)
    assert (y / step).tolist() == np.clip(np.rint(halves.numpy()), low, high).tolist()


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_symmetric_leaves_the_least_code_out(bits, largest):
    x = torch.linspace(-5, 5, 4001)
    grid = gdfq_ext.quantizer_grid(tensor(-3), tensor(2), bits, "symmetric")
    assert (grid.lowest, grid.highest, grid.zero_point.tolist()) == (-largest, largest, [0])
    y = gdfq_ext.fake_quantize(x, tensor(-3), tensor(2), bits, scheme="symmetric")
    assert y.unique().numel() == 2 * largest + 1
    assert y.min().item() == -y.max().item() == pytest.approx(-3)


@pytest.mark.parametrize("scheme", STEPPED)
def test_zero_is_a_value_and_is_never_negative(scheme):
    x = tensor(0, -0.0, 1e-30, -1e-30, -0.01, 0.01)
    for limits in [*RANGES, (0, 0), (1e-12, 1e-12), (-1e-30, 0)]:
        y = gdfq_ext.fake_quantize(x, *map(tensor, limits), 2, scheme=scheme)
        assert y[:4].tolist() == [0] * 4
        assert not y[y == 0].signbit().any()


@pytest.mark.parametrize("scheme", STEPPED)
def test_what_is_not_finite(scheme):
    x = tensor(torch.nan, torch.inf, -torch.inf, 0.2).requires_grad_()
    y = gdfq_ext.fake_quantize(x, tensor(-3), tensor(3), 2, scheme=scheme, straight_through="clipped")
    y.sum().backward()
    assert y[0].isnan()
    assert y[1:].tolist() == ([2, -4, 0] if scheme == "affine" else [3, -3, 0])
    assert x.grad.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(1, -1), (-1, -2), (torch.nan, 1), (0, torch.nan), (-torch.inf, 1), (0, torch.inf), (torch.inf, torch.inf),
     (-torch.inf, -torch.inf), (0, -torch.inf)],
)  # fmt: skip
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bad_range_gives_nan_never_a_number(scheme, lower, upper):
    x = tensor(-torch.inf, -5, -0.5, 0, 0.5, 5, torch.inf).requires_grad_()
    y = gdfq_ext.fake_quantize(x, tensor(lower), tensor(upper), 4, scheme=scheme, straight_through="clipped")
    assert y.isnan()[1:6].all()
    if scheme != "eq6":
        assert y.isnan().all()
        y.sum().backward()
        assert x.grad.eq(1).all()
        grid = gdfq_ext.quantizer_grid(tensor(lower), tensor(upper), 4, scheme)
        assert grid.step.isnan().all()


def test_a_width_beyond_float32_gives_nan_where_it_is_the_width_that_counts():
    x, limits = tensor(-3e38, 0, 3e38), (tensor(-3e38), tensor(3e38))
    assert gdfq_ext.fake_quantize(x, *limits, 4, scheme="affine").isnan().all()
    torch.testing.assert_close(gdfq_ext.fake_quantize(x, *limits, 4, scheme="symmetric"), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", STEPPED)
def test_every_range_is_about_as_wide_as_its_floor(scheme, bits):
    grid = gdfq_ext.quantizer_grid(tensor(0, -1e-12, 1e-30), tensor(0, 0, 1e-30), bits, scheme)
    width = grid.step * (grid.highest - grid.lowest)
    torch.testing.assert_close(width, torch.full((3,), 1e-8), rtol=1e-6, atol=0)


VALUES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
LIMIT = st.floats(-(2.0**126), 2.0**126, width=32)


@settings(max_examples=150, deadline=None)
@given(values=VALUES, limits=st.tuples(LIMIT, LIMIT), bits=st.integers(2, 8), scheme=st.sampled_from(STEPPED))
def test_properties(values, limits, bits, scheme):
    x, (lower, upper) = tensor(*values, 0.0).sort().values, map(tensor, sorted(limits))
    y = gdfq_ext.fake_quantize(x, lower, upper, bits, scheme=scheme)
    oracle.exactly(y, oracle.onnx_quantize(x.numpy(), lower.numpy(), upper.numpy(), bits, scheme))
    assert (y.diff() >= 0).all()
    assert y[x == 0].eq(0).all()
    assert torch.equal(gdfq_ext.fake_quantize(y, lower, upper, bits, scheme=scheme), y)
    grid = gdfq_ext.quantizer_grid(lower, upper, bits, scheme)
    assert grid.lowest <= grid.zero_point.item() <= grid.highest
    values_of_codes = (torch.arange(grid.lowest, grid.highest + 1) - grid.zero_point) * grid.step
    assert torch.isin(y, values_of_codes).all()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_grid_has_the_values_of_the_quantizer(scheme, shape):
    lower, upper = -sample(shape).abs() - 0.1, sample(shape, torch.float64, seed=1).abs() + 0.1
    grid = gdfq_ext.quantizer_grid(lower.requires_grad_(), upper, 4, scheme)
    assert isinstance(grid, gdfq_ext.Grid)
    assert grid.step.shape == grid.zero_point.shape == shape
    assert grid.step.dtype == grid.zero_point.dtype == torch.float32
    assert not grid.step.requires_grad
    assert torch.equal(grid.zero_point, grid.zero_point.round())
    assert (grid.lowest, grid.highest) == ((-7, 7) if scheme == "symmetric" else (0, 15))
    codes = torch.arange(grid.lowest, grid.highest + 1)
    values = (codes.unsqueeze(1) - grid.zero_point.reshape(-1)) * grid.step.reshape(-1)
    y = gdfq_ext.fake_quantize(
        torch.linspace(-9, 9, 9001)[:, None].repeat(1, lower.numel()),
        lower.reshape(-1), upper.reshape(-1), 4, axis=1, scheme=scheme,
    )  # fmt: skip
    for column, expected in zip(y.T, values.T, strict=True):
        torch.testing.assert_close(column.unique(), expected, rtol=1e-6 if scheme == "eq6" else 0, atol=0)


def test_the_zero_point_of_eq6_may_lie_beyond_its_codes():
    grid = gdfq_ext.quantizer_grid(tensor(15, -30), tensor(30, -15), 4)
    assert grid.step.tolist() == [1, 1]
    assert grid.zero_point.tolist() == [-15, 30]


def expected_weight(weight, bits, scheme):
    w = oracle.to_numpy(weight).reshape(weight.shape[0], -1)
    lower, upper = w.min(1, keepdims=True), w.max(1, keepdims=True)
    quantize = oracle.quantize(w, lower, upper, bits) if scheme == "eq6" else None
    return (oracle.onnx_quantize(w, lower, upper, bits, scheme) if quantize is None else quantize).reshape(weight.shape)


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("schemes", ["affine", "symmetric", ["symmetric", "eq6", "affine"]], ids=str)
def test_weights_are_quantized_by_their_scheme(schemes, straight_through):
    weights = [sample((6, 5, 3, 3)), sample((3, 7), torch.float16), sample((40, 2), torch.bfloat16)]
    bits = [4, 2, 8]
    together = gdfq_ext.fake_quantize_weights(weights, bits, scheme=schemes, straight_through=straight_through)
    each = [schemes] * 3 if isinstance(schemes, str) else schemes
    for quantized, weight, k, scheme in zip(together, weights, bits, each, strict=True):
        oracle.exactly(quantized, expected_weight(weight, k, scheme))
        alone = gdfq_ext.fake_quantize_weight(weight, k, scheme=scheme, straight_through=straight_through)
        assert torch.equal(quantized, alone)


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("scheme", STEPPED)
def test_gradients_of_weights(scheme, straight_through):
    weight, gradient = sample((6, 40)).requires_grad_(), sample((6, 40), seed=1)
    gdfq_ext.fake_quantize_weight(weight, 3, scheme=scheme, straight_through=straight_through).backward(gradient)
    w = oracle.to_numpy(weight)
    inside = torch.tensor(oracle.onnx_inside(w, w.min(1, keepdims=True), w.max(1, keepdims=True), 3, scheme))
    assert torch.equal(weight.grad, gradient if straight_through == "identity" else gradient * inside)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scheme", STEPPED)
def test_changed_codes(scheme, bits):
    weight, direction, kappas = sample((6, 5, 3, 3)), sample((6, 5, 3, 3), seed=1), [0.0, 1.0, 8.0, 64.0]
    counts = gdfq_ext.count_changed_codes(
        [weight], [direction], bits, torch.tensor(0.01), torch.tensor(kappas), scheme=scheme
    )
    w, d = (oracle.to_numpy(t).reshape(6, -1) for t in (weight, direction))
    limits = w.min(1, keepdims=True), w.max(1, keepdims=True)
    _, _, lowest, highest = oracle.onnx_grid(*limits, bits, scheme)

    def codes(x):
        return np.clip(oracle.onnx_codes(x, *limits, bits, scheme), lowest, highest)

    sizes = [np.float32(kappa) * np.float32(0.01) for kappa in kappas]
    assert counts.tolist() == [[int((codes(w - size * d) != codes(w)).sum()) for size in sizes]]


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@pytest.mark.parametrize("scheme", STEPPED)
def test_batch_norm_then_quantizer_is_both_in_turn(scheme, act):
    g = torch.Generator().manual_seed(0)
    x, gradient = sample((4, 5, 6, 7)).requires_grad_(), sample((4, 5, 6, 7), seed=1)
    mean, weight, bias = (torch.randn(5, generator=g) for _ in range(3))
    bn = mean, torch.rand(5, generator=g) + 0.1, weight.requires_grad_(), bias.requires_grad_()
    limits, options = (tensor(-0.41), tensor(1.7)), {"scheme": scheme, "straight_through": "clipped"}
    y = gdfq_ext.batch_norm_act_fake_quantize(x, *bn, *limits, 4, act=act, **options)
    z, _, _ = gdfq_ext.batch_norm_act_moments(x, *(p.detach() for p in bn), act=act)
    assert torch.equal(y, gdfq_ext.fake_quantize(z, *limits, 4, **options))

    inside = torch.tensor(oracle.onnx_inside(oracle.to_numpy(z), -0.41, 1.7, 4, scheme))
    leaves = [x, weight, bias]
    plain = {"none": lambda v: v, "relu": torch.relu, "relu6": torch.nn.functional.relu6}[act](
        torch.nn.functional.batch_norm(x, *bn, training=False)
    )
    expected = torch.autograd.grad(plain, leaves, gradient * inside)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, gradient), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gdfq_ext.fake_quantize(torch.ones(3), tensor(0), tensor(1), 4, scheme="asymmetric"),
         "scheme is 'asymmetric'; allowed are 'eq6', 'affine', 'symmetric'"),
        (lambda: gdfq_ext.quantizer_grid(tensor(0), tensor(1), 4, "x"), "scheme is 'x'"),
        (lambda: gdfq_ext.quantizer_grid(tensor(0), tensor(1), 9), "bits is 9"),
        (lambda: gdfq_ext.quantizer_grid(tensor(0), tensor(1, 2), 4), r"upper has shape \(2,\); allowed is \(1,\)"),
        (lambda: gdfq_ext.fake_quantize_weight(torch.ones(2, 2), 4, scheme="x"), "scheme is 'x'"),
        (lambda: gdfq_ext.fake_quantize_weights([torch.ones(2)], 4, scheme=["eq6", "affine"]),
         "scheme has 2 values for 1 weights; give one name, or one per weight"),
        (lambda: gdfq_ext.count_changed_codes(
            [torch.ones(2)], [torch.ones(2)], 4, torch.tensor(0.1), torch.ones(1), scheme=[]),
         "scheme has 0 values for 1 weights"),
        (lambda: gdfq_ext.batch_norm_act_fake_quantize(
            torch.ones(2, 3), torch.ones(3), torch.ones(3), None, None, tensor(0), tensor(1), 4, scheme=1),
         "scheme is 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
