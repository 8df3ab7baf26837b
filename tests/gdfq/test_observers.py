"""Where ranges come from: a histogram against `torch.histc`, a learned step's gradient against LSQ's closed form."""

import math

import numpy as np
import pytest
import torch

from gdfq.calibrate import end_pass
from gdfq.clip_values import RULES
from gdfq.nn import FakeQuantize, observing
from gdfq.observers import BINS, Histogram, LearnedStep, MovingAverage

BATCHES = [torch.randn(50, 7), 3 * torch.randn(20, 7) + 1, torch.zeros(2, 7)]


def show(quantizer: FakeQuantize, batches) -> list[torch.Tensor]:
    """What the quantizer gives while it observes; once for every pass."""
    for _ in range(quantizer.observer.passes):
        with observing(quantizer):
            given = [quantizer(x) for x in batches]
        end_pass(quantizer)
    return given


def test_a_histogram_lets_its_input_through_and_ends_at_minimum_and_maximum():
    quantizer = FakeQuantize(4, observer=Histogram(None))
    given = show(quantizer, BATCHES)
    assert all(map(torch.equal, given, BATCHES))
    everything = torch.cat(BATCHES)
    assert torch.equal(quantizer.range, torch.stack([everything.min(), everything.max()]))
    assert 8 < quantizer(everything).unique().numel() <= 16


def test_a_histogram_counts_all_batches_around_zero():
    quantizer = FakeQuantize(4, observer=Histogram(RULES["mse"]))
    show(quantizer, BATCHES)
    everything = torch.cat(BATCHES)
    reach = everything.abs().max().item()
    expected = sum(torch.histc(x, 2 * BINS, -reach, reach) for x in BATCHES)
    values, counts = quantizer.observer.values_and_counts()
    assert counts.sum() == everything.numel()
    assert torch.equal(counts[0], expected[expected > 0])
    centers = -reach + 2 * reach * (np.arange(2 * BINS) + 0.5) / (2 * BINS)
    np.testing.assert_allclose(values[0].numpy(), centers[expected.numpy() > 0], rtol=1e-5, atol=1e-6)


def test_the_rule_gets_the_histogram_and_its_clip_values_are_cut_at_the_bounds():
    asked = []

    def rule(values, counts, bits, scheme):
        asked.append((values.shape == counts.shape, bits, scheme))
        return torch.tensor([-100.0]), torch.tensor([1.5])

    quantizer = FakeQuantize(5, observer=Histogram(rule, "affine"))
    show(quantizer, BATCHES)
    assert asked == [(True, 5, "affine")]
    assert quantizer.range.tolist() == [torch.cat(BATCHES).min().item(), 1.5]


def test_reset_forgets_a_histogram():
    quantizer = FakeQuantize(4, observer=Histogram(RULES["mse"]))
    show(quantizer, [100 * x for x in BATCHES])
    quantizer.reset()
    assert quantizer.range.isnan().all()
    fresh = FakeQuantize(4, observer=Histogram(RULES["mse"]))
    for each in (quantizer, fresh):
        show(each, BATCHES)
    assert torch.equal(quantizer.range, fresh.range)


@pytest.mark.parametrize("value", [0.0, 0.7, -2.0])
def test_a_constant_has_a_range(value):
    quantizer = FakeQuantize(4, observer=Histogram(RULES["mse"]))
    show(quantizer, [torch.full((3, 3), value)])
    assert quantizer.range.isfinite().all()
    assert (quantizer(torch.full((3, 3), value)) - value).abs().max() <= 0.5 * abs(value)


# --- a learned step


def learned(bits: int, low: float, high: float) -> FakeQuantize:
    """Begun at the range that one batch from `low` to `high` has."""
    quantizer = FakeQuantize(bits, observer=LearnedStep())
    show(quantizer, [torch.linspace(low, high, 50)])
    return quantizer


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-1.3, 2.0), (-2.0, -0.5), (0.4, 1.0)])
def test_a_learned_step_begins_at_what_eq_6_makes_of_the_range(bits, low, high):
    quantizer, fixed = learned(bits, low, high), FakeQuantize(bits)
    show(fixed, [torch.linspace(low, high, 50)])
    step = (high - low) / (2**bits - 1)
    assert quantizer.observer.step.item() == pytest.approx(step, rel=1e-5)
    x = torch.linspace(low - 1, high + 1, 500)
    # The two round half-way points and the zero point their own way: a step apart at most, and nearly nowhere.
    difference = (quantizer(x) - fixed(x)).abs()
    assert difference.max() <= 1.001 * step
    inside = torch.linspace(low, high, 333)
    assert (quantizer(inside) - inside).abs().max() <= 1.001 * step


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (-1.3, 2.0)])
def test_the_steps_gradient_is_lsqs(bits, low, high):
    quantizer = learned(bits, low, high)
    x = (2 * torch.randn(40, 5)).requires_grad_(True)
    gradient = torch.randn(40, 5)
    quantizer(x).backward(gradient)

    top = 2**bits - 1
    step, zero = quantizer.observer.step.item(), quantizer.observer.zero_point.item()
    v = x.detach().double().numpy() / step
    code = np.round(v) + zero  # it is clamped behind the rounding, as in PyTorch's own learnable quantizer
    inside = (code >= 0) & (code <= top)
    of_step = np.where(inside, np.round(v) - v, np.where(code < 0, -zero, top - zero))
    expected = (gradient.double().numpy() * of_step).sum() / math.sqrt(x.numel() * top)
    assert 0 < inside.sum() < inside.size
    assert quantizer.observer.step.grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), gradient.numpy() * inside, rtol=1e-4, atol=1e-6)
    levels = np.clip(np.round(v) + zero, 0, top)
    np.testing.assert_allclose(quantizer(x).detach().numpy(), (levels - zero) * step, rtol=1e-4, atol=1e-5)


def test_the_range_follows_the_step():
    quantizer = learned(4, -1.0, 2.0)
    with torch.no_grad():
        quantizer.observer.step.mul_(1.5)
    quantizer(torch.randn(5))
    step, zero = quantizer.observer.step.item(), quantizer.observer.zero_point.item()
    assert quantizer.range.tolist() == pytest.approx([-zero * step, (15 - zero) * step])


def test_a_step_that_was_never_begun_gives_nan():
    assert FakeQuantize(4, observer=LearnedStep())(torch.randn(5)).isnan().all()


def test_a_moving_average_is_biased_towards_nothing():
    quantizer = FakeQuantize(4, observer=MovingAverage())
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0])]
    show(quantizer, batches)
    low, high = ((0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2) for first, second in ((-1, -3), (2, 1)))
    assert quantizer.range.tolist() == pytest.approx([low, high])
