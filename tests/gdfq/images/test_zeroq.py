"""ZeroQ's images fit the BN statistics; the next seed's are held out."""

import pytest
import torch
from small_models import Plain, capture_once

from gdfq.config import Config
from gdfq.graph import build_teacher
from gdfq.images.zeroq import ZeroqConfig, invert, zeroq

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


@pytest.fixture
def captured():
    return capture_once(Plain)


def config(**changes) -> Config:
    settings = {"schedule.batch_size": 8, "zeroq.iterations": 3, "zeroq.images": 4}
    return Config.load("cifar", settings | {key.replace("__", "."): value for key, value in changes.items()})


def misfit(captured, images: torch.Tensor) -> float:
    """ZeroQ's Eq. 3 over the image and the one BN of `Plain`, written out in float64."""
    model = captured.module
    inputs = torch.nn.functional.conv2d(images.double(), model.get_parameter("conv.weight").double(), padding=1)
    total = 0.0
    for x, mean, variance in (
        (images.double(), torch.zeros(3), torch.ones(3)),
        (inputs, model.get_buffer("bn.running_mean"), model.get_buffer("bn.running_var")),
    ):
        rows = x.transpose(0, 1).flatten(1)
        total += (rows.mean(1) - mean).square().mean() + (rows.std(1, correction=0) - variance.sqrt()).square().mean()
    return float(total)


def test_inverted_images_fit_the_statistics_better_the_longer_it_takes(captured):
    teacher = build_teacher(captured)
    misfits = [
        misfit(
            captured, invert(teacher, SHAPE, ZeroqConfig(iterations=iterations, images=8, learning_rate=0.1), 0, CPU)
        )
        for iterations in (1, 10, 100)
    ]
    assert misfits[2] < 0.8 * misfits[1]
    assert misfits[1] < 0.8 * misfits[0]


def test_zeroqs_held_out_images_are_the_next_seeds(captured):
    teacher = build_teacher(captured)
    images, next_images = (zeroq(teacher, captured, config(run__seed=seed), CPU) for seed in (0, 1))
    (calibration,), (held_out,) = images.calibration(), images.held_out()
    assert calibration.shape == held_out.shape == (4, *SHAPE)
    assert not torch.equal(calibration, held_out)
    assert torch.equal(held_out, next(next_images.calibration()))
