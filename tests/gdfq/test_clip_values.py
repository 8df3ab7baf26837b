"""Clip values against a brute-force search (MSE), integrals (ACIQ) and TensorRT's procedure in plain loops (KL)."""

import math

import numpy as np
import pytest
import torch
from quantizer_oracle import onnx_quantize, quantize
from scipy import integrate, optimize, special

import gdfq_ext
from gdfq import clip_values
from gdfq.clip_values import RULES, aciq, gaussian_clip, kl, laplace_clip, mse


def heavy_tailed(rows: int, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, count, generator=random) * torch.rand(rows, count, generator=random).pow(-0.4)


# --- MSE


def squared_error(row: np.ndarray, clip_value: float, bits: int, clamped: bool, scheme: str = "eq6") -> float:
    """In float32, as the quantizer: the ends of a symmetric range lie half way between two levels."""
    lower, upper = np.float32(max(row.min(), -clip_value)), np.float32(min(row.max(), clip_value))
    x = row.clip(lower, upper) if clamped else row
    given = quantize(x, lower, upper, bits) if scheme == "eq6" else onnx_quantize(x, lower, upper, bits, scheme)
    return float(np.square(given.astype(np.float64) - row).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("clamped", [False, True], ids=["activations", "weights"])
@pytest.mark.parametrize("scheme", ["eq6", "affine", "symmetric"])
def test_mse_is_as_good_as_a_brute_force_search(bits, rectified, clamped, scheme):
    values = heavy_tailed(2, 20_000)
    values = values.relu() if rectified else values
    lower, upper = mse(values, None if clamped else torch.ones_like(values), bits, scheme)
    assert torch.equal(lower, -upper)
    for row, chosen in zip(values.numpy(), upper.tolist(), strict=True):
        candidates = np.abs(row).max() * np.geomspace(0.005, 1, 200)
        best = min(squared_error(row, candidate, bits, clamped, scheme) for candidate in candidates)
        assert squared_error(row, chosen, bits, clamped, scheme) <= 1.01 * best


def test_mse_counts_a_value_as_often_as_it_occurs():
    values, counts = heavy_tailed(1, 300), torch.ones(1, 300)
    counts[0, values[0].abs().argmax()] = 1000
    repeated = values[0].repeat_interleave(counts[0].long())[None]
    chosen = mse(values, counts, 4)[1].item()
    assert chosen == pytest.approx(mse(repeated, torch.ones_like(repeated), 4)[1].item())
    assert chosen > 1.1 * mse(values, torch.ones_like(values), 4)[1].item()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("row", [[0.0] * 9, [0.3] * 9, [-0.5], [5.0, 5.1, 5.2], [-3.0, -2.0, -2.5]])
def test_degenerate_channels_are_not_spoilt(rule, row):
    values = torch.tensor([row])
    clipped = values.clamp(*(value[:, None] for value in rule(values, None, 4)))
    quantized = gdfq_ext.fake_quantize_weight(clipped, 4)
    assert (quantized - values).abs().max() <= 0.5 * values.abs().max()


# --- ACIQ


@pytest.mark.parametrize(
    ("clip_value", "density", "published"),
    [
        (laplace_clip, lambda x: math.exp(-abs(x)) / 2, {2: 2.83, 3: 3.89, 4: 5.03}),
        (gaussian_clip, lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi), {2: 1.71, 3: 2.15, 4: 2.55}),
    ],
)
def test_aciq_clip_values_minimise_the_expected_error(clip_value, density, published):
    for bits in (2, 3, 4, 6, 8):

        def error(a, bits=bits):
            clipping = 2 * integrate.quad(lambda x: (x - a) ** 2 * density(x), a, a + 40, epsabs=1e-14)[0]
            return clipping + a * a / (3 * 4**bits)  # 2^k steps of 2 a / 2^k, each with a twelfth of its square

        least = optimize.minimize_scalar(error, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-9})
        assert clip_value(bits) == pytest.approx(least.x, abs=1e-3)
    for bits, value in published.items():
        assert clip_value(bits) == pytest.approx(value, abs=0.011)


