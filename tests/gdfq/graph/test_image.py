"""The image keeps its bits through whatever is affine in it or picks from it, and nothing else does."""

import pytest
import torch
from small_models import Plain, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.graph import build_quantized, capture, quantized_layers, quantizer_of


class Prepared(nn.Module):
    """What is done to the image stands before a small network."""

    in_size = (8, 8)

    def __init__(self, prepare) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))
        self.register_buffer("colors", torch.randn(3, 3))
        self.register_buffer("grid", torch.rand(1, 5, 6, 2))
        self.shift = nn.Parameter(torch.randn(3, 1, 1))
        self.norm, self.norm_1d, self.instance = nn.BatchNorm2d(3), nn.BatchNorm1d(3), nn.InstanceNorm2d(3)
        self.conv, self.deconv = nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1)
        self.prepare = prepare
        channels = prepare(self.eval(), torch.randn(2, 3, 8, 8)).shape[1]
        self.net = Plain()
        self.net.conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)

    def forward(self, x):
        return self.net(self.prepare(self, x))


IMAGE = {
    "as it is": lambda m, x: x,
    "scaled": lambda m, x: x / 255,
    "scaled in place": lambda m, x: x.clone().mul_(2).sub_(1),
    "standardized": lambda m, x: (x - m.mean) / m.mean.sqrt(),
    "standardized, functional": lambda m, x: x.sub(m.mean).div(0.25).neg(),
    "subtracted from": lambda m, x: 1 - x,
    "rsub": lambda m, x: torch.rsub(x, 1, alpha=2),
    "addcmul": lambda m, x: torch.addcmul(m.mean, x, m.mean),
    "a learned shift": lambda m, x: x + m.shift * 2,
    "lerp": lambda m, x: torch.lerp(x, m.mean, 0.3),
    "other order of channels": lambda m, x: x[:, [2, 1, 0]],
    "flipped": lambda m, x: x.flip(1).roll(2, 3),
    "repeated": lambda m, x: x[:, :1].repeat(1, 3, 1, 1),
    "expanded": lambda m, x: x[:, :1].expand(-1, 3, -1, -1),
    "concatenated": lambda m, x: torch.cat([x * 2, x[:, :1] - 1, torch.ones_like(x)], 1),
    "stacked": lambda m, x: torch.stack([x, x.flip(3)], 1).flatten(1, 2),
    "channel by channel": lambda m, x: torch.cat([(x[:, i : i + 1] - 0.1 * i) / (i + 1) for i in range(3)], 1),
    "written into": lambda m, x: torch.zeros_like(x).index_copy(1, torch.tensor([1]), x[:, :1]),
    "gray": lambda m, x: (0.3 * x[:, :1] + 0.6 * x[:, 1:2] + 0.1 * x[:, 2:]).expand(-1, 3, -1, -1),
    "sum of two": lambda m, x: x + x.flip(3),
    "difference of neighbors": lambda m, x: x[..., 1:] - x[..., :-1],
    "less its mean": lambda m, x: x - x.mean((2, 3), keepdim=True),
    "mixed by a matrix": lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.colors),
    "matmul": lambda m, x: (x.permute(0, 2, 3, 1) @ m.colors).permute(0, 3, 1, 2),
    "resized": lambda m, x: F.interpolate(x, size=(6, 10), mode="bilinear", align_corners=False),
    "resized, antialias": lambda m, x: F.interpolate(x, size=(6, 6), mode="bicubic", antialias=True),
    "resized, nearest": lambda m, x: F.interpolate(x, scale_factor=2),
    "pooled": lambda m, x: F.avg_pool2d(x, 2),
    "pooled, adaptive": lambda m, x: F.adaptive_avg_pool2d(x, 4),
    "max-pooled": lambda m, x: F.max_pool2d(x, 2),
    "padded": lambda m, x: F.pad(x, (1, 1, 1, 1)),
    "padded with a value": lambda m, x: F.pad(x, (1, 1, 1, 1), value=0.5),
    "padded, reflect": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "padded, replicate": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "padded, circular": lambda m, x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "clamped to pixels": lambda m, x: x.clamp(0, 1) * 2 - 1,
    "normalized": lambda m, x: m.norm(x),
    "normalized, then scaled": lambda m, x: m.norm(x / 2) * 3,
    "normalized as pixels": lambda m, x: m.norm_1d(x.flatten(2)).view(x.shape),
    "in patches": lambda m, x: F.pixel_unshuffle(x, 2),
    "im2col": lambda m, x: F.unfold(x, 2, stride=2).view(-1, 12, 4, 4),
    "sampled": lambda m, x: F.grid_sample(x, m.grid.expand(x.shape[0], -1, -1, -1)),
    "low frequencies": lambda m, x: torch.fft.ifft2(torch.fft.fft2(x)).real,
    "in double": lambda m, x: (x.double() / 255).float(),
    "a view by hand": lambda m, x: x.reshape(x.shape[0], 3, -1).sub(0.5).reshape(x.shape),
    "brought to its own scale": lambda m, x: m.instance(x),
    "brought to its own scale, by hand": lambda m, x: (x - x.mean((1, 2, 3), True)) / x.std((1, 2, 3), keepdim=True),
    "from its least to its greatest": lambda m, x: (
        (x - x.amin((2, 3), True)) / (x.amax((2, 3), True) - x.amin((2, 3), True)) * 2 - 1
    ),
    "normalized in groups": lambda m, x: F.group_norm(x, 1, m.colors[0], m.colors[1]) / 2,
    "as bright as it is": lambda m, x: x * x.mean((1, 2, 3), keepdim=True).sigmoid(),
}
NO_IMAGE = {
    "a convolution": lambda m, x: m.conv(x),
    "a transposed convolution": lambda m, x: m.deconv(x),
    "squared": lambda m, x: x * x,
    "relu": lambda m, x: F.relu(x),
    "normalized, relu": lambda m, x: F.relu(m.norm(x)),
    "sigmoid": lambda m, x: x.sigmoid(),
    "magnitude": lambda m, x: x.abs(),
    "divided by": lambda m, x: 1 / (x + 10),
    "exponent": lambda m, x: x.exp(),
    "image and layer": lambda m, x: torch.cat([x, m.conv(x)], 1),
    "image plus layer": lambda m, x: x + m.conv(x),
    "times itself, moved": lambda m, x: x * x.flip(3),
    "by its own contrast in places": lambda m, x: x / (F.avg_pool2d(x.abs(), 3, 1, 1) + 1),
    "relu, then its own scale": lambda m, x: m.instance(x.relu()),
    "leaky": lambda m, x: F.leaky_relu(x),
}


def bits_of_first_layer(model: nn.Module) -> int:
    """Of the input of `Plain.conv`."""
    student, _ = build_quantized(capture(randomize_batch_norm(model)), QuantizerConfig(input_bits=8))
    calibrate(student, [torch.rand(16, 3, 8, 8)])
    value = quantized_layers(student)[-2].node.args[0]  # the last one is the linear layer
    while quantizer_of(student, value) is None:
        value = value.all_input_nodes[0]
    return quantizer_of(student, value).bits


@pytest.mark.parametrize("what", IMAGE)
def test_the_image_keeps_its_bits(what):
    assert bits_of_first_layer(Prepared(IMAGE[what])) == 8


@pytest.mark.parametrize("what", NO_IMAGE)
def test_what_is_computed_from_it_does_not(what):
    assert bits_of_first_layer(Prepared(NO_IMAGE[what])) == 4
