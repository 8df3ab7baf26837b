"""The low-pass against a float64 FFT as the method is written; what does not fit a transform is said."""

import numpy as np
import pytest
import torch

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.images.transforms import LowPass, build_transform


def low_pass_by_hand(images: np.ndarray, cutoff: float) -> np.ndarray:
    """The centered spectrum times exp(-r^2 / (2 D0^2)), pixel by pixel."""
    height, width = images.shape[2:]
    spectrum = np.fft.fftshift(np.fft.fft2(images.astype(np.float64)), axes=(2, 3))
    for row in range(height):
        for column in range(width):
            squared = (row - height // 2) ** 2 + (column - width // 2) ** 2
            spectrum[..., row, column] *= np.exp(-squared / (2 * cutoff**2))
    filtered = np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(2, 3)))
    return filtered.real


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (6, 5), (1, 4), (1, 1)])
@pytest.mark.parametrize("cutoff", [0.7, 3, 100])
def test_low_pass_is_the_filter_of_the_centered_spectrum(size, cutoff):
    images = torch.randn(2, 3, *size)
    expected = torch.tensor(low_pass_by_hand(images.numpy(), cutoff)).float()
    torch.testing.assert_close(LowPass(cutoff)(images), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_low_pass_is_the_low_pass():
    images, gradient = torch.randn(2, 3, 6, 7, requires_grad=True), torch.randn(2, 3, 6, 7)
    LowPass(1.5)(images).backward(gradient)
    expected = torch.tensor(low_pass_by_hand(gradient.numpy(), 1.5)).float()
    torch.testing.assert_close(images.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_dtype_stay(layout, dtype):
    images = torch.randn(2, 3, 6, 7).to(dtype).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        filtered = LowPass(1.5)(images)
    assert filtered.dtype == dtype
    assert filtered.is_contiguous(memory_format=layout)
    expected = torch.tensor(low_pass_by_hand(images.float().numpy(), 1.5)).to(dtype)
    torch.testing.assert_close(filtered, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_transforms_follow_one_another_as_they_are_set():
    images = torch.randn(2, 3, 6, 7)
    assert build_transform({})(images) is images
    settings = Config.load("cifar", {"images.transforms.low_pass.cutoff": 2.0}).images.transforms
    assert torch.equal(build_transform(settings)(images), LowPass(2.0)(images))


@pytest.mark.parametrize(
    ("values", "words"),
    [({"cutoff": 0}, ["cutoff = 0", "above 0"]), ({"cutof": 3}, ["cutof"]), ({}, ["cutoff"]), ({"cutoff": "x"}, [])],
)
def test_what_a_transform_does_not_take_is_said(values, words):
    with pytest.raises(GdfqError) as error:
        build_transform({"low_pass": values})
    assert all(word in str(error.value) for word in ["images.transforms.low_pass", *words]), str(error.value)


def test_an_unknown_transform_is_named():
    with pytest.raises(GdfqError, match=r"'images\.transforms': there is no 'blur'; there are: low_pass"):
        Config.load("cifar", {"images.transforms": {"blur": {}}})
