"""A bank gives its own images only, in parts that are made once, and holds one part more out."""

import pytest
import torch
from small_models import Plain, capture_once

from gdfq.config import Config
from gdfq.graph import build_teacher
from gdfq.images.bank import Bank

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


@pytest.fixture
def captured():
    return capture_once(Plain)


def numbered_bank(captured, made: list[int], **changes) -> Bank:
    """Images of part k hold 10 k, 10 k + 1, ... everywhere."""

    def make(part: int) -> torch.Tensor:
        made.append(part)
        return (10.0 * part + torch.arange(5)).view(5, 1, 1, 1).expand(5, *SHAPE).contiguous()

    config = Config.load("cifar", {"schedule.batch_size": 8, "run.seed": 3, **changes})
    return Bank(build_teacher(captured), SHAPE, config, CPU, make, parts=2)


def numbers(images: torch.Tensor) -> list[float]:
    assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
    return images[:, 0, 0, 0].tolist()


FIRST, SECOND, HELD_OUT = ([10 * part + image for image in range(5)] for part in range(3))


def test_a_bank_is_made_once_and_everything_drawn_is_of_it(captured):
    made: list[int] = []
    bank = numbered_bank(captured, made)
    assert made == []
    batch = bank.draw(200)
    assert set(numbers(batch.images)) == {*FIRST, *SECOND}
    assert torch.equal(batch.targets, bank.teacher(batch.images).argmax(1))
    torch.testing.assert_close(batch.teacher_logits, bank.teacher(batch.images))
    assert numbers(bank.bank) == [*FIRST, *SECOND]
    assert [numbers(images) for images in bank.calibration()] == [FIRST, SECOND]
    assert [len(images) for images in bank.batches(11)] == [8, 3]
    assert made == [0, 1]
    for _ in range(2):
        assert [numbers(images) for images in bank.held_out()] == [HELD_OUT]
    assert made == [0, 1, 2]


def test_a_bank_goes_on_drawing_where_it_was(captured):
    bank, again = numbered_bank(captured, []), numbered_bank(captured, [])
    bank.images(8)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.images(8)[0], bank.images(8)[0])


def test_a_banks_images_have_been_through_the_transforms(captured):
    ramp = torch.linspace(-1, 1, 8).expand(2, *SHAPE).contiguous()
    settings = Config.load("cifar", {"images.transforms": {"low_pass": {"cutoff": 0.5}}})
    bank = Bank(build_teacher(captured), SHAPE, settings, CPU, lambda part: ramp)
    for images in (bank.images(8)[0], *bank.calibration(), *bank.held_out()):
        assert images.std() < 0.5 * ramp.std()
