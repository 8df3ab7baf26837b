"""The CUDA kernels on a GPU: the reference's results, and PyTorch's streams and graphs."""

import pytest
import test_kernels
import torch
from op_cases import CASES, DTYPES, LAYOUTS, OPS, Inputs, compare, results

# The tests are collected here too, where the fixture `on_the_device` has them run on the GPU, against the CPU.
from test_kernels import (  # noqa: F401
    Placed,
    larger_calls,
    placed,
    test_bad_ranges,
    test_distillation_loss_against_float64,
    test_empty_inputs,
    test_gradients_at_the_corners_of_activations,
    test_labels_that_are_no_class,
    test_larger_shapes,
    test_many_layers_in_several_launches,
    test_many_shares,
    test_no_images,
    test_one_of_two_inputs_is_misaligned,
    test_quotients_by_the_step_fall_on_the_right_side_of_a_half,
    test_shares_are_joined_in_double,
    test_small_cases,
    test_the_greatest_level_of_a_range_may_be_infinite,
    test_the_range_takes_in_every_block,
    test_the_range_takes_in_every_element,
    test_variance_far_from_the_running_mean,
    test_weights_about_as_long_as_a_warp_takes,
    test_what_is_infinite_or_too_large_for_the_type_becomes_infinite,
    test_wrong_arguments_are_refused_before_a_launch,
)

import gdfq_ext

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]

SHAPE = (16, 24, 28, 28)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    monkeypatch.setattr(test_kernels, "OPS", Placed(OPS, DEVICE))


@pytest.fixture(params=range(3))
def seed(request):
    """Chooses among the settings of test_larger_shapes."""
    return request.param


def cases(name, dtype=torch.float32, layout=torch.contiguous_format):
    """The arguments of op_cases, on the device."""
    return (placed(arguments, DEVICE, 0) for arguments in CASES[name](Inputs(dtype, layout)))


def test_every_op_has_a_kernel():
    report = gdfq_ext.backend_report()
    assert {op["cuda"].backend for op in report.ops.values()} == {"native"}, str(report)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_against_float64(layout):
    i = Inputs(torch.float32, layout)
    x, grad = i.x(*SHAPE), i.x(*SHAPE)
    bn = [i.channel(SHAPE[1]) for _ in range(4)]
    wide = (torch.tensor([-1e3]), torch.tensor([1e3]))  # clips nothing
    on_device = Placed(OPS, DEVICE)
    _, mean, var = on_device.batch_norm_act_moments(x, *bn, 1e-5, 0)
    quantizer = *wide, 8, 0, 1e-5, 0, True
    _, grad_weight, grad_bias = on_device.batch_norm_act_fake_quantize_backward(grad, x, *bn, *quantizer)

    x, grad, (center, scale, _, _) = x.double(), grad.double(), [p.double() for p in bn]
    normalized = (x - center.view(-1, 1, 1)) / (scale.view(-1, 1, 1) + 1e-5).sqrt()
    for value, terms in [(mean, x), (grad_weight, grad * normalized), (grad_bias, grad)]:
        exact, size = terms.sum((0, 2, 3)), terms.abs().sum((0, 2, 3))
        exact, size = (exact / terms[:, 0].numel(), size / terms[:, 0].numel()) if value is mean else (exact, size)
        assert ((value - exact).abs() <= 1e-6 * size).all()
    torch.testing.assert_close(var.double(), x.var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_repeat_bit_for_bit(dtype, layout):
    for name, arguments in larger_calls(SHAPE, dtype, layout, setting=1):
        arguments = placed(arguments, DEVICE, 0)
        first, second = (results(getattr(OPS, name), arguments) for _ in range(2))
        assert_same(first, second)


def test_kernels_run_on_the_current_stream():
    for name, arguments in larger_calls(SHAPE, torch.float32, torch.contiguous_format, setting=1):
        arguments = placed(arguments, DEVICE, 0)
        expected = results(getattr(OPS, name), arguments)
        late = scaled(arguments, 0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # an op on another stream would see the zeros
            set_values(late, arguments)
            actual = results(getattr(OPS, name), late)
        stream.synchronize()
        assert_same(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_graphs_replay_with_changed_inputs(name):
    for arguments in cases(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward_and_backward(name, placed(arguments, DEVICE, 0))  # lazy initialisation is not captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward_and_backward(name, arguments)
        for factor in (0.75, 0.5):
            changed = scaled(arguments, factor)
            set_values(arguments, changed)
            expected = forward_and_backward(name, changed)
            graph.replay()
            assert_same([*captured, *tensors(arguments)], [*expected, *tensors(changed)])


def forward_and_backward(name, arguments):
    """The results of an op and the gradients of all arguments that want one."""
    outputs = tensors([getattr(OPS, name)(*arguments)])
    leaves = [tensor for tensor in tensors(arguments) if tensor.requires_grad]
    differentiable = [tensor for tensor in outputs if tensor.requires_grad]
    if not leaves:
        return outputs
    gradients = torch.autograd.grad(differentiable, leaves, [tensor.detach() for tensor in differentiable])
    return [*(tensor.detach() for tensor in outputs), *gradients]


def tensors(values):
    """All tensors in nested lists."""
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors(value)]
    return [values] if isinstance(values, torch.Tensor) else []


def scaled(values, factor):
    """Copies of the arguments with all floating tensors scaled."""
    copies = placed(values, DEVICE, 0)
    with torch.no_grad():
        for tensor in tensors(copies):
            if tensor.is_floating_point():
                tensor.mul_(factor)
    return copies


def set_values(targets, sources):
    with torch.no_grad():
        for target, source in zip(tensors(targets), tensors(sources), strict=True):
            target.copy_(source)


def assert_same(actual, expected):
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch finds no two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    for name, arguments in larger_calls(SHAPE, torch.float32, torch.contiguous_format, setting=1):
        compare(Placed(OPS, "cuda:1"), name, arguments)
    assert torch.cuda.current_device() == 0
