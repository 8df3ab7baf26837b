"""Frozen batch normalisation fused with the quantizer, and with the statistics of Eq. 5."""

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch
from torch.nn import functional as F

import gdfq_ext

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ACTIVATIONS = ["none", "relu", "relu6"]
SHAPES = [(5, 6), (3, 4, 9), (2, 5, 7, 7), (3, 8, 4, 6), (2, 3, 2, 3, 4)]
EPS = 1e-3


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batch(shape, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    x = (torch.randn(shape, generator=generator(seed)) * 2 + 0.3).to(dtype)
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


def parameters(channels, affine=True):
    """running_mean, running_var, weight, bias; the variance takes in small and large values."""
    g = generator(channels)
    mean, scale, bias = (torch.randn(channels, generator=g) for _ in range(3))
    var = torch.logspace(-2, 1, channels)
    return (mean, var, scale * 2, bias) if affine else (mean, var, None, None)


def normalise64(x, mean, var, weight, bias, act, eps=EPS):
    """act(batch_norm(x)) as PyTorch defines it, in float64."""
    weight, bias = (None if p is None else p.double() for p in (weight, bias))
    z = F.batch_norm(x.double(), mean.double(), var.double(), weight, bias, training=False, eps=eps)
    return {"none": lambda v: v, "relu": F.relu, "relu6": F.relu6}[act](z)


def normalise32(x, mean, var, weight, bias, act, eps=EPS):
    """The documented float32 expression, in NumPy."""
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    inv_std = np.float32(1) / np.sqrt(var.numpy() + np.float32(eps))
    scale = inv_std if weight is None else weight.detach().numpy() * inv_std
    shift = (np.float32(0) if bias is None else bias.detach().numpy()) - mean.numpy() * scale
    z = oracle.to_numpy(x) * scale.reshape(per_channel) + shift.reshape(per_channel)
    limits = {"none": (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6)}[act]
    return np.clip(z, *map(np.float32, limits))


def limits():
    return torch.tensor([-0.21]), torch.tensor([2.03])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_output_is_the_documented_expression_bit_for_bit(shape, affine, act, dtype):
    x, bn = batch(shape, dtype), parameters(shape[1], affine)
    y = gdfq_ext.batch_norm_act_fake_quantize(x, *bn, *limits(), 4, eps=EPS, act=act)
    assert y.dtype == dtype
    oracle.exactly(y, oracle.quantize(normalise32(x, *bn, act), -0.21, 2.03, 4))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_quantized_output_follows_float64_away_from_rounding_boundaries(act):
    x, bn = batch((8, 5, 9, 9)), parameters(5)
    lower, upper = (float(limit) for limit in limits())
    y = gdfq_ext.batch_norm_act_fake_quantize(x, *bn, *limits(), 6, eps=EPS, act=act).double().numpy()
    a = normalise64(x, *bn, act).numpy()
    step = (upper - lower) / 63
    difference = np.abs(y - oracle.quantize(a, lower, upper, 6, np.float64)) / step
    position = (a - lower) / step + 0.5
    near = np.abs(position - np.rint(position)) < 1e-2  # BN in float32 adds its own error to the quantizer's
    assert difference[~near].max() < 1e-3
    assert difference.max() < 1 + 1e-3
    assert near.mean() < 0.1


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_quantized_gradients_are_those_of_the_straight_through_expression(layout, affine, act, straight_through):
    x, (mean, var, weight, bias) = batch((4, 6, 5, 7), layout=layout).requires_grad_(), parameters(6, affine)
    leaves = [x, *(p.requires_grad_() for p in (weight, bias) if p is not None)]
    gradient = torch.randn(x.shape, generator=generator(7))
    y = gdfq_ext.batch_norm_act_fake_quantize(
        x, mean, var, weight, bias, *limits(), 4, eps=EPS, act=act, straight_through=straight_through
    )
    assert y.is_contiguous(memory_format=layout)
    actual = torch.autograd.grad(y, leaves, gradient)

    a = normalise64(x, mean, var, weight, bias, act)
    if straight_through == "clipped":
        a = a * torch.from_numpy(oracle.inside(a.detach().numpy(), -0.21, 2.03, 4, np.float64))
    expected = torch.autograd.grad(a, leaves, gradient.double())
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    assert actual[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_rounded_once(dtype):
    bn, gradient = parameters(5), batch((2, 5, 7, 7), dtype, seed=3)
    x = batch((2, 5, 7, 7), dtype)

    def grad(dtype):
        leaf = x.to(dtype).requires_grad_()
        y = gdfq_ext.batch_norm_act_fake_quantize(leaf, *bn, *limits(), 4, act="relu")
        return torch.autograd.grad(y, leaf, gradient.to(dtype))[0]

    assert torch.equal(grad(dtype), grad(torch.float32).to(dtype))


@pytest.mark.parametrize(("act", "expected"), [("none", [1, 1, 1, 1]), ("relu", [0, 1, 1, 1]), ("relu6", [0, 1, 0, 0])])
def test_the_gradient_is_zero_at_the_kinks(act, expected):
    x = torch.tensor([[0.0], [3.0], [6.0], [7.0]], requires_grad=True)
    one = torch.ones(1)
    y = gdfq_ext.batch_norm_act_fake_quantize(x, 0 * one, one, None, None, 0 * one, 6 * one, 8, eps=0.0, act=act)
    y.sum().backward()
    assert x.grad.flatten().tolist() == expected


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_passes_through_bn_activation_and_quantizer(act):
    x = batch((2, 3, 4, 4))
    x[1, 2, 3, 3] = torch.nan
    bn = parameters(3)
    quantized = gdfq_ext.batch_norm_act_fake_quantize(x, *bn, *limits(), 4, act=act)
    y, mean, var = gdfq_ext.batch_norm_act_moments(x, *bn, act=act)
    assert torch.equal(quantized.isnan(), x.isnan())
    assert torch.equal(y.isnan(), x.isnan())
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True]


def test_a_bad_range_gives_nan():
    lower, upper = limits()
    assert gdfq_ext.batch_norm_act_fake_quantize(batch((2, 3)), *parameters(3), upper, lower, 4).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_the_input(shape, affine, act, dtype):
    x, bn = batch(shape, dtype), parameters(shape[1], affine)
    y, mean, var = gdfq_ext.batch_norm_act_moments(x, *bn, eps=EPS, act=act)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    oracle.exactly(y, normalise32(x, *bn, act))
    flat = oracle.to_numpy(x, np.float64).swapaxes(0, 1).reshape(shape[1], -1)
    np.testing.assert_allclose(mean.numpy(), flat.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(var.numpy(), flat.var(1), rtol=3e-6)


@pytest.mark.parametrize(("offset", "running_mean"), [(100, 100), (1000, 1000), (1000, 995), (20, 0)])
def test_variance_survives_a_mean_far_above_the_deviation(offset, running_mean):
    x = batch((8, 3, 16, 16)) + offset
    _, mean, var = gdfq_ext.batch_norm_act_moments(x, torch.full((3,), running_mean).float(), torch.ones(3), None, None)
    flat = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), flat.var(1, correction=0), rtol=3e-5, atol=0)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("used", ["y", "mean", "var", "all"])
