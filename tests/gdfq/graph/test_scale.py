"""Mean and standard deviation of a network's images, found in its BN statistics, against images that made them."""

import math

import pytest
import torch
from small_models import randomize_batch_norm
from torch import Tensor, nn
from torch.nn import functional as F

from gdfq import demo
from gdfq.config import ModelConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_teacher, capture
from gdfq.graph.scale import SAME, infer, pixels_of

SIZE = 28
BGR = torch.tensor([103.9, 116.8, 123.7]).view(3, 1, 1)


class Prepared(nn.Module):
    def __init__(self, net, prepare):
        super().__init__()
        self.net, self.prepare = net, prepare

    def forward(self, x):
        return self.net(self.prepare(x))


def photographs(channels: int) -> Tensor:
    """Pixels in 0..1: real ones, the channels nearly alike and not of the same scale."""
    pixels = demo.test_set().images[:400].float() / 255
    each = [0.8 * pixels + 0.2 * pixels.roll(channel, 0) for channel in range(channels)]
    return torch.cat([(1 - 0.1 * channel) * one for channel, one in enumerate(each)], 1)


def behind_relu(channels):
    return [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(16)]


def strided(channels):
    return [nn.Conv2d(channels, 24, 7, 2, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU()]


def on_the_image(channels):
    return [nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3)]


