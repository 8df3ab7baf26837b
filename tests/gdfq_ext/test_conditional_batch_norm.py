"""The generator's conditional batch normalisation against PyTorch's own in float64."""

import pytest
import torch
from torch.nn import functional as F

import gdfq_ext

SHAPES = [(6, 4), (5, 3, 7), (4, 5, 6, 3), (3, 2, 2, 3, 2), (4, 1, 3, 3)]
EPS, MOMENTUM = 1e-3, 0.3


def case(shape, classes, dtype=torch.float32, layout=torch.contiguous_format):
    g = torch.Generator().manual_seed(len(shape))
    x = (torch.randn(shape, generator=g) * 2 + 0.7).to(dtype)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    weight, bias = (torch.randn(classes, shape[1], generator=g) for _ in range(2))
    labels = torch.randint(classes, shape[:1], generator=g)
    running_mean, running_var = torch.randn(shape[1], generator=g), torch.rand(shape[1], generator=g) + 0.5
    return x, weight, bias, labels, running_mean, running_var


def in_float64(x, weight, bias, labels, running_mean, running_var, slope):
    """The same from PyTorch's batch_norm, embedding and leaky_relu; running statistics are updated in place."""
    normalised = F.batch_norm(x, running_mean, running_var, training=True, momentum=MOMENTUM, eps=EPS)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    z = F.embedding(labels, weight).view(shape) * normalised + F.embedding(labels, bias).view(shape)
    return F.leaky_relu(z, slope)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "slope"), [(3, 0.2), (1, 1.0), (7, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_gradients_and_running_statistics(shape, classes, slope, dtype, layout):
    x, weight, bias, labels, running_mean, running_var = case(shape, classes, dtype, layout)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    leaves64 = [tensor.detach().double().requires_grad_() for tensor in leaves]
    running64 = running_mean.double(), running_var.double()
    expected = in_float64(*leaves64, labels, *running64, slope)
    y = gdfq_ext.conditional_batch_norm_act(
        *leaves, labels, running_mean, running_var, momentum=MOMENTUM, eps=EPS, negative_slope=slope
    )
    assert y.dtype == dtype
    assert y.stride() == leaves[0].stride()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    for running, exact in zip((running_mean, running_var), running64, strict=True):
        torch.testing.assert_close(running.double(), exact, rtol=1e-5, atol=1e-6)

    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    grads = torch.autograd.grad(y, leaves, upstream)
    grads64 = torch.autograd.grad(expected, leaves64, upstream.double())
    for grad, exact in zip(grads, grads64, strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_values_far_from_zero_and_from_the_running_mean(layout):
    """1,000 standard deviations: what is left of the variance is what float32 inputs allow."""
    x, weight, bias, labels, running_mean, running_var = case((16, 20, 12, 12), 3, layout=layout)
    x += 2000.0
    expected = running_mean.double(), running_var.double()
    in_float64(x.double(), weight.double(), bias.double(), labels, *expected, 1.0)
    gdfq_ext.conditional_batch_norm_act(x, weight, bias, labels, running_mean, running_var, momentum=MOMENTUM, eps=EPS)
    torch.testing.assert_close(running_mean.double(), expected[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(running_var.double(), expected[1], rtol=1e-6, atol=0)


def test_a_label_without_a_row_makes_its_sample_nan():
    x, weight, bias, labels, running_mean, running_var = case((4, 3, 2, 2), 2)
    labels[1], labels[2] = 2, -1
    y = gdfq_ext.conditional_batch_norm_act(x, weight, bias, labels, running_mean, running_var)
    assert y[[1, 2]].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_empty_input_leaves_the_running_statistics():
    x, weight, bias, labels, running_mean, running_var = case((4, 3, 2, 2), 2)
    before = running_mean.clone(), running_var.clone()
    y = gdfq_ext.conditional_batch_norm_act(x[:0], weight, bias, labels[:0], running_mean, running_var)
    assert y.shape == (0, 3, 2, 2)
    assert torch.equal(running_mean, before[0])
    assert torch.equal(running_var, before[1])


WRONG = {
    "x": (lambda a: {**a, "x": a["x"].double()}, TypeError, "x is torch.float64"),
    "one value": (lambda a: {**a, "x": a["x"][:1, :, :1, :1], "labels": a["labels"][:1]}, ValueError, "more than one"),
    "weight": (lambda a: {**a, "weight": a["weight"][:, :2]}, ValueError, r"weight has shape \(2, 2\)"),
    "bias": (lambda a: {**a, "bias": a["bias"].half()}, TypeError, "bias is torch.float16"),
    "labels": (lambda a: {**a, "labels": a["labels"].int()}, TypeError, "labels is torch.int32"),
    "count": (lambda a: {**a, "labels": a["labels"][:1]}, ValueError, r"labels has shape \(1,\); allowed is \(4,\)"),
    "running": (lambda a: {**a, "running_var": torch.ones(2)}, ValueError, r"running_var has shape \(2,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    change, error, message = WRONG[name]
    names = ("x", "weight", "bias", "labels", "running_mean", "running_var")
    arguments = dict(zip(names, case((4, 3, 2, 2), 2), strict=True))
    with pytest.raises(error, match=message):
        gdfq_ext.conditional_batch_norm_act(**change(arguments))
