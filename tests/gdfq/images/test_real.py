"""Real images: how many and which, and one clear message for everything that is wrong with them."""

import pytest
import torch
from small_models import Plain, capture_once

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_teacher
from gdfq.images.real import RealImages, calibration_batches

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def config(**changes) -> Config:
    short = {"schedule.batch_size": 8, "schedule.range_batches": 3, "run.held_out_images": 10}
    return Config.load("cifar", short | {key.replace("__", "."): value for key, value in changes.items()})


def numbered(count: int) -> list[tuple[torch.Tensor, int]]:
    """A data set whose image i holds i everywhere, with the label i mod 5."""
    return [(torch.full(SHAPE, float(number)), number % 5) for number in range(count)]


def real_images(dataset) -> RealImages:
    teacher = build_teacher(capture_once(Plain))
    return RealImages(dataset, teacher, SHAPE, 5, config(), CPU)


def numbers(batches) -> list[int]:
    return [int(image.flatten()[0]) for batch in batches for image in batch]


@pytest.mark.parametrize(("held", "count", "expected"), [(100, 20, 20), (100, None, 24), (5, 20, 5)])
def test_calibration_draws_without_replacement(held, count, expected):
    changes = {} if count is None else {"calibration__count": count}
    drawn = numbers(calibration_batches(numbered(held), SHAPE, config(**changes), CPU))
    assert len(drawn) == len(set(drawn)) == expected
    assert drawn == numbers(calibration_batches(numbered(held), SHAPE, config(**changes), CPU))
    assert drawn != sorted(drawn)


def test_images_without_labels_will_do_for_calibration():
    drawn = numbers(calibration_batches(torch.stack([image for image, _ in numbered(9)]), SHAPE, config(), CPU))
    assert sorted(drawn) == list(range(9))


def test_training_passes_over_all_images_in_another_order_each_time():
    images = real_images(numbered(24))
    passes = [[images.images(8) for _ in range(3)] for _ in range(2)]
    orders = [numbers(batch for batch, _ in batches) for batches in passes]
    assert [sorted(order) for order in orders] == [list(range(24))] * 2
    assert orders[0] != orders[1]
    assert all(
        label == number % 5
        for batches, order in zip(passes, orders, strict=True)
        for label, number in zip(torch.cat([labels for _, labels in batches]).tolist(), order, strict=True)
    )


def test_a_resumed_source_goes_on_where_it_was():
    images, again = real_images(numbered(24)), real_images(numbered(24))
    for _ in range(4):
        images.images(8)
    again.load_state_dict(images.state_dict())
    assert torch.equal(again.images(8)[0], images.images(8)[0])


def test_a_batch_has_the_images_own_labels_and_what_the_teacher_says():
    images = real_images([(torch.randn(SHAPE), number % 5) for number in range(8)])
    images.set_reads(["statistics"])
    batch = images.draw(8)
    labels = {tuple(image.flatten().tolist()): label for image, label in images.dataset}
    assert batch.targets.tolist() == [labels[tuple(image.flatten().tolist())] for image in batch.images]
    torch.testing.assert_close(batch.teacher_logits, images.teacher(batch.images))
    assert list(batch.readings) == ["statistics"]


def test_the_held_out_images_are_noise():
    held_out = [list(real_images(numbered(24)).held_out()) for _ in range(2)]
    assert [len(batch) for batch in held_out[0]] == [8, 2]
    assert all(map(torch.equal, *held_out))
    assert -1 < held_out[0][0].mean() < 1


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    images = real_images(numbered(3))
    assert [sorted(numbers([images.images(8)[0]])) for _ in range(8)] == [[0, 1, 2]] * 8


def calibrate_on(dataset) -> None:
    list(calibration_batches(dataset, SHAPE, config(), CPU))


def train_on(dataset) -> None:
    real_images(dataset).images(8)


def with_image(image) -> list:
    return [*numbered(3), (image, 0)]


@pytest.mark.parametrize("use", [calibrate_on, train_on])
@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ([], ["holds no images"]),
        (iter(numbered(3)), ["len()", "list_iterator"]),
        (with_image(torch.zeros(1, 8, 8)), ["(1, 8, 8)", "(3, 8, 8)"]),
        (with_image(torch.zeros(3, 9, 8)), ["(3, 9, 8)", "(3, 8, 8)"]),
        (with_image(torch.zeros(SHAPE, dtype=torch.uint8)), ["float tensor", "torch.uint8"]),
        (with_image([0.0]), ["float tensor", "list"]),
        (with_image(torch.full(SHAPE, torch.nan)), ["NaN or Inf"]),
    ],
)
def test_wrong_images_are_named(use, dataset, words):
    with pytest.raises(GdfqError) as error:
        use(dataset)
    assert all(word in str(error.value) for word in [f"`{use.__name__}`", *words]), str(error.value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ((torch.zeros(SHAPE), 5), ["label 5", "5 classes", "0..4"]),
        ((torch.zeros(SHAPE), -1), ["label -1", "0..4"]),
        ((torch.zeros(SHAPE), "cat"), ["integer", "'cat'"]),
        (torch.zeros(SHAPE), ["pair (image, label)"]),
    ],
)
def test_wrong_labels_are_named(item, words):
    with pytest.raises(GdfqError) as error:
        train_on([*numbered(3), item])
    assert all(word in str(error.value) for word in words), str(error.value)