def trained_on(images: Tensor, front, prepare=lambda x: x) -> nn.Module:
    """A network whose BN statistics are those of `images`."""
    torch.manual_seed(0)
    layers = front(images.shape[1])
    width = next(m.out_channels for m in layers if isinstance(m, nn.Conv2d))
    net = nn.Sequential(*layers, nn.Conv2d(width, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = Prepared(randomize_batch_norm(net.append(nn.Flatten()).append(nn.Linear(8, 5))), prepare)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def inferred(model, channels):
    captured = capture(model, SIZE, channels)
    return infer(build_teacher(captured), captured.image_shape)


def close(found, images: Tensor) -> None:
    """A first layer says little of how the scales of channels differ that are nearly alike."""
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    ratios = torch.tensor(found.std) / std
    assert 0.75 < ratios.log().mean().exp() < 1.33
    assert ratios.min() > 0.65
    assert ratios.max() < 1.5
    assert ((torch.tensor(found.mean) - mean).abs() < 0.35 * std).all()


@pytest.mark.parametrize("front", [strided, behind_relu, on_the_image])
@pytest.mark.parametrize(
    "of",
    [
        lambda x: (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True),
        lambda x: x,
        lambda x: 255 * x,
        lambda x: 255 * x.flip(1) - BGR,
        lambda x: 65535 * x,
    ],
    ids=["standardized", "in 0..1", "in 0..255", "BGR minus mean", "16 bits"],
)
def test_scale_is_found_in_the_first_statistics(of, front):
    images = of(photographs(3))
    close(inferred(trained_on(images, front), 3), images)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_any_number_of_channels(channels):
    images = 3 * photographs(channels) + 7
    close(inferred(trained_on(images, strided), channels), images)


def test_a_model_that_normalizes_inside():
    images = photographs(1)
    close(inferred(trained_on(images, strided, lambda x: (x - 0.286) / 0.353), 1), images)


@pytest.mark.parametrize(
    ("prepare", "unsaid"),
    [
        (lambda x: x - x.mean((2, 3), keepdim=True), "the mean out"),
        (lambda x: F.instance_norm(x), "the mean and scale out"),
        (lambda x: x / x.abs().amax((1, 2, 3), keepdim=True), "the scale out"),
    ],
    ids=["mean of each image", "instance norm", "greatest of each image"],
)
@pytest.mark.parametrize("factor", [1.0, 255.0])
def test_what_a_model_takes_out_of_each_image_is_doubted_until_it_is_set(prepare, unsaid, factor):
    images = factor * (photographs(3) + 0.1)
    model = trained_on(images, strided, prepare)
    found = inferred(model, 3)
    assert unsaid in found.doubt
    assert "model.input_mean" in found.doubt
    std, mean = torch.tensor(found.std), torch.tensor(found.mean)
    assert mean.abs().max() < 4 * std.max()
    if "scale" in unsaid:
        assert std.log().mean().abs() < 0.01
    else:
        assert (std / images.std((0, 2, 3))).log().abs().max() < math.log(SAME)
    known = pixels_of(model, found, ModelConfig(input_mean=0.3 * factor, input_std=0.4 * factor))
    assert (known.doubt, known.std) == ("", (0.4 * factor,) * 3)
    assert unsaid in pixels_of(model, found, ModelConfig(input_mean=0.3 * factor)).doubt


@pytest.mark.parametrize("front", [strided, behind_relu, on_the_image])
def test_what_a_model_does_not_take_out_is_not_doubted(front):
    assert not inferred(trained_on(255 * photographs(3), front), 3).doubt


def test_what_is_set_is_taken():
    model = trained_on(photographs(3), strided)
    captured = capture(model, SIZE)
    found = infer(build_teacher(captured), captured.image_shape)
    both = pixels_of(model, found, ModelConfig(input_mean=0.5, input_std=(0.1, 0.2, 0.3)))
    assert (both.mean, both.std, both.origin) == ((0.5,) * 3, (0.1, 0.2, 0.3), "set")
    torch.testing.assert_close(both.low, (0.2, -0.1, -0.4))
    torch.testing.assert_close(both.high, (0.8, 1.1, 1.4))
    one = pixels_of(model, found, ModelConfig(input_std=0.25))
    assert one.std == (0.25,) * 3
    assert one.mean == found.mean
    assert one.origin == "std set, the other inferred from its first BN layers"
    with pytest.raises(GdfqError, match=r"'model.input_mean' has 2 numbers.*have 3 channel"):
        pixels_of(model, found, ModelConfig(input_mean=(0.0, 1.0)))


def test_a_timm_models_own_words_are_taken_where_they_fit():
    images = (0.65 * photographs(3) + 0.25 - 0.45) / 0.226  # about as bright as ImageNet's
    model = trained_on(images, strided)
    model.default_cfg = {"input_size": (3, SIZE, SIZE), "mean": (0.45,) * 3, "std": (0.226,) * 3}
    captured = capture(model)
    found = infer(build_teacher(captured), captured.image_shape)
    known = pixels_of(model, found, ModelConfig())
    torch.testing.assert_close(known.low, (-0.45 / 0.226,) * 3)
    torch.testing.assert_close(known.high, (0.55 / 0.226,) * 3)
    assert "default_cfg" in known.origin
    model.default_cfg |= {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    other = pixels_of(model, found, ModelConfig())
    assert other.mean == found.mean
    assert "does not fit" in other.origin


@pytest.mark.parametrize("scale", [1.0, 255.0, 1 / 255])
def test_first_statistics_of_large_or_small_pixels_do_not_drown_the_others(scale):
    images = scale * (photographs(3) - 0.286) / 0.353
    model = trained_on(images, strided)
    first, second = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    logits, readings = build_teacher(capture(model, SIZE)).read(images[:50], ("statistics",))
    torch.testing.assert_close(logits, model(images[:50]))
    x = model.net[0](images[:50])
    statistics = readings["statistics"]
    torch.testing.assert_close(statistics.running_vars[1], second.running_var)
    number = statistics.running_means[0][0] / first.running_mean[0]
    for found, expected in (
        (statistics.means[0], number * x.mean((0, 2, 3))),
        (statistics.variances[0], number**2 * x.var((0, 2, 3), correction=0)),
        (statistics.running_means[0], number * first.running_mean),
        (statistics.running_vars[0], number**2 * first.running_var),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    ratio = statistics.running_vars[0].mean() / statistics.running_vars[1].mean()
    if scale == 1:
        assert number == 1
    else:
        torch.testing.assert_close(ratio.item(), 10.0 if scale > 1 else 0.1, rtol=1e-4, atol=0)


def test_a_first_layer_that_says_nothing(monkeypatch):
    model = trained_on(photographs(3), strided)
    monkeypatch.setattr("gdfq.graph.scale._means", lambda statistics, std: std * torch.nan)
    found = inferred(model, 3)
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)
    assert "say nothing" in found.origin
