"""Several processes of one group compute what one does: two and four of gloo, on batches that they do not divide."""

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import rank_cases
import torch
from short_run import SHORT

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors
from gdfq.run.training_run import TrainingRun

pytestmark = pytest.mark.slow
COUNTS = (2, 4)
SEEDS = range(2)
NEAR = 1e-5
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rank_cases"])


def run(function, count, *args) -> list[int]:
    """Exit codes of so many processes that run `function(rank, count, *args)`."""
    return ended(started(function, count, *args))


def started(function, count, *args) -> list:
    processes = [PROCESSES.Process(target=function, args=(rank, count, *args)) for rank in range(count)]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # else nothing is found to be preloaded
        for process in processes:
            process.start()
    return processes


def ended(processes) -> list[int]:
    for process in processes:
        process.join(600)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Results by count of ranks, rank, and what is computed from which seed."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (2, 1, 4):  # two begin what others go on with
        assert run(rank_cases.work, count, folder, SEEDS) == [0] * count
    return {count: [torch.load(folder / f"{count}-{rank}.pt") for rank in range(count)] for count in (1, 2, 4)}


def nearer(computed, count, name, case=None) -> float:
    """Of the seeds, how far from one rank: with one of them a value may come to lie across a rounding boundary."""
    one = computed[1][0]
    taken_out = rank_cases.TAKEN_OUT + (("Q depthwise.bias", "Q grouped.bias") if name == "moving statistics" else ())
    results = [(computed[count][0][name, seed], one[case or name, seed]) for seed in SEEDS]
    return min(rank_cases.difference(*pair, taken_out) for pair in results)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", rank_cases.CASES)
def test_one_iteration_is_that_of_one_rank(computed, count, case):
    assert nearer(computed, count, case) < (0.3 if case == "bfloat16" else NEAR)


@pytest.mark.parametrize("bug", rank_cases.BUGS)
def test_a_planted_bug_is_found(computed, bug):
    assert nearer(computed, 2, bug, rank_cases.BUGS[bug][0]) > 10 * NEAR


@pytest.mark.parametrize("count", COUNTS)
def test_all_ranks_have_the_same_bit_for_bit(computed, count):
    first, *others = computed[count]
    for name, result in first.items():
        if name[0] not in rank_cases.BUGS:
            for other in others:
                assert all(
                    torch.equal(value.nan_to_num(), other[name][key].nan_to_num()) for key, value in result.items()
                ), name


@pytest.mark.parametrize("how", ["kept", "computed again"])
@pytest.mark.parametrize("count", COUNTS)
def test_gradients_are_exchanged_while_backward_goes_on(computed, count, how):
    of_moments = computed[count][0]["order", 0][how][:, 0].tolist()  # of other ranks, the same: see above
    assert of_moments.count(False) > 8  # of parameters each by itself
    assert False in of_moments[: -of_moments[::-1].index(True)]  # ahead of BN's gradients, which backward waits for


@pytest.mark.parametrize("count", COUNTS)
def test_a_bank_is_bit_for_bit_that_of_one_rank(computed, count):
    for seed in SEEDS:
        one, other = computed[1][0]["bank", seed], computed[count][0]["bank", seed]
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["bank"].shape == (11, 3, 8, 8)
        assert torch.equal(one["bank"][4:8], torch.full((4, 3, 8, 8), 0.5))  # found by the first rank alone
        assert one["parts left"].tolist() == [0, 1, 2, 3]


def distance(one: dict, other: dict) -> float:
    squares = [
        ((one[name] - other[name]).square().sum(), other[name].square().sum()) for name in one if "observer" not in name
    ]
    return (sum(a for a, _ in squares) / sum(b for _, b in squares)).sqrt().item()


@pytest.mark.parametrize("count", COUNTS)
def test_after_twenty_iterations_no_further_from_one_rank_than_another_order_of_its_images(computed, count):
    one = computed[1][0]
    apart = [distance(computed[count][0]["trained", seed], one["trained", seed]) for seed in SEEDS]
    reordered = [distance(one["reversed", seed], one["trained", seed]) for seed in SEEDS]
    assert 0 < max(apart) < 3 * max(reordered)
    assert max(reordered) < 0.05


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_ranks_goes_on(computed, count):
    assert rank_cases.difference(computed[count][0]["interrupted", 0], computed[2][0]["interrupted", 0]) < 1e-3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raised", ["8 LostRank: rank 1 of 2: ValueError: planted", "7 ValueError: planted"]),
        ("killed", ["8 LostRank: rank 1 of 2 is gone; what was saved is whole: --resume goes on", None]),
        ("killed in backward", ["8 LostRank: rank 1 of 2 is gone; what was saved is whole", None]),
        pytest.param("late", ["8 LostRank: rank 1 of 2 did not answer in time"] * 2, marks=pytest.mark.long),
        ("full disk", ["7 GdfqError: cannot write to ", "8 LostRank: rank 0 of 2: cannot write to "]),
        ("terminated", ["8 Stopped: stopped after iteration 8 of 30; everything is saved"] * 2),
    ],
)
def test_what_stops_one_rank_stops_all_and_is_said(fault, said, tmp_path):
    codes = run(rank_cases.train, 2, tmp_path, fault)
    assert codes == [0, -9 if "killed" in fault else 0]
    for rank, words in enumerate(said):
        path = tmp_path / f"{rank}.txt"
        assert path.read_text().startswith(words) if words else not path.exists()
    trainer = rank_cases.new_trainer()
    again = TrainingRun(trainer, tmp_path, {})
    again.resume()  # with one rank
    assert trainer.iteration == (8 if fault == "terminated" else 5)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) >= 7


