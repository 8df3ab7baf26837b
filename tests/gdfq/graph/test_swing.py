"""Swing convolution against padding and slicing place by place; the passes between stay what they are."""

import itertools
from collections import Counter

import pytest
import torch
from small_models import Residual, Unusual, capture_once, randomize_batch_norm
from torch import nn

from gdfq.graph import build_teacher, capture, swinging
from gdfq.graph.swing import Swing


def swung_by_hand(x: torch.Tensor, row: int, column: int, strides: tuple[int, int]) -> torch.Tensor:
    """Pixel by pixel: the place of padded[i + offset], reflected at the edges."""
    height, width = x.shape[2:]

    def source(index: int, offset: int, stride: int, size: int) -> int:
        place = abs(index + offset - (stride - 1))
        return place if place < size else 2 * (size - 1) - place

    result = torch.empty_like(x)
    for i, j in itertools.product(range(height), range(width)):
        result[:, :, i, j] = x[:, :, source(i, row, strides[0], height), source(j, column, strides[1], width)]
    return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strides", [(2, 2), (3, 2), (1, 4)])
def test_a_swing_is_one_of_all_places_each_as_often(strides, layout):
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=layout)
    swing = Swing(strides, torch.Generator().manual_seed(0))
    places = list(itertools.product(*(range(2 * stride - 1) for stride in strides)))
    expected = [swung_by_hand(x, *place, strides) for place in places]
    draws = 60 * len(places)
    found = Counter(
        next(i for i, y in enumerate(expected) if torch.equal(y, swung)) for swung in (swing(x) for _ in range(draws))
    )
    assert set(found) == set(range(len(places)))
    assert all(abs(count - 60) < 6 * 60**0.5 for count in found.values())


def test_maps_of_a_single_pixel_stay():
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(Swing((2, 2), torch.Generator())(x), x)


def test_strided_convolutions_alone_are_swung():
    model = randomize_batch_norm(Residual())
    teacher = build_teacher(capture(model))
    reader = teacher.reader(("statistics",))
    swung = swinging(reader, torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, 8, 8)
    inputs: dict[str, torch.Tensor] = {}
    for module in swung.module.modules():
        if isinstance(module, Swing):
            module.register_forward_hook(lambda module, args, y: inputs.update(before=args[0], after=y))
    logits, readings = swung(x)
    assert sum(isinstance(module, Swing) for module in swung.module.modules()) == 1  # conv2's
    expected = nn.functional.relu(model.bn1(model.conv1(x)))
    torch.testing.assert_close(inputs["before"], expected)
    y = model.conv2(inputs["after"])
    torch.testing.assert_close(readings["statistics"].means[1], y.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        readings["statistics"].variances[1], y.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5
    )
    plain = reader(x)  # is as it was
    torch.testing.assert_close(plain[0], model(x))
    assert not torch.equal(plain[0], logits)


def test_the_same_seed_swings_alike_and_every_pass_anew():
    teacher = build_teacher(capture_once(Residual))
    x = torch.randn(4, 3, 8, 8)
    one, other = (swinging(teacher.reader(()), torch.Generator().manual_seed(5)) for _ in range(2))
    passes = [one(x)[0] for _ in range(8)]
    assert all(torch.equal(logits, other(x)[0]) for logits in passes)
    assert not all(torch.equal(passes[0], logits) for logits in passes)


def test_other_image_sizes_and_networks_without_strides():
    teacher = build_teacher(capture_once(Residual))
    assert swinging(teacher.reader(()), torch.Generator())(torch.randn(2, 3, 12, 10))[0].shape == (2, 5)
    network = randomize_batch_norm(Unusual())  # whose Conv3d has strides over the channels
    x = torch.randn(2, 3, 8, 8)
    teacher = build_teacher(capture(network))
    assert torch.equal(swinging(teacher.reader(()), torch.Generator())(x)[0], teacher(x))


def test_what_a_layer_is_padded_with_is_not_swung():
    class Padded(nn.Module):
        in_size = (8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
            self.bn = nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.bn(self.conv(nn.functional.pad(x, (0, 1, 0, 1)))).mean((2, 3)))

    swung = swinging(build_teacher(capture(Padded().eval())).reader(()), torch.Generator())
    (swing,) = (module for module in swung.module.modules() if isinstance(module, Swing))
    shapes = []
    swing.register_forward_hook(lambda module, args, y: shapes.append(tuple(args[0].shape)))
    swung(torch.randn(2, 3, 8, 8))
    assert shapes == [(2, 3, 8, 8)]
