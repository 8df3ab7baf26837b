"""Steps that are trained by their logarithms: a rate is a share of the step, and none of them reaches 0."""

import math

import pytest
import torch

from gdfq.nn import FakeQuantize
from gdfq.train.steps import LearnedSteps


@pytest.fixture
def quantizer():
    quantizer = FakeQuantize(4)
    quantizer.range.copy_(torch.tensor([0.0, 3.0]))
    return quantizer


def test_a_rate_is_a_share_of_the_step(quantizer):
    steps = LearnedSteps([quantizer], torch.device("cpu"))
    first = quantizer.observer.step.item()
    assert first == pytest.approx(0.2)
    optimizer = torch.optim.Adam(steps.groups(0.3))
    for iteration in range(1, 40):
        optimizer.zero_grad()
        quantizer.observer.step.log().backward()  # the same gradient at every step: Adam moves by the rate
        optimizer.step()
        assert quantizer.observer.step.item() == pytest.approx(first * math.exp(-0.3 * iteration), rel=1e-3)


def test_in_the_end_the_range_is_what_the_step_makes_of_it(quantizer):
    own = quantizer.observer
    steps = LearnedSteps([quantizer], torch.device("cpu"))
    with torch.no_grad():
        steps.parameters[0].fill_(math.log(0.1))
    quantizer(torch.rand(2, 3, 4, 4))
    steps.settle()
    assert quantizer.observer is own
    torch.testing.assert_close(quantizer.range, torch.tensor([0.0, 1.5]))