# The one makes its bank ahead, the other while it trains.
@pytest.mark.long
@pytest.mark.parametrize("method", ["squant", "gdfq"])
def test_a_bank_that_is_stopped_goes_on_and_is_the_same(method, tmp_path):
    settings = {
        "method": method, "calibration.images": "inverted", "images.source": "inverted", "inversion.images": 44,
        "inversion.batch_size": 4, "inversion.iterations": 40, "schedule.epochs": 3, "schedule.iterations": 2,
        "schedule.batch_size": 8, "schedule.range_epochs": 1, "schedule.warmup_epochs": 1, "schedule.range_batches": 1,
        "run.device": "cpu",
    }  # fmt: skip
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    for folder in (stopped, whole):
        folder.mkdir()
    processes = started(rank_cases.make_bank, 2, stopped, settings, False)
    pattern = "run/" + run_folder.IMAGES_PART.format("*")
    while not (parts := {path.name for path in stopped.glob(pattern)}):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    for process in processes:  # as torchrun does
        process.terminate()
    since = time.monotonic()
    assert ended(processes) == [0, 0]
    assert time.monotonic() - since < 30
    first = (stopped / "0.txt").read_text()
    assert "stopped while a bank of images was made" in first
    assert f"gdfq quantize --resume {stopped / 'run'}" in first
    assert not (stopped / "run" / run_folder.IMAGES).exists()
    assert {path.name for path in stopped.glob(pattern)} >= parts

    assert run(rank_cases.make_bank, 1, stopped, settings, True) == [0]
    assert run(rank_cases.make_bank, 2, whole, settings, False) == [0, 0]
    one, other = (load_tensors(folder / "run" / run_folder.IMAGES)[0] for folder in (stopped, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(images, other[name]) for name, images in one.items())


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return here.getsockname()[1]


def test_the_first_rank_of_the_command_line_writes_and_speaks(spec, tmp_path):
    arguments = ["quantize", "--model", spec, "--image-size", "8", "--out", str(tmp_path / "run"), "--preset", "demo"]
    assert run(rank_cases.command, 2, tmp_path, free_port(), [*arguments, *SHORT]) == [0, 0]
    written, *silent = [(tmp_path / name).read_text() for name in ("0.out", "1.out", "1.err")]
    assert f"written      {tmp_path / 'run'}" in written
    assert silent == ["", ""]
    assert (tmp_path / "run/report.json").exists()


def test_what_all_ranks_have_to_say_is_said_once(spec, tmp_path):
    arguments = ["quantize", "--model", spec, "--out", str(tmp_path / "run"), "--set", "run.speed=1"]
    assert run(rank_cases.command, 2, tmp_path, free_port(), arguments) == [2, 2]
    said, silent = [(tmp_path / f"{rank}.err").read_text() for rank in range(2)]
    assert said.startswith("gdfq: unknown setting 'run.speed'")
    assert silent == ""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Of one process."""
    folder = tmp_path_factory.mktemp("table")
    assert reproduce("table3", 1, folder) == [0]
    return cells(folder / "table3.json")


def reproduce(name: str, count: int, folder: Path, *options: str) -> list[int]:
    arguments = ["reproduce", name, "--offline", "--out", str(folder), *SHORT[1:], "--set=schedule.milestones=[1]"]
    return run(rank_cases.reproduction, count, folder, free_port(), [*arguments, *options])


def cells(path: Path) -> list[list]:
    """What is in a table, but for times."""
    return [
        [[result[name] for name in ("seed", "top1", "data_free")] for result in cell["results"]]
        for cell in json.loads(path.read_text())["cells"]
    ]


@pytest.mark.long
def test_each_cell_of_a_table_is_made_by_one_rank_alone(table, tmp_path):
    assert reproduce("table3", 2, tmp_path) == [0, 0]
    assert cells(tmp_path / "table3.json") == table
    assert all(len(results) == 1 for results in table)
    out, silent, first, second = [(tmp_path / name).read_text() for name in ("0.out", "1.out", "0.err", "1.err")]
    assert out.rstrip() == (tmp_path / "table3.md").read_text().rstrip()
    assert silent == ""
    assert [line.split(",")[0] for line in first.splitlines()] == [
        f"rank 0 of 2: table3: cell {number} of 3" for number in (1, 3)
    ]
    assert [line.split(",")[0] for line in second.splitlines()] == ["rank 1 of 2: table3: cell 2 of 3"]
    assert reproduce("table3", 2, tmp_path) == [2, 2]
    assert "already holds 3 of the 3 results" in (tmp_path / "0.err").read_text()
    assert (tmp_path / "1.err").read_text() == ""


@pytest.mark.long
def test_cells_that_fail_on_one_rank_are_said_and_keep_others_from_nothing(tmp_path):
    """A divergent learning rate, for cells 1 and 3 of the first rank; cell 2 has nothing to train."""
    options = ["--set=student.learning_rate=1e30", "--set=zeroq.images=2", "--set=zeroq.iterations=1"]
    assert reproduce("table1", 2, tmp_path, *options) == [1, 1]
    assert [len(results) for results in cells(tmp_path / "table1.json")] == [0, 1, 0]
    first, second = [(tmp_path / f"{rank}.err").read_text().splitlines() for rank in range(2)]
    assert first[-1].startswith("gdfq: 2 cells failed, the first: ")
    assert sum(line.startswith("failed: cell ") for line in first) == 2
    assert [line.split(",")[0] for line in second] == ["rank 1 of 2: table1: cell 2 of 3"]


def test_a_batch_has_an_image_for_every_rank(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 4)
    ranks.check_batch("schedule.batch_size", 4)
    with pytest.raises(GdfqError, match=r"'schedule.batch_size' = 3 gives 4 ranks less than an image each"):
        ranks.check_batch("schedule.batch_size", 3)
