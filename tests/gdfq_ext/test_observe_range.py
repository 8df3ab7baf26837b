"""The moving average of the range against its closed form."""

import pytest
import torch

import gdfq_ext


def closed_form(values: list[float], momentum: float) -> float:
    """sum_i (1 - m) m^(t - i) v_i / (1 - m^t), in Python floats."""
    steps = len(values)
    weights = [(1 - momentum) * momentum ** (steps - 1 - i) for i in range(steps)]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / (1 - momentum**steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_range_is_the_bias_correct_average_after_every_batch(momentum, dtype):
    generator = torch.Generator().manual_seed(0)
    state, lows, highs = torch.zeros(3), [], []
    for step in range(12):
        x = (torch.randn(4, 3, 5, 5, generator=generator) * (step + 1)).to(dtype)
        lows.append(x.double().min().item())
        highs.append(x.double().max().item())
        result = gdfq_ext.observe_range(x, state, momentum)
        expected = torch.tensor([closed_form(lows, momentum), closed_form(highs, momentum)], dtype=torch.float64)
        torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=0)
    assert state[2].item() == pytest.approx(1 - momentum**12, rel=1e-5)


def test_the_first_batch_gives_its_own_range():
    state = torch.zeros(3)
    result = gdfq_ext.observe_range(torch.tensor([2.0, -3.0, 1.0]), state)
    torch.testing.assert_close(result, torch.tensor([-3.0, 2.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(state, torch.tensor([-0.3, 0.2, 0.1]), rtol=1e-6, atol=0)


VIEWS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "misaligned": lambda x: torch.cat([x.new_full((1,), 99.0), x.flatten()])[1:],
    "strided": lambda x: torch.stack([x, x.new_full(x.shape, 99.0)], -1)[..., 0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_show_their_own_elements_only(view):
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    result = gdfq_ext.observe_range(VIEWS[view](x), torch.zeros(3), 0.5)
    torch.testing.assert_close(result, torch.stack([x.min(), x.max()]), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3, 1000, 100_003])
def test_the_extremes_are_found_at_either_end(size):
    x = torch.zeros(size)
    x[0], x[-1] = -5, 7
    low, high = gdfq_ext.observe_range(x, torch.zeros(3), 0.0)
    assert (low, high) == ((-5, 7) if size > 1 else (7, 7))


@pytest.mark.parametrize("position", [0, 500, 1000])
def test_nan_makes_the_range_nan(position):
    x = torch.randn(1001)
    x[position] = torch.nan
    state = torch.zeros(3)
    assert gdfq_ext.observe_range(x, state).isnan().all()
    assert gdfq_ext.observe_range(torch.ones(3), state).isnan().all()


def test_an_empty_batch_leaves_the_state():
    state = torch.tensor([-0.3, 0.2, 0.1])
    result = gdfq_ext.observe_range(torch.empty(0, 3), state)
    assert state.tolist() == torch.tensor([-0.3, 0.2, 0.1]).tolist()
    torch.testing.assert_close(result, torch.tensor([-3.0, 2.0]))


def test_nothing_observed_reads_as_nan():
    assert gdfq_ext.observe_range(torch.empty(0), torch.zeros(3)).isnan().all()


def test_no_gradient_is_recorded():
    result = gdfq_ext.observe_range(torch.ones(3, requires_grad=True), torch.zeros(3))
    assert not result.requires_grad


@pytest.mark.parametrize(
    ("x", "state", "momentum", "error", "message"),
    [
        (torch.ones(2), torch.zeros(2), 0.9, ValueError, r"state has shape \(2,\); allowed is a contiguous \(3,\)"),
        (torch.ones(2), torch.zeros(6)[::2], 0.9, ValueError, "contiguous"),
        (torch.ones(2), torch.zeros(3).half(), 0.9, TypeError, "state is torch.float16; allowed is float32"),
        (torch.ones(2), torch.zeros(3), 1.0, ValueError, "momentum is 1.0; allowed is 0 <= momentum < 1"),
        (torch.ones(2).double(), torch.zeros(3), 0.9, TypeError, "x is torch.float64"),
        (torch.ones(2), torch.zeros(3, device="meta"), 0.9, ValueError, "state is on meta"),
    ],
)
def test_bad_arguments_are_named(x, state, momentum, error, message):
    with pytest.raises(error, match=message):
        gdfq_ext.observe_range(x, state, momentum)
