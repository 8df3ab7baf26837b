"""ZeroQ's images fit the BN statistics; a bank gives its own images only, and holds another bank out."""

import pytest
import torch
from small_models import Plain, randomize_batch_norm

from gdfq.config import Config
from gdfq.graph import build_teacher, capture
from gdfq.images.bank import Bank
from gdfq.images.inversion import ZeroqConfig, invert, zeroq

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


@pytest.fixture
def captured():
    return capture(randomize_batch_norm(Plain()))


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


def numbered_bank(captured, made: list[int], **changes) -> Bank:
    """Images of the bank of seed s hold 10 s, 10 s + 1, ... everywhere."""

    def make(seed: int) -> torch.Tensor:
        made.append(seed)
        return (10.0 * seed + torch.arange(5)).view(5, 1, 1, 1).expand(5, *SHAPE).contiguous()

    return Bank(build_teacher(captured), SHAPE, config(run__seed=3, **changes), CPU, make)


def numbers(images: torch.Tensor) -> list[float]:
    assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
    return images[:, 0, 0, 0].tolist()


def test_a_bank_is_made_once_and_everything_drawn_is_of_it(captured):
    made: list[int] = []
    bank = numbered_bank(captured, made)
    assert made == []
    batch = bank.draw(200)
    assert set(numbers(batch.images)) == {30, 31, 32, 33, 34}
    assert torch.equal(batch.targets, bank.teacher(batch.images).argmax(1))
    torch.testing.assert_close(batch.teacher_logits, bank.teacher(batch.images))
    assert [sorted(numbers(images)) for images in bank.calibration()] == [[30, 31, 32, 33, 34]]
    assert [len(images) for images in bank.batches(11)] == [8, 3]
    assert made == [3]
    for _ in range(2):
        assert [numbers(images) for images in bank.held_out()] == [[40, 41, 42, 43, 44]]
    assert made == [3, 4]


def test_a_bank_goes_on_drawing_where_it_was(captured):
    bank, again = numbered_bank(captured, []), numbered_bank(captured, [])
    bank.images(8)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.images(8)[0], bank.images(8)[0])


def test_a_banks_images_have_been_through_the_transforms(captured):
    ramp = torch.linspace(-1, 1, 8).expand(2, *SHAPE).contiguous()
    settings = config(images__transforms={"low_pass": {"cutoff": 0.5}})
    bank = Bank(build_teacher(captured), SHAPE, settings, CPU, lambda seed: ramp)
    for images in (bank.images(8)[0], *bank.calibration(), *bank.held_out()):
        assert images.std() < 0.5 * ramp.std()
