"""AIT: steps are SGD's with Nesterov's momentum, lengthened until enough codes change: float64 searches, too."""

import pytest
import torch
from small_models import Residual, capture_once, randomize_batch_norm

import gdfq
from gdfq.config import Config
from gdfq.graph import build_quantized, quantized_layers
from gdfq.optim.ait import AIT, ait, choose_kappas
from gdfq.optim.rates import set_rates

BITS = 4


def codes(weight: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """Eq. 6 with the ranges of another weight, per output channel, in float64."""
    rows, of_ranges = weight.double().flatten(1), ranges.double().flatten(1)
    low, high = of_ranges.amin(1, keepdim=True), of_ranges.amax(1, keepdim=True)
    scale = (2**BITS - 1) / (high - low)
    zero = torch.round(scale * low) + 2 ** (BITS - 1)
    return torch.round(scale * rows - zero).clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)


def share_changed(weight: torch.Tensor, direction: torch.Tensor, lr: float, kappa: float) -> float:
    moved = weight.double() - kappa * lr * direction.double()
    return (codes(moved, weight) != codes(weight, weight)).double().mean().item()


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-3])
def test_kappa_is_the_least_doubling_narrowed_down(size):
    torch.manual_seed(0)
    weight, direction, lr, tau = torch.randn(8, 16, 3, 3), size * torch.randn(8, 16, 3, 3), 1e-3, 1e-2
    rates = torch.tensor(lr), torch.tensor(tau)
    kappa = choose_kappas([weight], [direction], [(BITS, "eq6")], *rates).item()
    if share_changed(weight, direction, lr, 1.0) >= tau:
        assert kappa == 1
        return
    doubled = next(2.0**j for j in range(16) if share_changed(weight, direction, lr, 2.0**j) >= tau)
    assert doubled / 2 < kappa <= doubled
    step = doubled / 2 / 16
    slack = 1.5 / weight.numel()  # an element at a boundary may round the other way in float32
    assert share_changed(weight, direction, lr, kappa) >= tau - slack
    assert share_changed(weight, direction, lr, kappa - step) < tau + slack


def test_a_gradient_of_zero_has_the_cap_and_moves_nothing():
    weight = torch.nn.Parameter(torch.randn(4, 8))
    weight.grad = torch.zeros_like(weight)
    before = weight.detach().clone()
    AIT({weight: (BITS, "eq6")}, [], torch.tensor(0.1), torch.tensor(0.5)).step()
    assert torch.equal(weight, before)
    kappas = choose_kappas([before], [weight.grad], [(BITS, "eq6")], torch.tensor(0.1), torch.tensor(0.5))
    assert kappas.item() == 2.0**15


def test_where_every_step_changes_enough_it_is_sgd_with_nesterov():
    torch.manual_seed(0)
    start = [torch.randn(4, 8), torch.randn(8)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    lr, tau = torch.tensor(0.1), torch.tensor(1e-9)
    optimizer = AIT({ours[0]: (BITS, "eq6")}, ours[1:], lr, tau, momentum=0.9, weight_decay=0.01)
    expected = torch.optim.SGD(theirs, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        expected.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_rates_fall_together_and_only_quantized_weights_are_lengthened():
    captured = capture_once(Residual)
    config = Config.load("cifar", {"student.optimizer": "ait", "ait.tau": 0.02, "student.learning_rate": 0.5})
    student, _ = build_quantized(captured, config.quantizer)
    optimizer = ait(student, config)
    quantized, others = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in quantized} == {id(student.get_parameter(x.weight)) for x in quantized_layers(student)}
    assert len(quantized) + len(others) == len(list(student.parameters()))
    set_rates(optimizer, 0.1)
    assert optimizer.param_groups[0]["tau"].item() == pytest.approx(0.002)
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_a_step_changes_the_share_of_codes_that_is_asked_for():
    """On a network, at a rate at which plain steps change hardly any code."""
    settings = {
        "schedule.epochs": 3, "schedule.iterations": 1, "schedule.batch_size": 8, "schedule.range_epochs": 1,
        "schedule.warmup_epochs": 2, "schedule.reestimate_ranges": False, "run.held_out_images": 8,
        "student.learning_rate": 1e-4, "student.weight_decay": 0.0, "ait.tau": 0.05, "method": "gdfq",
    }  # fmt: skip
    model = randomize_batch_norm(Residual())
    shares = {}
    for name in ("sgd", "ait"):
        config = Config.load("cifar", settings | {"student.optimizer": name})
        student = gdfq.quantize(model, config, progress=False).model
        before, after = model.conv2.weight, student.get_parameter("conv2.weight")
        shares[name] = (codes(after.detach(), before.detach()) != codes(before, before)).double().mean().item()
    assert shares["sgd"] < 0.01
    assert 0.04 < shares["ait"] < 0.15
