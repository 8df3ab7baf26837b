"""Tensors of more elements than 32 bits count, on a GPU that has the memory."""

import pytest
import torch
from op_cases import LAYOUTS, OPS, Inputs
from test_kernels import placed

from gdfq_ext import reference

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]

HUGE = 2**31 // 2**20 + 1  # pieces of 2^20 elements, more than 32 bits can count


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
    of_tensor, of_channels = (lower[:1], upper[:1], 4), (lower, upper, 4)
    for arguments in [(*of_tensor, 0, -1), (*of_tensor, 1, -1), (*of_channels, 0, 1)]:
        assert_repeats(OPS.fake_quantize(x, *arguments), reference.fake_quantize(piece, *arguments))
    y, mask = OPS.fake_quantize_clipped(x, lower, upper, 4, 0, 1)
    small_y, small_mask = reference.fake_quantize_clipped(piece, lower, upper, 4, 0, 1)
    assert_repeats(y, small_y)
    assert_repeats(mask.view(HUGE, -1), small_mask.unsqueeze(0))
    del y
    grad_x = OPS.fake_quantize_clipped_backward(x, mask)
    assert_repeats(grad_x, reference.fake_quantize_clipped_backward(piece, small_mask))


def test_learned_steps_of_more_elements_than_32_bits_count(huge):
    x, piece = huge(torch.contiguous_format)
    of_piece = torch.randint_like(piece, 256, dtype=torch.uint8)
    choice = of_piece.expand(HUGE, -1, -1, -1).contiguous()
    learned = torch.full((1,), 0.2, device=DEVICE), torch.full((1,), 3.0, device=DEVICE)
    settings = 0, 15, 90, 1.0
    y = OPS.fake_quantize_learned(x, *learned, choice, *settings)
    assert_repeats(y, reference.fake_quantize_learned(piece, *learned, of_piece, *settings))
    del y
    grad_x, grad_step = OPS.fake_quantize_learned_backward(x, x, *learned, choice, *settings)
    expected, of_step = reference.fake_quantize_learned_backward(piece, piece, *learned, of_piece, *settings)
    assert_repeats(grad_x, expected)
    torch.testing.assert_close(grad_step, of_step * HUGE, rtol=1e-4, atol=0)


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