def test_laplace_clip_is_lamberts_function():
    for bits in range(2, 10):
        assert laplace_clip(bits) == pytest.approx(special.lambertw(3 * 4**bits).real, rel=1e-12)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aciq_fits_the_distribution_and_its_parameter(bits):
    random = np.random.default_rng(0)
    laplace, gaussian = random.laplace(0.5, 2.0, 200_000), random.normal(0.5, 2.0, 200_000)
    lower, upper = aciq(torch.tensor(np.stack([laplace, gaussian])).float(), None, bits)
    reach = torch.tensor([2 * laplace_clip(bits), 2 * gaussian_clip(bits)])
    torch.testing.assert_close(upper, 0.5 + reach, rtol=0.01, atol=0)
    torch.testing.assert_close(lower, 0.5 - reach, rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("scheme", "more"), [("eq6", 1), ("affine", 1), ("symmetric", 0)])
def test_aciq_takes_values_without_a_negative_as_half_of_a_distribution(bits, scheme, more):
    random = np.random.default_rng(0)
    values = np.stack([random.laplace(0, 2.0, 200_000), random.normal(0, 2.0, 200_000)]).clip(min=0)
    _, upper = aciq(torch.tensor(values).float(), None, bits, scheme)
    reach = torch.tensor([2 * laplace_clip(bits + more), 2 * gaussian_clip(bits + more)])
    torch.testing.assert_close(upper, reach, rtol=0.02, atol=0)


# --- KL


def divergence_in_plain_loops(histogram: list[float], i: int, levels: int) -> float:
    """KL(P || Q) of the first `i` bins merged into `levels`: bin by bin, as TensorRT describes it."""
    p, source = histogram[:i], histogram[:i]
    p[-1] += sum(histogram[i:])
    q = [0.0] * i
    for level in range(levels):
        members = [j for j in range(i) if j * levels // i == level]
        occupied = [j for j in members if p[j] > 0]
        for j in occupied:
            q[j] = sum(source[m] for m in members) / len(occupied)
    if sum(q) == 0:
        return math.inf
    total = 0.0
    for p_j, q_j in zip(p, q, strict=True):
        if p_j > 0:
            if q_j == 0:
                return math.inf
            total += p_j / sum(p) * math.log((p_j / sum(p)) / (q_j / sum(q)))
    return total


@pytest.mark.parametrize("levels", [2, 8, 16])
@pytest.mark.parametrize("kind", ["smooth", "sparse", "with an outlier"])
def test_kl_threshold_is_that_of_plain_loops(levels, kind):
    random = np.random.default_rng(levels)
    histogram = np.floor(1000 * np.exp(-np.arange(96) / 15)) + random.integers(0, 30, 96)
    if kind == "sparse":
        histogram *= random.random(96) < 0.4
    if kind == "with an outlier":
        histogram[60:95] = 0
    divergences = [divergence_in_plain_loops(histogram.tolist(), i, levels) for i in range(levels, 97)]
    threshold = clip_values._kl_threshold(torch.tensor(histogram), torch.tensor(0.5, dtype=torch.float64), levels)
    assert threshold.item() == 0.5 * (levels + int(np.argmin(divergences)))


@pytest.mark.parametrize(("scheme", "of_half"), [("eq6", 16), ("affine", 16), ("symmetric", 8)])
def test_kl_looks_at_a_histogram_of_magnitudes(scheme, of_half, monkeypatch):
    monkeypatch.setattr(clip_values, "_BINS", 64)
    values = heavy_tailed(2, 3000)
    values[1].relu_()
    _, upper = kl(values, None, 4, scheme)
    for row, chosen, levels in zip(values.tolist(), upper.tolist(), (8, of_half), strict=True):
        largest = max(abs(value) for value in row)
        histogram = [0.0] * 64
        for value in row:
            histogram[min(int(abs(value) / largest * 64), 63)] += 1
        histogram[0] = histogram[1]
        divergences = [divergence_in_plain_loops(histogram, i, levels) for i in range(levels, 65)]
        assert chosen == pytest.approx(largest * (levels + int(np.argmin(divergences))) / 64)


def test_kl_ignores_how_many_zeros_a_relu_left():
    values = heavy_tailed(1, 5000).relu()
    many_zeros = torch.cat([values, torch.zeros(1, 100_000)], 1)
    assert kl(values, None, 4)[1] == kl(many_zeros, None, 4)[1]
