"""The codes that a step changes, counted with Eq. 6 in NumPy."""

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch

import gdfq_ext

KAPPAS = [0.0, *(2.0**k for k in range(-3, 11))]


def sample(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(x, weight, bits):
    """The codes of `x` with the ranges of `weight`."""
    w, x = (tensor.reshape(tensor.shape[0], -1) for tensor in (oracle.to_numpy(weight), x))
    level, _, _ = oracle.levels(x, w.min(1, keepdims=True), w.max(1, keepdims=True), bits)
    return np.clip(level, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def expected(weight, direction, bits, learning_rate, kappas):
    w, d = oracle.to_numpy(weight), oracle.to_numpy(direction)
    sizes = [np.float32(kappa) * np.float32(learning_rate) for kappa in kappas]
    return [int((codes(w - size * d, weight, bits) != codes(w, weight, bits)).sum()) for size in sizes]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_counts_of_every_weight_and_size(bits, layout):
    shapes = [(6, 5, 3, 3), (40, 1, 3, 3), (3, 2, 25, 31)]
    weights, directions = ([sample(seed + k, *shape) for k, shape in enumerate(shapes)] for seed in (0, 10))
    weights = [weight.contiguous(memory_format=layout).requires_grad_() for weight in weights]
    counts = gdfq_ext.count_changed_codes(weights, directions, bits, torch.tensor(0.01), torch.tensor(KAPPAS))
    assert counts.dtype == torch.int64
    assert not counts.requires_grad
    pairs = zip(weights, directions, strict=True)
    assert counts.tolist() == [expected(w, d, bits, 0.01, KAPPAS) for w, d in pairs]
    assert counts[:, 0].eq(0).all()  # no step, no change
    assert counts[:, -1].gt(0).all()


def test_a_step_of_one_level_changes_every_code_within_the_range():
    weight = torch.arange(16.0).view(1, 16) - 3  # 16 levels, each once
    arguments = [weight], [torch.ones(1, 16)], 4, torch.tensor(0.5)
    kappas = torch.tensor([0.0, 0.5, 1.5, 2.0, 100.0, -2.0])
    # Half a level more moves nothing; the least has no level below it.
    assert gdfq_ext.count_changed_codes(*arguments, kappas).tolist() == [[0, 0, 15, 15, 15, 15]]


def test_bits_are_those_of_each_weight():
    weights, directions = [sample(0, 4, 9), sample(1, 3, 50)], [sample(2, 4, 9), sample(3, 3, 50)]
    rate, kappas = torch.tensor([0.01]), torch.tensor([1.0, 8.0])
    together = gdfq_ext.count_changed_codes(weights, directions, [2, 8], rate, kappas)
    for row, *arguments in zip(together, weights, directions, (2, 8), strict=True):
        assert row.tolist() == expected(*arguments, 0.01, [1.0, 8.0])


def test_what_is_not_finite_counts_as_changed():
    weights, directions = [sample(0, 2, 8), sample(1, 2, 8)], [torch.zeros(2, 8), torch.zeros(2, 8)]
    weights[0][1, 3], directions[1][0, 0] = torch.nan, torch.nan
    counts = gdfq_ext.count_changed_codes(weights, directions, 4, torch.tensor(0.1), torch.tensor([1.0]))
    assert counts.tolist() == [[8], [1]]


def test_nothing_changes_in_nothing():
    rate, kappas = torch.tensor(0.1), torch.ones(3)
    assert gdfq_ext.count_changed_codes([], [], 4, rate, kappas).shape == (0, 3)
    empty = [torch.empty(0, 3), torch.empty(3, 0)]
    assert gdfq_ext.count_changed_codes(empty, empty, 4, rate, kappas).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"directions": []}, ValueError, "directions has 0 tensors for 1 weights"),
        ({"directions": [torch.ones(3, 2)]}, ValueError, r"directions\[0\] has shape \(3, 2\); allowed is \(2, 3\)"),
        ({"directions": [torch.ones(2, 3, device="meta")]}, ValueError, r"directions\[0\] is on meta"),
        ({"weights": [torch.ones(2, 3).half()]}, TypeError, r"weights\[0\] is torch.float16; allowed is float32"),
        ({"weights": [torch.tensor(1.0)]}, ValueError, r"weights\[0\] has no dimensions"),
        ({"bits": [4, 4]}, ValueError, "bits has 2 values for 1 weights"),
        ({"bits": 9}, ValueError, "bits is 9"),
        ({"learning_rate": torch.ones(2)}, ValueError, "learning_rate has shape"),
        ({"learning_rate": torch.tensor(1)}, TypeError, "learning_rate is torch.int64"),
        ({"kappas": torch.ones(17)}, ValueError, r"kappas has shape \(17,\); allowed is \(K,\), K from 1 to 16"),
        ({"kappas": torch.tensor(1.0)}, ValueError, r"kappas has shape \(\)"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    good = {
        "weights": [torch.ones(2, 3)],
        "directions": [torch.ones(2, 3)],
        "bits": 4,
        "learning_rate": torch.tensor(0.1),
        "kappas": torch.ones(2),
    }
    with pytest.raises(error, match=message):
        gdfq_ext.count_changed_codes(**(good | changes))
