"""Images for the baselines: how many and which, and one clear message for everything that is wrong with real ones."""

import pytest
import torch
from small_models import Plain, randomize_batch_norm

from gdfq.baselines.images import TrainingImages, calibration_batches, gaussian, generated, warm_up_only
from gdfq.baselines.zeroq import zeroq
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.trainer import Trainer

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


def config(**changes) -> Config:
    short = {"schedule.batch_size": 8, "schedule.range_batches": 3, "run.held_out_images": 10}
    return Config.load("cifar", short | {key.replace("__", "."): value for key, value in changes.items()})


def numbered(count: int) -> list[tuple[torch.Tensor, int]]:
    """A data set whose image i holds i everywhere, with the label i mod 5."""
    return [(torch.full(SHAPE, float(number)), number % 5) for number in range(count)]


def numbers(batches) -> list[int]:
    return [int(image.flatten()[0]) for batch in batches for image in batch]


def test_synthetic_images_are_as_many_as_asked_for():
    images = gaussian(SHAPE, config(), CPU)
    assert [len(batch) for batch in images.calibration] == [8, 8, 8]
    assert [len(batch) for batch in images.held_out] == [8, 2]
    assert [len(batch) for batch in gaussian(SHAPE, config(calibration__count=11), CPU).calibration] == [8, 3]


def test_zeroqs_batches_differ_and_the_held_out_one_is_the_next_seeds():
    teacher = build_teacher(capture(randomize_batch_norm(Plain())))
    settings = {"zeroq__iterations": 3, "zeroq__images": 4}
    images, next_images = (zeroq(teacher, SHAPE, config(run__seed=seed, **settings), CPU) for seed in (0, 1))
    (calibration,), (held_out,) = images
    assert calibration.shape == held_out.shape == (4, *SHAPE)
    assert not torch.equal(calibration, held_out)
    assert torch.equal(held_out, next(iter(next_images.calibration)))


def test_a_generator_is_trained_for_the_warm_up_only():
    captured = capture(randomize_batch_norm(Plain()))
    settings = config(schedule__epochs=9, schedule__iterations=2, schedule__warmup_epochs=3, schedule__range_epochs=1)
    student = build_quantized(captured, settings.quantizer)[0]
    before = {name: value.clone() for name, value in student.named_parameters()}
    trainer = Trainer(build_teacher(captured), student, captured, warm_up_only(settings))
    trainer.run()
    assert trainer.iteration == 6
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    images = generated(trainer)
    assert [tuple(batch.shape) for batch in images.calibration] == [(8, *SHAPE)] * 3
    assert sum(len(batch) for batch in images.held_out) == 10


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
    images = TrainingImages(numbered(24), SHAPE, 5, config(), CPU)
    passes = [[images.batch(3 * number + place) for place in range(3)] for number in range(2)]
    orders = [numbers(batch for batch, _ in batches) for batches in passes]
    assert [sorted(order) for order in orders] == [list(range(24))] * 2
    assert orders[0] != orders[1]
    assert all(
        label == number % 5
        for batches, order in zip(passes, orders, strict=True)
        for label, number in zip(torch.cat([labels for _, labels in batches]).tolist(), order, strict=True)
    )
    again = TrainingImages(numbered(24), SHAPE, 5, config(), CPU)
    assert torch.equal(again.batch(4)[0], passes[1][1][0])


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    assert sorted(numbers([TrainingImages(numbered(3), SHAPE, 5, config(), CPU).batch(7)[0]])) == [0, 1, 2]


def calibrate_on(dataset) -> None:
    list(calibration_batches(dataset, SHAPE, config(), CPU))


def train_on(dataset) -> None:
    TrainingImages(dataset, SHAPE, 5, config(), CPU).batch(0)


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
