"""Activations with a learned step, some left as they are: values, gradients by float64, borders, messages."""

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch

import gdfq_ext

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SCHEMES = [("eq6", 5), ("affine", 3), ("symmetric", 0)]
STEP = 0.1375


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def sample(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3).to(dtype)
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


def random_bytes(shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def bounds(bits, scheme, zero_point):
    lowest = 1 - 2 ** (bits - 1) if scheme == "symmetric" else 0
    highest = 2 ** (bits - 1) - 1 if scheme == "symmetric" else 2**bits - 1
    return lowest - zero_point, highest - zero_point


def levels(x, step):
    """Not clamped, in float32: the quotient is rounded before the level is."""
    return np.rint(oracle.to_numpy(x) / np.float32(step))


def in_float64(x, step, kept, low, high):
    """The value as a differentiable expression; the rounding is straight-through."""
    quotient = x / step
    level = quotient + (torch.from_numpy(levels(x, step.item())) - quotient).detach()
    return torch.where(kept, x, level.clamp(low, high) * step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("scheme", "zero_point"), SCHEMES)
def test_values_are_the_equation_bit_for_bit(scheme, zero_point, bits, dtype):
    x, choice = sample((3, 5, 7, 7), dtype), random_bytes((3, 5, 7, 7))
    low, high = bounds(bits, scheme, zero_point)
    quantized = np.clip(levels(x, STEP), low, high) * np.float32(STEP)
    arguments = x, tensor(STEP), torch.tensor([zero_point]), bits
    y = gdfq_ext.fake_quantize_learned(*arguments, scheme=scheme)
    assert y.dtype == dtype
    oracle.exactly(y, quantized)
    y = gdfq_ext.fake_quantize_learned(*arguments, scheme=scheme, choice=choice, keep=0.3)
    oracle.exactly(y, np.where(choice.numpy() < 77, oracle.to_numpy(x), quantized))  # 256 * 0.3 = 76.8


@pytest.mark.parametrize("keep", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("scheme", "zero_point"), SCHEMES)
def test_gradients_are_those_of_float64(scheme, zero_point, layout, dtype, keep):
    x, gradient, choice = sample((4, 5, 6, 7), dtype, layout), sample((4, 5, 6, 7), dtype, seed=1), None
    kept = torch.zeros(x.shape, dtype=torch.bool)
    if keep is not None:
        choice = random_bytes(x.shape)
        kept = choice.int() < 256 * keep
    leaves = x.requires_grad_(), tensor(STEP).requires_grad_()
    y = gdfq_ext.fake_quantize_learned(
        *leaves, tensor(zero_point), 4, scheme=scheme, choice=choice, keep=0.5 if keep is None else keep,
        step_gradient_scale=0.25,
    )  # fmt: skip
    assert y.stride() == x.stride()
    grad_x, grad_step = torch.autograd.grad(y, leaves, gradient)
    assert grad_x.stride() == x.stride()
    assert grad_x.dtype == dtype
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y64 = in_float64(*leaves64, kept, *bounds(4, scheme, zero_point))
    expected_x, expected_step = torch.autograd.grad(y64, leaves64, gradient.double())
    assert torch.equal(grad_x.double(), expected_x)
    torch.testing.assert_close(grad_step.double(), 0.25 * expected_step, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("scheme", "highest"), [("affine", 15), ("symmetric", 7)])
def test_the_gradient_of_the_step_is_scaled_as_in_lsq(scheme, highest):
    x, step = sample((3, 50)), tensor(STEP).requires_grad_()
    gdfq_ext.fake_quantize_learned(x, step, tensor(0), 4, scheme=scheme).sum().backward()
    unscaled = tensor(STEP).requires_grad_()
    gdfq_ext.fake_quantize_learned(x, unscaled, tensor(0), 4, scheme=scheme, step_gradient_scale=1).sum().backward()
    torch.testing.assert_close(step.grad, unscaled.grad / (150 * highest) ** 0.5)


def test_level_by_level():
    # Codes 0..3 with zero point 1: multiples -1, 0, 1, 2 of the step 2; a half rounds to even and judges no clamp.
    x, step = tensor(-3.5, -3, -1, -0.5, 0, 1, 3, 4.5, 5, 5.5).requires_grad_(), tensor(2).requires_grad_()
    y = gdfq_ext.fake_quantize_learned(x, step, tensor(1), 2, step_gradient_scale=1)
    assert y.tolist() == [-2, -2, 0, 0, 0, 0, 4, 4, 4, 4]
    assert not y[y == 0].signbit().any()
    y.backward(torch.ones(10))
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    inside = [0 + 0.5, 0 + 0.25, 0, 0 - 0.5, 2 - 1.5, 2 - 2.25, 2 - 2.5]
    assert step.grad.item() == -1 + -1 + sum(inside) + 2


def test_every_byte_and_share():
    x, choice = torch.full((256,), 0.4), torch.arange(256).to(torch.uint8)
    for count in range(257):
        y = gdfq_ext.fake_quantize_learned(x, tensor(1), tensor(0), 4, choice=choice, keep=count / 256)
        assert y.tolist() == x[:count].tolist() + [0] * (256 - count)


def test_what_is_not_finite():
    x, step = tensor(torch.nan, torch.inf, -torch.inf, 0.2).requires_grad_(), tensor(1).requires_grad_()
    y = gdfq_ext.fake_quantize_learned(x, step, tensor(2), 2, step_gradient_scale=1)
    y[1:].sum().backward(retain_graph=True)
    assert y[0].isnan()
    assert y[1:].tolist() == [1, -2, 0]
    assert x.grad.tolist() == [0, 0, 0, 1]
    assert step.grad.isnan().all()  # 0 * NaN
    x.grad = None
    y.sum().backward()
    assert x.grad.tolist() == [1, 0, 0, 1]


def test_what_is_kept_is_kept_whatever_it_is():
    x, step = tensor(torch.nan, -torch.inf, -0.0, 0.3).requires_grad_(), tensor(1).requires_grad_()
    choice = torch.zeros(4, dtype=torch.uint8)
    y = gdfq_ext.fake_quantize_learned(x, step, tensor(0), 2, choice=choice, keep=0.5)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    assert y[2].signbit()
    y.sum().backward()
    assert x.grad.tolist() == [1] * 4
    assert step.grad.tolist() == [0]


@pytest.mark.parametrize("step", [0.0, -0.0, -1.0, torch.nan, torch.inf, -torch.inf])
def test_a_bad_step_gives_nan_never_a_number(step):
    x, step = sample((8,)).requires_grad_(), tensor(step).requires_grad_()
    choice = torch.tensor([0, 255] * 4, dtype=torch.uint8)
    y = gdfq_ext.fake_quantize_learned(x, step, tensor(0), 4, choice=choice)
    assert y.isnan().tolist() == [False, True] * 4
    y.sum().backward()
    assert x.grad.eq(1).all()


@pytest.mark.parametrize("shape", [(), (0,), (4, 0, 3), (1,), (13,), (3, 7, 1, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("step_shape", [(), (1,), (1, 1)])
def test_any_shape(shape, step_shape):
    x, step = sample(shape).requires_grad_(), torch.full(step_shape, STEP, dtype=torch.float64, requires_grad=True)
    y = gdfq_ext.fake_quantize_learned(x, step, torch.tensor(3), 4, choice=random_bytes(shape), keep=0)
    assert y.shape == x.shape
    oracle.exactly(y, np.clip(levels(x, STEP), -3, 12) * np.float32(STEP))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert step.grad.shape == step.shape
    assert step.grad.isfinite().all()


def test_views_give_what_their_copies_give():
    def run(x, choice):
        x, step = x.detach().requires_grad_(), tensor(STEP).requires_grad_()
        y = gdfq_ext.fake_quantize_learned(x, step, tensor(2), 3, choice=choice)
        y.backward(torch.arange(x.numel(), dtype=torch.float32).reshape(x.shape))
        return y.detach(), x.grad, step.grad

    for x, choice in [
        (sample((1001,))[1:], random_bytes((1001,))[1:]),
        (sample((40, 6))[::3, 1::2], random_bytes((14, 3))),
        (sample((4, 6, 5, 5), layout=torch.channels_last), random_bytes((4, 6, 5, 5))),
        (sample((4, 6, 5, 5)), random_bytes((4, 5, 5, 6)).permute(0, 3, 1, 2)),
    ]:
        copy = run(x.clone(memory_format=torch.contiguous_format), choice.clone(memory_format=torch.contiguous_format))
        torch.testing.assert_close(run(x, choice), copy, rtol=1e-5, atol=1e-5)


def test_it_refuses_a_second_derivative():
    x, step = sample((5,)).requires_grad_(), tensor(STEP).requires_grad_()
    y = gdfq_ext.fake_quantize_learned(x, step, tensor(0), 4).square().sum()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(y, [x, step], create_graph=True)


def test_compiles_without_graph_breaks():
    def run(x, step, choice):
        return gdfq_ext.fake_quantize_learned(x * 2, step, tensor(3), 4, choice=choice).square().sum()

    def gradients(function):
        x = sample((3, 4, 5, 5), layout=torch.channels_last).requires_grad_()
        step = tensor(STEP).requires_grad_()
        function(x, step, random_bytes(x.shape)).backward()
        return x.grad, step.grad

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(run), rtol=0, atol=0)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, dtype=torch.float64)}, TypeError, "x is torch.float64; allowed are float32"),
        ({"bits": 9}, ValueError, "bits is 9"),
        ({"scheme": "x"}, ValueError, "scheme is 'x'; allowed are 'eq6', 'affine', 'symmetric'"),
        ({"step": torch.ones(3)}, ValueError, r"step has shape \(3,\); allowed is \(1,\)"),
        ({"step": ONE.to("meta")}, ValueError, "step is on meta, the input on cpu"),
        ({"zero_point": torch.ones(3)}, ValueError, r"zero_point has shape \(3,\); allowed is \(1,\)"),
        ({"choice": torch.ones(3)}, TypeError, "choice is torch.float32; allowed is torch.uint8"),
        ({"choice": torch.ones(2).byte()}, ValueError, r"choice has shape \(2,\); allowed is \(3,\)"),
        ({"choice": torch.ones(3).byte().to("meta")}, ValueError, "choice is on meta"),
        ({"keep": 1.01}, ValueError, "keep is 1.01; allowed is 0 <= keep <= 1"),
        ({"keep": float("nan")}, ValueError, "keep is nan"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    good = {"x": torch.ones(3), "step": ONE, "zero_point": ONE, "bits": 4}
    with pytest.raises(error, match=message):
        gdfq_ext.fake_quantize_learned(**(good | changes))
