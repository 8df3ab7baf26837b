"""The bounds of a pixel: a real image is not clipped because generated ones were tamer."""

from dataclasses import replace

import pytest
import torch
from small_models import randomize_batch_norm
from torch import nn

from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.graph import Pixels, build_quantized, capture
from gdfq.nn import activation_quantizers

LOW, HIGH = (-1.0, 0.0, -3.0), (2.0, 0.5, 7.0)
PIXELS = Pixels((0.0, 0.2, 1.0), (0.5, 0.1, 2.0), LOW, HIGH, "known")


class Prepared(nn.Module):
    def __init__(self, prepare, channels=3):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv, self.bn, self.fc = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.prepare = prepare
        randomize_batch_norm(self)

    def forward(self, x):
        return self.fc(self.bn(self.conv(self.prepare(self, x))).relu().mean((2, 3)))


PREPARATIONS = {
    "nothing": (lambda m, x: x, 3),
    "scaled": (lambda m, x: (x - 0.5) / -0.25, 3),
    "reordered": (lambda m, x: x.flip(1)[:, :2], 2),
    "gray": (lambda m, x: (x * torch.tensor([0.3, -0.6, 0.1]).view(3, 1, 1)).sum(1, keepdim=True), 1),
    "a BatchNorm": (lambda m, x: m.norm(x), 3),
    "resized": (lambda m, x: nn.functional.interpolate(x, scale_factor=2.0), 3),
}


@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("observer", ["moving_average", "learned_step"])
def test_the_images_range_holds_every_pixel(name, observer):
    prepare, channels = PREPARATIONS[name]
    model = Prepared(prepare, channels)
    captured = replace(capture(model, 8, 3), pixels=PIXELS)
    student, _ = build_quantized(captured, QuantizerConfig(observer=observer))
    calibrate(student, [0.01 * torch.randn(4, 3, 8, 8)])
    lower, upper = next(iter(activation_quantizers(student).values())).range.tolist()
    extremes = torch.tensor([[a, b, c] for a in (-1.0, 2.0) for b in (0.0, 0.5) for c in (-3.0, 7.0)])
    with torch.no_grad():
        least, greatest = model.prepare(model, extremes[..., None, None].expand(-1, -1, 8, 8)).aminmax()
    assert lower == pytest.approx(min(least.item(), 0), abs=0.03)  # a learned step has its zero on a level
    assert upper == pytest.approx(max(greatest.item(), 0), abs=0.03)


def test_what_was_seen_beyond_the_bounds_counts_and_other_activations_are_left_alone():
    captured = capture(Prepared(PREPARATIONS["nothing"][0]), 8, 3)
    images = 20 * torch.randn(4, 3, 8, 8)
    ranges = []
    for pixels in (None, PIXELS):
        student, _ = build_quantized(replace(captured, pixels=pixels), QuantizerConfig())
        calibrate(student, [images])
        ranges.append([quantizer.range for quantizer in activation_quantizers(student).values()])
    assert ranges[0][0].tolist() == pytest.approx([images.min().item(), images.max().item()])
    for without, with_bounds in zip(*ranges, strict=True):
        assert torch.equal(without, with_bounds)


def test_many_channels():
    captured = capture(nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8)
    pixels = Pixels.around((1.0,) * 6, (2.0,) * 6, "set")
    student, _ = build_quantized(replace(captured, pixels=pixels), QuantizerConfig())
    calibrate(student, [0.01 * torch.randn(4, 6, 8, 8)])
    assert next(iter(activation_quantizers(student).values())).range.tolist() == [-5.0, 7.0]
