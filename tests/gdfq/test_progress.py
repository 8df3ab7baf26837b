"""What a run says of how long it takes, by a clock that the tests turn."""

import sys

import pytest
import torch
from small_models import Plain, randomize_batch_norm

import gdfq
from gdfq.config import Config
from gdfq.progress import Estimate, Pace, duration, steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"), (40, "40 s"), (89, "89 s"), (100, "2 min"), (3600, "60 min"), (5400, "1.5 h"), (36_000, "10 h"),
        (170_000, "47 h"), (432_000, "5.0 days"),
    ],
)  # fmt: skip
def test_durations(seconds, words):
    assert duration(seconds) == words


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def told(seconds_of, device=CPU, until=None, **schedule):
    """What is said of a training whose iteration number i takes `seconds_of(i)`, by the iterations done."""
    settings = {f"schedule.{name}": value for name, value in schedule.items()}
    config = Config.load("cifar", settings | {"method": "gdfq"})
    clock, said = Clock(), []
    estimate = Estimate(config, device, lambda text: said.append((done, text)), clock)
    for done in range(1, (until or estimate.total) + 1):
        clock.now += seconds_of(done)
        estimate.after(done)
    return said


def test_a_training_is_estimated_in_its_first_phase_and_when_q_is_trained():
    said = told(
        lambda done: 60 if done == 1 else 1 if done <= 400 else 2, epochs=10, iterations=100, warmup_epochs=4,
        range_epochs=1,
    )  # fmt: skip
    assert said == [
        (
            6,
            "at least 17 min to go, 994 iterations of 1 s; from number 401 on, when Q is trained, they take longer, "
            "and it is said again",
        ),
        (404, "about 20 min to go, 596 iterations of 2 s"),
    ]


def test_what_is_over_soon_is_not_estimated():
    assert told(lambda done: 0.01, epochs=2, iterations=100, warmup_epochs=1) == []


def test_slow_iterations_are_estimated_after_the_second():
    assert [done for done, _ in told(lambda done: 100, epochs=2, iterations=20, warmup_epochs=1, range_epochs=1)] == [
        2,
        22,
    ]


def test_a_training_that_ends_before_q_is_trained():
    ((_, text),) = told(lambda done: 2, epochs=4, iterations=20, warmup_epochs=4)
    assert text.startswith("about ")


def test_a_run_that_is_resumed_in_training():
    clock, said = Clock(), []
    estimate = Estimate(Config.load("cifar"), CUDA, said.append, clock)
    for done in range(50_001, 50_020):
        clock.now += 1
        estimate.after(done)
    assert said == ["about 8.3 h to go, 29,994 iterations of 1 s"]


def test_days_on_a_cpu_are_said_to_have_a_shorter_way():
    said = [text for _, text in told(lambda done: 2.5, until=900)]
    assert said[0].startswith("at least 2.3 days to go")
    # 25,600 images at 2.5 s for 200, and half as much again for the half of them that train Q
    assert said[1] == (
        "that is long for a CPU: a new run with --preset demo --method gdfq (8 epochs of 100 iterations of 32 images) "
        "would take about 8 min; or lower schedule.epochs, or take a GPU"
    )
    assert [text.split(" ")[0] for text in said[2:]] == ["about"]
    assert not any("that is long" in text for _, text in told(lambda done: 2.5, CUDA, until=900))


def test_where_the_demonstrations_schedule_is_no_shorter_it_is_not_proposed():
    texts = [text for _, text in told(lambda done: 100, epochs=8, iterations=100, batch_size=32)]
    assert any(text.startswith("that is long for a CPU: lower schedule.epochs") for text in texts)


def test_a_pace_leaves_the_first_iteration_out():
    clock = Clock()
    pace = Pace(clock)
    for seconds, expected in ((50, None), (2, None), (2, None), (2, 2.0), (2, None)):
        clock.now += seconds
        assert pace.tick() == expected


def test_a_pace_counts_the_first_iteration_where_its_beginning_is_told():
    clock = Clock()
    pace = Pace(clock)
    for seconds, expected in ((100, 100.0), (2, None)):
        pace.begin()
        clock.now += seconds
        assert pace.tick() == expected


def test_steps_say_how_long_they_take(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("gdfq.progress.Pace", lambda: Pace(clock))
    for progress in (False, True):
        for _ in steps(100, "images", progress):
            clock.now += 2
        err = capsys.readouterr().err
        assert err == ("gdfq: images: about 3 min to go, 96 steps of 2 s\n" if progress else "")


def test_a_run_says_what_it_does_unless_it_is_to_be_quiet(capsys):
    settings = {"model.image_size": 8, "method": "minmax", "schedule.batch_size": 8, "schedule.range_batches": 1}
    config = Config.load("cifar", settings | {"run.held_out_images": 8})
    gdfq.quantize(randomize_batch_norm(Plain()), config, progress=False)
    assert capsys.readouterr() == ("", "")
    gdfq.quantize(randomize_batch_norm(Plain()), config)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "gdfq: Plain, images 3 x 8 x 8, 5 classes, to W4A4 for target 'onnx', on cpu, "
        f"threads: {torch.get_num_threads()}, no files",
        "gdfq: method 'minmax': no training; ranges from Gaussian noise",
    ]


@pytest.mark.parametrize(
    ("method", "data", "words"),
    [
        ("finetune", "train_on", "; the images that were given, 1 epochs of 1 iterations of 8 images"),
        ("mse", "calibrate_on", "; the images that were given"),
        ("mse", None, "; images from 'gaussian'"),
        ("squant", None, "; images from 'inverted'"),
        (
            "reconstruction",
            None,
            "; images from 'inverted', a bank of 16, 2 iterations of 4 images for each block, then 1 of all together",
        ),
    ],
)
def test_a_run_says_where_its_images_come_from(capsys, method, data, words):
    settings = {"model.image_size": 8, "method": method, "schedule.batch_size": 8, "schedule.range_batches": 1}
    settings |= {"schedule.epochs": 1, "schedule.iterations": 1, "run.held_out_images": 8}
    settings |= {"inversion.images": 16, "inversion.iterations": 1, "reconstruction.iterations": 2}
    settings |= {"reconstruction.batch_size": 4, "reconstruction.finetune_iterations": 1}
    given = {} if data is None else {data: [(torch.randn(3, 8, 8), 0)] * 8}
    gdfq.quantize(randomize_batch_norm(Plain()), Config.load("cifar", settings), **given)
    assert capsys.readouterr().err.splitlines()[1].endswith(words)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_are_for_terminals(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    list(steps(3, "images", True))
    assert ("images: 100%" in capsys.readouterr().err) == is_terminal