def test_moments_gradient_joins_all_three_results(used, layout, affine, act):
    x, bn = batch((4, 6, 5, 7), layout=layout).requires_grad_(), parameters(6, affine)
    weights = torch.randn(x.shape, generator=generator(7)), *torch.randn((2, 6), generator=generator(8))

    def gradient(results):
        terms = {name: (r * w).sum() for name, r, w in zip(("y", "mean", "var"), results, weights, strict=True)}
        return torch.autograd.grad(sum(terms.values()) if used == "all" else terms[used], x)[0]

    x64 = x.double()
    flat = x64.transpose(0, 1).flatten(1)
    expected = gradient((normalise64(x, *bn, act), flat.mean(1), flat.var(1, correction=0)))
    actual = gradient(gdfq_ext.batch_norm_act_moments(x, *bn, eps=EPS, act=act))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)])
def test_empty_batches(shape):
    mean, var, weight, bias = parameters(3)
    x = torch.empty(shape, requires_grad=True)
    weight.requires_grad_()
    y = gdfq_ext.batch_norm_act_fake_quantize(x, mean, var, weight, bias, *limits(), 4)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert weight.grad.tolist() == [0, 0, 0]
    y, mean, var = gdfq_ext.batch_norm_act_moments(x, mean, var, None, None)
    (y.sum() + mean.sum()).backward()
    assert y.shape == shape
    assert mean.isnan().all()
    assert var.isnan().all()


