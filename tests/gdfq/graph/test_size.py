"""The size counts every quantized weight, whatever it is called and wherever it comes from."""

import pytest
import torch
from small_models import Plain, capture_once, randomize_batch_norm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from gdfq.config import QuantizerConfig
from gdfq.graph import build_quantized, capture, quantized_layers, size_in_bytes

WEIGHTS, REST = 8 * 27 + 5 * 8, 8 + 8 + 5  # of `Plain`


def sizes(model: nn.Module, **settings) -> tuple[int, int]:
    captured = capture(randomize_batch_norm(model))
    return size_in_bytes(captured, build_quantized(captured, QuantizerConfig(weight_bits=4, **settings))[1])


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), padding=1)


class Turned(nn.Module):
    """Its parameter lies the other way round."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 8))

    def forward(self, x):
        return F.conv2d(x, self.kernel.permute(3, 2, 0, 1), padding=1)


class OfTwoHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.upper, self.lower = nn.Parameter(torch.randn(4, 27)), nn.Parameter(torch.randn(4, 27))

    def forward(self, x):
        return F.conv2d(x, torch.cat([self.upper, self.lower]).view(8, 3, 3, 3), padding=1)


class Fixed(nn.Module):
    """A kernel that is not trained."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", torch.randn(8, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel, padding=1)


class Twice(nn.Module):
    """A weight that is computed at each of two calls, and stored once."""

    def __init__(self):
        super().__init__()
        self.conv = Standardized(3, 8, 3, bias=False)

    def forward(self, x):
        return self.conv(x) + self.conv(x.flip(3))


def with_conv(conv: nn.Module) -> nn.Module:
    model = Plain()
    model.conv = conv
    return model


def pruned() -> nn.Module:
    model = Plain()
    prune.l1_unstructured(model.conv, "weight", 0.5)
    return model


def conv(**arguments) -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, padding=1, bias=False, **arguments)


COMPUTED = {
    "ordinary": (Plain, 0),
    "pruned": (pruned, 0),
    "weight normalization": (lambda: with_conv(parametrizations.weight_norm(conv())), 8),
    "spectral normalization": (lambda: with_conv(parametrizations.spectral_norm(conv())), 0),
    "standardized": (lambda: with_conv(Standardized(3, 8, 3, bias=False)), 0),
    "turned": (lambda: with_conv(Turned()), 0),
    "of two halves": (lambda: with_conv(OfTwoHalves()), 0),
    "fixed": (lambda: with_conv(Fixed()), 0),
    "twice": (lambda: with_conv(Twice()), 0),
}


@pytest.mark.parametrize("what", COMPUTED)
def test_every_weight_is_counted_at_its_bits(what):
    make, more = COMPUTED[what]  # numbers that the float model has for it
    assert sizes(make()) == (4 * (WEIGHTS + REST + more), WEIGHTS // 2 + 4 * REST)


class ReadTwice(Plain):
    """The last layer's weight is read by something else, too."""

    def forward(self, x):
        return super().forward(x) + self.fc.weight.sum(1)


class Shares(Plain):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.out.weight = self.fc.weight

    def forward(self, x):
        return self.out(super().forward(x).relu())


def test_what_is_read_in_float_stays():
    assert sizes(ReadTwice())[1] == WEIGHTS // 2 + 4 * (REST + 5 * 8)
    assert sizes(Plain(), layers={"conv": "float"})[1] == 5 * 8 // 2 + 4 * (REST + 8 * 27)


def test_a_weight_of_two_layers_is_stored_once():
    assert sizes(Shares())[1] == (8 * 27 + 64) // 2 + 4 * (16 + 16)


class Attends(Plain):
    """Several layers in one module of torch, of weights that it computes."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        y, _ = self.attention(x, x * 2, x * 3)
        return self.fc(y.mean(1))


def test_layers_of_one_module_are_told_apart():
    captured = capture_once(Attends)
    student, summary = build_quantized(captured, QuantizerConfig(weight_bits=4))
    assert len({entry.name for entry in summary.weights}) == len(summary.weights) == 2 + 4
    assert len(quantized_layers(student)) == 3  # the others' weights are computed
    biases = 24 + 8
    expected = (WEIGHTS + 4 * 64) // 2 + 4 * (REST + biases)
    assert size_in_bytes(captured, summary)[1] == expected


class Convolves(Plain):
    def forward(self, x):
        x = torch.convolution(x, self.conv.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return self.fc(self.relu(self.bn(x)).mean((2, 3)))


def test_a_convolution_is_a_layer_however_it_is_called():
    assert sizes(Convolves()) == sizes(Plain())


@parametrize.cached()
def test_a_normalized_weight_is_reported_as_a_layer_alone():
    _, summary = build_quantized(capture(randomize_batch_norm(with_conv(Standardized(3, 8, 3)))), QuantizerConfig())
    assert not summary.stayed_float
