"""SQuant: sums of rounding errors, against a plain Python transcription of the paper's Algorithm, and its limits."""

import math
import time

import pytest
import torch
from small_models import Residual, capture_once

from gdfq.config import QuantizerConfig
from gdfq.graph import build_quantized, quantized_layers
from gdfq.methods.squant import rounding, squant
from gdfq_ext import quantizer_grid


def grid_of(weight, bits=4, scheme="affine"):
    rows = weight.flatten(1)
    return quantizer_grid(rows.amin(1), rows.amax(1), bits, scheme)


def levels_of(weight, grid):
    step = grid.step.view(-1, *[1] * (weight.dim() - 1))
    return (weight / step).floor() + rounding(weight, grid)


def slow(weight, grid):
    """One channel, one kernel, one element after the other."""
    rows = []
    kernels = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    for channel, step, zero in zip(kernels, *grid[:2], strict=True):
        low, high = grid.lowest - zero.item(), grid.highest - zero.item()
        x = (channel / step).tolist()
        level = [[min(max(float(torch.tensor(v).round()), low), high) for v in kernel] for kernel in x]

        def error(i, j, x=x, level=level):
            return level[i][j] - x[i][j]

        def total(i, x=x):
            return sum(error(i, j) for j in range(len(x[i])))

        def candidates(i, sign, x=x, level=level, low=low, high=high):
            found = [j for j in range(len(x[i])) if error(i, j) * sign > 0 and low <= level[i][j] - sign <= high]
            return sorted(found, key=lambda j: -abs(error(i, j)))

        for i in range(len(x)):
            e = total(i)
            sign = math.copysign(1, e)
            for j in candidates(i, sign)[: math.floor(abs(e) + 0.5)]:
                level[i][j] -= sign
        e = sum(total(i) for i in range(len(x)))
        sign = math.copysign(1, e)
        able = [i for i in range(len(x)) if total(i) * sign > 0 and candidates(i, sign)]
        for i in sorted(able, key=lambda i: -abs(total(i)))[: math.floor(abs(e) + 0.5)]:
            level[i][candidates(i, sign)[0]] -= sign
        rows.append(level)
    return torch.tensor(rows).view(weight.shape)


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (6, 1, 3, 3), (4, 9, 1, 1), (5, 12), (3, 4, 5)])
@pytest.mark.parametrize(("bits", "scheme"), [(4, "affine"), (2, "affine"), (3, "symmetric"), (8, "symmetric")])
def test_it_is_the_papers_algorithm(shape, bits, scheme):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    grid = grid_of(weight, bits, scheme)
    assert torch.equal(levels_of(weight, grid), slow(weight, grid))


def test_errors_cancel_in_every_kernel_and_channel():
    weight = torch.randn(16, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = grid_of(weight, 6)
    inside = weight.clone()
    inside[:, 0, 0, :2] = torch.tensor([-5.0, 5.0])  # the ends of the range, so that nothing is at one
    grid = grid_of(inside, 6)
    error = levels_of(weight, grid) - weight / grid.step.view(-1, 1, 1, 1)
    nearest = (weight / grid.step.view(-1, 1, 1, 1)).round() - weight / grid.step.view(-1, 1, 1, 1)
    assert error.abs().max() <= 1
    assert error.sum((1, 2, 3)).abs().max() <= 0.5 + 1e-4 < nearest.sum((1, 2, 3)).abs().max()
    assert error.sum((2, 3)).abs().max() <= 1.5
    assert (error.sum((2, 3)).abs() <= 0.5 + 1e-4).float().mean() > 0.9


def test_q_has_these_weights_and_keeps_them_on_the_grid():
    student, _ = build_quantized(capture_once(Residual), QuantizerConfig())
    squant(student, [torch.randn(8, 3, 8, 8)])
    for layer in quantized_layers(student):
        weight = student.get_parameter(layer.weight)
        codes = layer.quantizer.codes(layer.index, weight)
        assert 0 <= codes.min() <= codes.max() <= 15
        _, zero_point, *_ = layer.quantizer.grid(layer.index, weight)
        expected = levels_of(weight, layer.quantizer.grid(layer.index, weight))
        assert torch.equal(codes - zero_point.view(-1, *[1] * (weight.dim() - 1)), expected)
    assert student(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.slow
def test_a_resnet_50s_weights_take_less_than_seconds():
    torch.manual_seed(0)
    shapes = (
        [(64, 3, 7, 7)] + [(512, 512, 3, 3)] * 3 + [(2048, 512, 1, 1)] * 6 + [(1024, 256, 1, 1)] * 12 + [(1000, 2048)]
    )
    weights = [torch.randn(shape) for shape in shapes]
    grids = [grid_of(weight) for weight in weights]
    start = time.perf_counter()
    for weight, grid in zip(weights, grids, strict=True):
        rounding(weight, grid)
    assert time.perf_counter() - start < 60  # ten times what it takes alone on a core
