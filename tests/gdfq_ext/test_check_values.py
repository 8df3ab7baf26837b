"""GDFQ_CHECK=1 reads values that are otherwise not looked at, and names what is wrong with them."""

import pytest
import torch

import gdfq_ext
from gdfq_ext import _checks


@pytest.fixture
def check_values(monkeypatch):
    monkeypatch.setattr(_checks, "_CHECK_VALUES", True)


@pytest.mark.parametrize(("lower", "upper"), [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
@pytest.mark.usefixtures("check_values")
def test_a_broken_range_is_named(lower, upper):
    lower, upper = torch.tensor([-1.0, lower]), torch.tensor([1.0, upper])
    with pytest.raises(ValueError, match=r"lower\[1\] is .*, upper\[1\] .*; allowed are finite numbers"):
        gdfq_ext.fake_quantize(torch.randn(3, 2), lower, upper, 4, axis=1)
    statistics = [torch.ones(2)] * 2
    with pytest.raises(ValueError, match=r"lower\[0\]"):
        gdfq_ext.batch_norm_act_fake_quantize(torch.randn(3, 2), *statistics, None, None, lower[1:], upper[1:], 4)


@pytest.mark.usefixtures("check_values")
def test_a_label_out_of_range_is_named():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"targets\[1\] is 3; allowed is 0 to 2"):
        gdfq_ext.distillation_loss(logits, logits, labels)
    tables, running = [torch.ones(3, 5)] * 2, [torch.ones(5)] * 2
    with pytest.raises(ValueError, match=r"labels\[1\] is 3; allowed is 0 to 2"):
        gdfq_ext.conditional_batch_norm_act(torch.randn(2, 5), *tables, labels, *running)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.usefixtures("check_values")
def test_a_broken_step_is_named(value):
    step, ones = torch.tensor([1.0, value]), torch.ones(2)
    with pytest.raises(ValueError, match=r"step\[1\] is .*; allowed is a finite number above 0"):
        gdfq_ext.round_learned(ones, ones, step, ones, torch.tensor(2.0), 4)
    with pytest.raises(ValueError, match=r"step\[0\]"):
        gdfq_ext.fake_quantize_learned(ones, step[1], torch.tensor(0), 4)


def test_without_it_a_broken_range_gives_nan():
    assert gdfq_ext.fake_quantize(torch.randn(3), torch.tensor(1.0), torch.tensor(-1.0), 4).isnan().all()


@pytest.mark.usefixtures("check_values")
def test_what_is_right_passes():
    x = torch.linspace(-1, 1, 8)
    assert gdfq_ext.fake_quantize(x, x.min(), x.max(), 8).isfinite().all()