@pytest.mark.parametrize("slicing", [np.s_[1:], np.s_[:, 1:4], np.s_[..., ::2]])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slices_give_what_their_copies_give(layout, slicing):
    x = batch((3, 5, 6, 6), layout=layout)[slicing]
    bn = parameters(x.shape[1])

    def run(x):
        x = x.detach().requires_grad_()
        quantized = gdfq_ext.batch_norm_act_fake_quantize(x, *bn, *limits(), 4, act="relu", straight_through="clipped")
        y, mean, var = gdfq_ext.batch_norm_act_moments(x, *bn, act="relu6")
        loss = (quantized * y.detach()).sum() + y.square().sum() + mean.square().sum() + var.square().sum()
        return [quantized, y, mean, var, torch.autograd.grad(loss, x)[0]]

    for result, copy in zip(run(x), run(x.clone(memory_format=torch.contiguous_format)), strict=True):
        torch.testing.assert_close(result, copy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_parameters_of_other_types_are_converted_and_still_trained(dtype):
    mean, var, weight, bias = (p.to(dtype) for p in parameters(5))
    weight.requires_grad_()
    y = gdfq_ext.batch_norm_act_fake_quantize(batch((2, 5)), mean, var, weight, bias, *limits(), 4)
    y.sum().backward()
    assert weight.grad.dtype == dtype


def test_a_trainable_teacher_is_refused():
    mean, var, weight, bias = parameters(3)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="weight requires a gradient, which"):
        gdfq_ext.batch_norm_act_moments(batch((2, 3)), mean, var, weight, bias)
    with torch.no_grad():
        gdfq_ext.batch_norm_act_moments(batch((2, 3)), mean, var, weight, bias)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_compiles_without_graph_breaks(act):
    mean, var, weight, bias = parameters(4)

    def step(x, weight):
        quantized = gdfq_ext.batch_norm_act_fake_quantize(x, mean, var, weight, bias, *limits(), 4, act=act)
        y, batch_mean, batch_var = gdfq_ext.batch_norm_act_moments(x, mean, var, None, bias, act=act)
        return (quantized * y).sum() + gdfq_ext.bns_loss([batch_mean], [batch_var], [mean], [var])

    leaves = batch((3, 4, 5, 5), layout=torch.channels_last).requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(step(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def call(x=None, **changes):
    names = ["running_mean", "running_var", "weight", "bias", "lower", "upper", "bits"]
    values = dict(zip(names, [*parameters(3), *limits(), 4], strict=True)) | changes
    return gdfq_ext.batch_norm_act_fake_quantize(batch((2, 3, 4, 4)) if x is None else x, **values)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x has shape \(3,\); allowed is \(N, C, \*spatial\)"),
        ({"x": torch.ones(2, 3).double()}, TypeError, "x is torch.float64"),
        ({"running_mean": torch.ones(4)}, ValueError, r"running_mean has shape \(4,\); allowed is \(3,\)"),
        ({"running_var": torch.ones(1, 3)}, ValueError, r"running_var has shape \(1, 3\)"),
        ({"weight": torch.ones(2)}, ValueError, r"weight has shape \(2,\)"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias is on meta"),
        ({"lower": torch.ones(3)}, ValueError, r"lower has shape \(3,\); allowed is \(1,\)"),
        ({"bits": 0}, ValueError, "bits is 0"),
        ({"act": "gelu"}, ValueError, "act is 'gelu'; allowed are 'none', 'relu', 'relu6'"),
        ({"straight_through": None}, ValueError, "straight_through is None"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
