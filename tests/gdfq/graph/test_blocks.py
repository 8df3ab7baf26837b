"""Blocks: which ones a network has, by hand, and that one after the other they compute what Q and P do."""

import pytest
import torch
from small_models import Plain, Residual, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.graph import build_quantized, build_teacher, capture, quantized_layers
from gdfq.graph.blocks import find_blocks
from gdfq.graph.sizes import symbols
from gdfq.models import load_model


class Inverted(nn.Module):
    """A layer, an inverted residual, a branch each side of a concatenation, a pooling, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.alone = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
        x = F.max_pool2d(F.relu(self.bn(torch.cat([self.left(x), self.right(x)], 1))), 2)
        x = F.relu(self.alone(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Cropped(nn.Module):
    """A sum with what is cut to the size that a convolution leaves: torch.export does not know it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.larger = nn.Conv2d(8, 8, 1, stride=2)
        self.smaller = nn.Conv2d(8, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        x, y = self.larger(x), self.smaller(x)
        cut = x.size(-1) - y.size(-1)
        return self.fc((y + x[:, :, :-cut, :-cut]).relu().mean((2, 3)))


class Measured(Plain):
    """The image is scaled inside, and its sizes are read at the end."""

    def forward(self, x):
        height, width = x.shape[2:]
        x = self.relu(self.bn(self.conv((x - 0.5) / 0.25)))
        return self.fc(x.sum((2, 3)) / (height * width))


class Everywhere(nn.Module):
    """The image is read to the very end: nothing can be cut."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        x = F.relu(self.bn(self.conv(image)))
        return self.fc(x.mean((2, 3))) + image.mean((1, 2, 3))[:, None]


class Folded(nn.Module):
    """Images become patches: there the first dimension is not the batch's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.of_patch = nn.Conv2d(4, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        n, c, h, w = x.shape
        x = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(n * 4, c, h // 2, w // 2)
        x = F.relu(self.of_patch(x)).mean((2, 3))
        return self.fc(x.reshape(n, -1))


def quantized(model, size=8, **settings):
    torch.manual_seed(0)
    captured = capture(randomize_batch_norm(model), size)
    student, _ = build_quantized(captured, QuantizerConfig(**settings))
    calibrate(student, [torch.randn(16, *captured.image_shape)])
    return captured, student


def layers(student):
    return [[layer.weight.removesuffix(".weight") for layer in block.layers] for block in find_blocks(student)]


def test_of_an_inverted_residual_and_a_concatenation():
    _, student = quantized(Inverted())
    assert layers(student) == [["stem"], ["expand", "depthwise", "project"], ["left", "right"], ["alone"], ["fc"]]


def test_of_a_resnet():
    _, student = quantized(load_model("pytorchcv:resnet20_cifar10"), 32)
    units = [f"features.stage{stage}.unit{unit}" for stage in (1, 2, 3) for unit in (1, 2, 3)]
    convolutions = [[f"{unit}.body.conv1.conv", f"{unit}.body.conv2.conv"] for unit in units]
    for unit in (3, 6):
        convolutions[unit].append(f"{units[unit]}.identity_conv.conv")
    found = [sorted(block) for block in layers(student)]
    assert found == [["features.init_block.conv"], *convolutions, ["output"]]


def test_a_pooling_by_averages_begins_the_next_block():
    _, student = quantized(Inverted())
    blocks = find_blocks(student)
    assert [block.exit.meta["val"].dim() for block in blocks] == [4, 4, 4, 4, 2]
    assert blocks[-1].entry.meta["val"].shape[2] == 2, "the classifier's block begins ahead of its pooling"


@pytest.mark.parametrize("size", [8, 12])
def test_sizes_of_the_image_that_are_read_behind_a_block(size):
    """Scaling the image once fixed the number of images in the graph, which 12 seemed to depend on, as 2 is in it."""
    captured, student = quantized(Measured(), size)
    assert layers(student) == [["conv"], ["fc"]]
    placeholder = next(iter(captured.module.graph.find_nodes(op="placeholder")))
    assert len(symbols(placeholder.meta["val"].shape[0])) == 1


def test_where_it_cannot_be_cut():
    assert layers(quantized(Everywhere())[1]) == [["conv", "fc"]]
    assert layers(quantized(Folded())[1]) == [["conv"], ["of_patch"], ["fc"]]


@pytest.mark.parametrize("target", ["onnx", "paper"])
@pytest.mark.parametrize(
    "model", [Inverted, Cropped, Measured, Everywhere, Folded, Plain, Residual], ids=lambda model: model.__name__
)
@torch.no_grad()
def test_one_after_the_other_they_are_q_and_p(model, target):
    captured, student = quantized(model(), target=target)
    teacher = build_teacher(captured)
    for count in (2, 5):
        x = torch.randn(count, *captured.image_shape)
        q = p = x
        for block in find_blocks(student):
            q, p = block.quantized()(q), block.exact()(p)
        assert torch.equal(q, student(x))
        torch.testing.assert_close(p, teacher(x), rtol=1e-4, atol=1e-5)


def test_every_layer_is_in_one_block_and_what_takes_its_weights_place_is_called():
    _, student = quantized(Inverted())
    blocks = find_blocks(student)
    assert [layer.weight for block in blocks for layer in block.layers] == [
        layer.weight for layer in quantized_layers(student)
    ]

    class Nothing(nn.Module):
        def forward(self, weight):
            return torch.zeros_like(weight)

    x = torch.randn(3, 8, 4, 4).contiguous()
    changed = blocks[3].learning({"alone.weight": Nothing()})(x)
    bias = student.get_parameter("alone.bias").view(1, -1, 1, 1).expand(3, 8, 4, 4).contiguous()
    assert torch.equal(changed, blocks[3].quantizers[0](F.relu(bias)))
