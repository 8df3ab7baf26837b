"""Recipes by hand: what the paper's presets become where G and Q are trained apart, or everything is shortened."""

import pytest

from gdfq.errors import GdfqError
from gdfq.reproduce.recipe import owned_settings, recipe
from gdfq.reproduce.tables import CIFAR10, INCEPTION, SHIPPED, TABLES, Cell

OURS = Cell(CIFAR10, "ours", "gdfq", 4)


def test_the_cell_decides_and_the_user_may_change_the_rest():
    cell = Cell(CIFAR10, "MSE", "mse", 5, {"student.fixed_bns": False})
    config = recipe(cell, seed=7, settings={"schedule.batch_size": 12, "method": "gdfq", "run.seed": 1})
    assert (config.method, config.run.seed, config.schedule.batch_size) == ("mse", 7, 12)
    assert (config.quantizer.weight_bits, config.student.fixed_bns) == (5, False)
    assert config.schedule.epochs == 400
    assert {"method", "run.seed", "student.fixed_bns"} < owned_settings((cell, OURS))
    assert "schedule.batch_size" not in owned_settings((cell, OURS))


def test_separate_training_has_the_same_steps_one_after_the_other():
    separate, alternating = (recipe(cell).schedule for cell in TABLES["table6"].cells)
    assert (alternating.epochs, alternating.warmup_epochs, alternating.generator_epochs) == (400, 4, None)
    assert (separate.epochs, separate.warmup_epochs, separate.generator_epochs) == (796, 400, 400)
    assert separate.milestones == (496, 596, 696)  # 96, 196 and 296 epochs after Q's first, as otherwise
    offline = recipe(Cell(SHIPPED, "separate", "gdfq", 4, separate=True)).schedule
    assert (offline.epochs, offline.warmup_epochs, offline.generator_epochs, offline.milestones) == (12, 8, 8, (11,))


def test_scale_shortens_all_phases():
    config = recipe(Cell(INCEPTION, "ours", "gdfq", 4), scale=0.1)
    schedule = config.schedule
    assert (schedule.epochs, schedule.warmup_epochs, schedule.range_epochs) == (40, 5, 1)
    assert (schedule.milestones, schedule.iterations) == ((10, 20, 30), 200)
    assert config.zeroq.iterations == 50


def test_the_smallest_scale_leaves_an_epoch_for_each_phase():
    schedule = recipe(Cell(CIFAR10, "separate", "gdfq", 4, separate=True), scale=1e-6).schedule
    assert (schedule.epochs, schedule.warmup_epochs, schedule.generator_epochs, schedule.range_epochs) == (2, 1, 1, 1)
    assert schedule.milestones == (1,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule.epochs": 4}, ["schedule.epochs", "4", "no epoch", "warmup_epochs"]),
        ({"schedule.epochs": 0}, ["schedule.epochs", "0", "greater than or equal to 1"]),
        ({"schedule.epoch": 5}, ["schedule.epoch", "epochs"]),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(settings, words):
    with pytest.raises(GdfqError) as error:
        recipe(OURS, settings=settings)
    assert all(word in str(error.value) for word in words), error.value


def test_epochs_do_not_matter_where_nothing_is_trained():
    assert recipe(Cell(CIFAR10, "ZeroQ", "zeroq", 4), settings={"schedule.epochs": 1}).schedule.epochs == 1
