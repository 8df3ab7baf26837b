"""Inverted images fit the BN statistics, in parts each of a seed of its own."""

import pytest
import torch
from small_models import Residual
from torch import nn

from gdfq.config import Config
from gdfq.fit import fit, mean_distances
from gdfq.graph import Pixels, build_teacher, capture
from gdfq.images.inversion import InversionConfig, invert, inverted

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
PIXELS = Pixels.around((0.3, -0.2, 0.1), (0.5, 0.6, 0.4), "set")


@pytest.fixture(scope="module")
def captured():
    """Of a network that remembers smooth images."""
    torch.manual_seed(0)
    model = Residual().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(PIXELS.scaled(1.6 * nn.functional.interpolate(torch.randn(500, 3, 3, 3), (8, 8), mode="bilinear")))
    return capture(model.eval())


@pytest.fixture(scope="module")
def teacher(captured):
    return build_teacher(captured)


def new_bank(teacher, captured, **changes):
    settings = {"inversion.images": 10, "inversion.batch_size": 4, "inversion.iterations": 2}
    config = Config.load("cifar", settings | {key.replace("__", "."): value for key, value in changes.items()})
    return inverted(teacher, captured, config, CPU)


def made(teacher, seed=0, **settings) -> torch.Tensor:
    return invert(teacher, SHAPE, InversionConfig(**settings), 16, seed, CPU, pixels=PIXELS)


def distance(teacher, images) -> float:
    return mean_distances(fit(teacher, [images], PIXELS).layers)[0]


@pytest.mark.parametrize("swing", [False, True])
def test_images_fit_the_better_the_longer_it_takes(teacher, swing):
    distances = [distance(teacher, made(teacher, iterations=iterations, swing=swing)) for iterations in (1, 30, 300)]
    assert distances[2] < 0.7 * distances[1] < 0.5 * distances[0]


def test_images_have_the_scale_of_the_pixels(teacher):
    images = made(teacher, iterations=200)
    mean, std = PIXELS.tensors()
    torch.testing.assert_close(images.mean((0, 2, 3)), mean.flatten(), atol=0.1, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), std.flatten(), atol=0.1, rtol=0)


def test_everything_comes_from_the_seed(teacher):
    torch.manual_seed(1)
    first = made(teacher, iterations=3)
    torch.manual_seed(2)
    assert torch.equal(made(teacher, iterations=3), first)
    assert not torch.equal(made(teacher, seed=1, iterations=3), first)
    assert not torch.equal(made(teacher, iterations=3, swing=False), first)


def test_a_bank_has_parts_of_about_the_same_size(teacher, captured):
    bank = new_bank(teacher, captured)
    assert [len(part) for part in bank.calibration()] == [4, 3, 3]
    (held_out,) = bank.held_out()
    assert (len(bank.bank), len(held_out)) == (10, 3)
    images = torch.cat([bank.bank, held_out]).flatten(1)
    assert len(images.unique(dim=0)) == 13
    again, other = new_bank(teacher, captured), new_bank(teacher, captured, run__seed=1)
    assert torch.equal(again.bank, bank.bank)
    assert not (torch.cat([other.bank, *other.held_out()]).flatten(1)[:, None] == images).all(2).any()


def test_a_bank_smaller_than_a_part(teacher, captured):
    bank = new_bank(teacher, captured, inversion__images=3)
    assert (len(bank.bank), [len(images) for images in bank.held_out()]) == (3, [3])
