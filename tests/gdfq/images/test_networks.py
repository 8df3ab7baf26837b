"""The two generators have the paper's layers, any image size, and normalised images."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gdfq.config import GeneratorConfig
from gdfq.graph import Pixels
from gdfq.images.generator import images_per_class
from gdfq.images.networks import ConditionalBatchNorm, Generator, ToPixels, UpsampledConvolution


@pytest.mark.parametrize("architecture", ["embedding", "conditional"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 30, 21)])
def test_images_have_the_shape_and_are_normalised_per_channel(architecture, shape):
    config = GeneratorConfig(architecture=architecture)
    generator = Generator(shape, 7, config).to(memory_format=torch.channels_last)
    noise, labels = torch.randn(16, 100), torch.randint(7, (16,))
    images = generator(noise, labels)
    assert images.shape == (16, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(shape[0]), atol=0.02, rtol=0)
    images.square().mean().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_number_of_parameters_is_that_of_the_released_architecture():
    def count(architecture, shape, classes):
        return sum(
            p.numel()
            for p in Generator(
                shape, classes, GeneratorConfig(architecture=architecture, learn_scale=False)
            ).parameters()
        )

    convolutions = (128 * 128 * 9 + 128) + (128 * 64 * 9 + 64) + (64 * 3 * 9 + 3)
    linear = 100 * 128 * 64 + 128 * 64
    assert count("embedding", (3, 32, 32), 10) == 10 * 100 + linear + convolutions + 2 * (128 + 128 + 64)
    linear = 100 * 128 * 56 * 56 + 128 * 56 * 56
    assert count("conditional", (3, 224, 224), 1000) == linear + convolutions + 2 * 1000 * (128 + 128 + 64)


def number_of_parameters(size) -> tuple[int, int]:
    """Of all layers, and of the largest."""
    with torch.device("meta"):
        counts = [p.numel() for p in Generator((3, *size), 10, GeneratorConfig()).parameters()]
    return sum(counts), max(counts)


@pytest.mark.parametrize("size", [(257, 257), (299, 299), (512, 384), (1024, 1024), (2048, 64), (4000, 3000)])
def test_no_layer_grows_with_the_image(size):
    most, largest = number_of_parameters((256, 256))
    assert number_of_parameters(size)[0] < most + 50_000
    assert number_of_parameters(size)[1] <= largest


@pytest.mark.parametrize("side", [1, 28, 32, 64, 224, 256])
def test_up_to_256_pixels_it_is_the_published_network(side):
    with torch.device("meta"):
        generator = Generator((3, side, side), 10, GeneratorConfig(learn_scale=False))
    names = {name.split(".")[0] for name, _ in generator.named_parameters()}
    assert names == {"embedding", "linear", "norm0", "conv1", "norm1", "conv2", "norm2", "conv3"}
    assert generator.linear.out_features == 128 * ((side + 3) // 4) ** 2


@pytest.mark.parametrize("architecture", ["embedding", "conditional"])
def test_images_of_more_than_256_pixels(architecture):
    generator = Generator((1, 520, 3), 4, GeneratorConfig(architecture=architecture))
    assert len(generator.stages) == 2
    images = generator(torch.randn(2, 100), torch.tensor([0, 3]))
    assert images.shape == (2, 1, 520, 3)
    images.square().mean().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


@pytest.mark.parametrize("size", [(1, 1), (5, 4), (8, 8)])
def test_upsampled_convolution_is_upsampling_and_convolution(size):
    layer = UpsampledConvolution(3, 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    leaves = [x, layer.weight, layer.bias]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    pairs = (torch.autograd.grad(y, leaves, upstream) for y in (layer(x), expected))
    for ours, exact in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_conditional_batch_norm_scales_and_shifts_by_label():
    norm = ConditionalBatchNorm(4, 3)
    with torch.no_grad():
        norm.gamma.copy_(torch.arange(12.0).view(3, 4))
        norm.beta.copy_(-torch.arange(12.0).view(3, 4))
    x, labels = torch.randn(6, 4, 5, 5), torch.tensor([0, 1, 2, 2, 1, 0])
    mean, var = x.double().mean((0, 2, 3), keepdim=True), x.double().var((0, 2, 3), correction=0, keepdim=True)
    gamma = torch.arange(12.0).view(3, 4)[labels][:, :, None, None]
    expected = (x - mean) / (var + 1e-5).sqrt() * gamma - gamma
    torch.testing.assert_close(norm(x, labels).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_with_one_class_it_is_batch_norm_and_leaky_relu_in_training_and_evaluation():
    norm, expected = ConditionalBatchNorm(4, 1, eps=0.8, negative_slope=0.2), torch.nn.BatchNorm2d(4, eps=0.8)
    with torch.no_grad():
        expected.weight.uniform_(0.5, 2)
        expected.bias.uniform_(-1, 1)
        norm.gamma.copy_(expected.weight)
        norm.beta.copy_(expected.bias)
    for training in (True, True, False):
        x, labels = 3 * torch.randn(6, 4, 5, 5) + 1, torch.zeros(6, dtype=torch.int64)
        y = norm.train(training)(x, labels)
        torch.testing.assert_close(y, F.leaky_relu(expected.train(training)(x), 0.2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(norm.running_mean, expected.running_mean)
        torch.testing.assert_close(norm.running_var, expected.running_var)


def test_images_per_class_differ_by_class_and_leave_the_generator_as_it_was():
    generator = Generator((1, 8, 8), 3, GeneratorConfig())
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    rows = images_per_class(generator, 3, 4)
    assert [row.shape for row in rows] == [(4, 1, 8, 8)] * 3
    assert not torch.equal(rows[0], rows[1])
    assert generator.training
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


@pytest.mark.parametrize("learned", [False, True])
def test_images_leave_at_the_scale_of_the_models(learned):
    pixels = Pixels.around((100.0, -3.0), (50.0, 0.1), "set")
    config = GeneratorConfig(learn_scale=learned)
    generator = Generator((2, 16, 16), 3, config, pixels)
    images = generator(torch.randn(64, 100), torch.randint(3, (64,)))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(pixels.mean), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(pixels.std), rtol=1e-2, atol=0)
    names = {name for name, _ in generator.to_pixels.named_parameters()}
    assert names == ({"shift", "log_gain"} if learned else set())
    if learned:  # a step of either is a share of the standard deviation, whatever the scale
        with torch.no_grad():
            generator.to_pixels.shift += 1
            generator.to_pixels.log_gain += 1
        images = generator(torch.randn(64, 100), torch.randint(3, (64,)))
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor([150.0, -2.9]), rtol=1e-2, atol=0)
        torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(pixels.std) * math.e, rtol=1e-2, atol=0)


def test_the_published_generators_end_in_a_batch_norm():
    x = torch.randn(8, 3, 4, 4)
    ours = ToPixels(3, Pixels.standardized(3), learned=False)
    assert torch.equal(ours(x), nn.BatchNorm2d(3, affine=False)(x))
    assert ours.state_dict().keys() == nn.BatchNorm2d(3, affine=False).state_dict().keys()
