"""The CUDA kernels on a GPU: the reference's results, and PyTorch's streams, graphs, compiler and large tensors."""

import pytest
import test_kernels
import torch
from op_cases import CASES, COMBINATIONS, DTYPES, LAYOUTS, OPS, Inputs, compare, results

# The tests are collected here too, where the fixture `on_the_device` has them run on the GPU, against the CPU.
from test_kernels import (  # noqa: F401
    Placed,
    larger_calls,
    placed,
    test_distillation_loss_against_float64,
    test_empty_inputs,
    test_labels_that_are_no_class,
    test_larger_shapes,
    test_many_layers_in_several_launches,
    test_many_shares,
    test_small_cases,
    test_the_range_takes_in_every_element,
    test_variance_far_from_the_running_mean,
    test_wrong_arguments_are_refused_before_a_launch,
)
from torch.library import opcheck

import gdfq_ext
from gdfq_ext import reference

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]

SHAPE = (16, 24, 28, 28)
HUGE = 2**31 // 2**20 + 1  # pieces of 2^20 elements, more than 32 bits can count


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


@pytest.mark.parametrize(("name", "dtype", "layout"), COMBINATIONS)
def test_opcheck(name, dtype, layout):
    for arguments in cases(name, dtype, layout):
        opcheck(getattr(OPS, name), arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_against_float64(layout):
    i = Inputs(torch.float32, layout)
    x, grad = i.x(*SHAPE), i.x(*SHAPE)
    bn = [i.channel(SHAPE[1]) for _ in range(4)]
    wide = (torch.tensor([-1e3]), torch.tensor([1e3]))  # clips nothing
    on_device = Placed(OPS, DEVICE)
    _, mean, var = on_device.batch_norm_act_moments(x, *bn, 1e-5, 0)
    _, grad_weight, grad_bias = on_device.batch_norm_act_fake_quantize_backward(grad, x, *bn, *wide, 8, 1e-5, 0, True)

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
    for name, arguments in larger_calls(SHAPE, dtype, layout, seed=1):
        arguments = placed(arguments, DEVICE, 0)
        first, second = (results(getattr(OPS, name), arguments) for _ in range(2))
        assert_same(first, second)


def test_kernels_run_on_the_current_stream():
    for name, arguments in larger_calls(SHAPE, torch.float32, torch.contiguous_format, seed=1):
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


class Block(torch.nn.Module):
    """Most of the ops in a row. No convolution: a product is rounded alike by every compiler, so that levels agree."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 9, 9, generator=torch.Generator().manual_seed(0)))
        for name, value, count in [("low", -1.0, 1), ("high", 1.0, 1), ("zeros", 0.0, 8), ("ones", 1.0, 8)]:
            self.register_buffer(name, torch.full((count,), value))

    def forward(self, x):
        limits, norm = (self.low, self.high), (self.zeros, self.ones)
        x = gdfq_ext.fake_quantize(x, *limits, 4, ste="clipped") * gdfq_ext.fake_quantize_weight(self.weight, 4)
        y, mean, var = gdfq_ext.batch_norm_act_moments(x, *norm, None, None, act="relu")
        y = gdfq_ext.batch_norm_act_fake_quantize(y, *norm, self.ones, self.zeros, *limits, 8, ste="clipped")
        return y.square().mean() + gdfq_ext.bns_loss([mean], [var], [self.zeros], [self.ones])


def test_torch_compile():
    block = Block().to(DEVICE)
    x = placed(Inputs(torch.float32, torch.contiguous_format).x(2, 8, 9, 9), DEVICE, 0).requires_grad_()
    wanted = (x, block.weight)
    loss, compiled = block(x), torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture
def huge():
    """bfloat16 of over 2^31 elements, one piece repeated, and that piece; (N, 64, 128, 128) each."""
    free = torch.cuda.mem_get_info()[0]
    needed = 5 * HUGE * 2**20 * 2
    if free < needed:
        pytest.skip(f"{free >> 30} GiB of memory are free, {needed >> 30} are needed")
    torch.cuda.empty_cache()
    piece = Inputs(torch.bfloat16, torch.contiguous_format).x(1, 64, 128, 128)

    def make(layout):
        small = placed(piece.contiguous(memory_format=layout), DEVICE, 0)
        return small.expand(HUGE, -1, -1, -1).contiguous(memory_format=layout), small

    return make


def assert_repeats(large, small):
    assert all(torch.equal(part, small[0]) for part in large)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_quantize_of_more_elements_than_32_bits_count(huge, layout):
    x, piece = huge(layout)
    lower, upper = torch.linspace(-2, -1, 64, device=DEVICE), torch.linspace(1, 2, 64, device=DEVICE)
    for limits, axis in [((lower[:1], upper[:1]), -1), ((lower, upper), 1)]:
        assert_repeats(OPS.fake_quantize(x, *limits, 4, axis), reference.fake_quantize(piece, *limits, 4, axis))
    y, mask = OPS.fake_quantize_clipped(x, lower, upper, 4, 1)
    small_y, small_mask = reference.fake_quantize_clipped(piece, lower, upper, 4, 1)
    assert_repeats(y, small_y)
    assert_repeats(mask.view(HUGE, -1), small_mask.unsqueeze(0))
    del y
    grad_x = OPS.fake_quantize_clipped_backward(x, mask)
    assert_repeats(grad_x, reference.fake_quantize_clipped_backward(piece, small_mask))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_more_elements_than_32_bits_count(huge, layout):
    x, piece = huge(layout)
    zeros, ones = torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)
    y, mean, var = OPS.batch_norm_act_moments(x, zeros, ones, None, None, 1e-5, 1)
    assert_repeats(y, reference.batch_norm_act_moments(piece, zeros, ones, None, None, 1e-5, 1)[0])
    torch.testing.assert_close(mean.double(), piece.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var.double(), piece.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


def test_the_range_of_more_elements_than_32_bits_count(huge):
    x, _ = huge(torch.contiguous_format)
    x.view(-1)[-1], x.view(-1)[2**31] = 64.0, -128.0
    average = OPS.observe_range(x, torch.zeros(3, device=DEVICE), 0.0)
    assert average.tolist() == [-128.0, 64.0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch finds no two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    for name, arguments in larger_calls(SHAPE, torch.float32, torch.contiguous_format, seed=1):
        compare(Placed(OPS, "cuda:1"), name, arguments)
    assert torch.cuda.current_device() == 0
