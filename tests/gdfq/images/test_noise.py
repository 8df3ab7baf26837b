"""Pink noise has the spectrum that it says, by its mean over many images."""

import pytest
import torch

from gdfq.images.noise import pink_images


@pytest.mark.parametrize("size", [(16, 16), (9, 12), (1, 1), (7, 1)])
def test_amplitudes_fall_with_the_frequency(size):
    images = pink_images((2, *size), 3000, 0, torch.device("cpu"))
    assert images.shape == (3000, 2, *size)
    power = torch.fft.fft2(images.double()).abs().square().mean((0, 1)) / (size[0] * size[1])
    rows, columns = (torch.fft.fftfreq(length, 1 / length, dtype=torch.float64) for length in size)
    expected = 1 / (rows[:, None] ** 2 + columns**2).clamp_min(1)
    torch.testing.assert_close(power, expected / expected.mean(), rtol=0.12, atol=0)
    assert images.square().mean().item() == pytest.approx(1, rel=0.05)
