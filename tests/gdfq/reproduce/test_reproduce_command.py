"""`gdfq reproduce` as a user meets it, with networks that are really quantized, for a moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdfq.run.folder import read_run

SHORT = [
    f"--set={setting}"
    for setting in (
        "schedule.epochs=2", "schedule.iterations=1", "schedule.batch_size=4", "schedule.warmup_epochs=1",
        "schedule.range_epochs=1", "schedule.range_batches=1", "run.held_out_images=4", "zeroq.iterations=1",
        "zeroq.images=2", "schedule.milestones=[1]",
    )
]  # fmt: skip


def test_a_table_offline(gdfq, few_shipped_images, tmp_path):
    options = ["table1", "--offline", "--out", tmp_path, *SHORT, "--seeds", 2]
    code, page, err = gdfq("reproduce", *options)
    assert code == 0, err
    assert page.rstrip("\n") == (tmp_path / "table1.md").read_text().rstrip("\n")
    assert "90.25 ± 0.30; 63.58 ± 0.23; 67.10 ± 0.29; 60.60 ± 0.15; 70.39 ± 0.20" in page
    assert err.splitlines()[0] == "table1: cell 1 of 3, seed 2: ResNet-20 on fashion-mnist, FT, W4A4"
    (run,) = (tmp_path / "runs").glob("*-gdfq-*seed2")
    config, source = read_run(run)
    assert (config.method, config.run.seed, source["model"]) == ("gdfq", 2, "gdfq.demo:teacher")

    code, out, err = gdfq("reproduce", *options, "--resume", "--json")
    assert (code, err) == (0, "")
    for cell in json.loads(out)["cells"]:
        assert 0 <= cell["results"][0]["top1"]["quantized"] <= 100
        assert cell["summary"]["seconds"] > 0


@pytest.mark.long
def test_a_table_that_torchrun_spreads(tmp_path):
    command = ["torch.distributed.run", "--nproc-per-node=2", "-m", "gdfq", "reproduce", "table1", "--offline"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json", "--out", str(tmp_path), *SHORT],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for of in ("0 of 2: table1: cell 1", "1 of 2: table1: cell 2", "0 of 2: table1: cell 3"):
        assert f"rank {of} of 3" in done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert all(80 < cell["results"][0]["top1"]["quantized"] < cell["results"][0]["top1"]["float"] for cell in cells)


def test_the_users_images_and_weights(gdfq, cifar10, resnet20_weights, tmp_path):
    options = ["--data", f"cifar10={cifar10}", "--weights", f"resnet20_cifar10={resnet20_weights}", "--json"]
    code, out, err = gdfq("reproduce", "table5", *options, *SHORT, "--out", tmp_path / "out", "--cell", 16)
    assert code == 0, err
    cells = json.loads(out)["cells"]
    assert len(cells) == 48
    assert [cell["number"] for cell in cells if cell["results"]] == [16]
    assert (cells[15]["row"], cells[15]["bits"], cells[15]["published"][0]["top1"]) == ("ours", 4, 85.20)
    assert cells[15]["results"][0]["top1"]["float"] in range(0, 101, 5)  # of 20 images


def test_listing(gdfq, tmp_path):
    code, out, _ = gdfq("reproduce", "table8", "--offline", "--list", "--out", tmp_path)
    assert code == 0
    assert "   1  fashion_mnist_resnet20 W6A6  ZeroQ" in out
    code, out, _ = gdfq("reproduce", "table8", "--list", "--json", "--models", "resnet50", "--out", tmp_path)
    listed = json.loads(out)
    assert [cell["number"] for cell in listed["cells"]] == [1, 2, 3, 4]
    assert any("--data imagenet=" in reason for reason in listed["lacking"])
    assert not list(tmp_path.iterdir())


def test_failed_cells_are_said_and_the_exit_code_is_not_zero(gdfq, few_shipped_images, tmp_path):
    """A divergent learning rate: cell 1, whose Q is trained, fails; cell 2 has nothing to train."""
    options = ["--offline", "--out", tmp_path, *SHORT, "--set", "student.learning_rate=1e30", "--json"]
    code, out, err = gdfq("reproduce", "table1", *options)
    assert code == 1
    assert [len(cell["results"]) for cell in json.loads(out)["cells"]] == [0, 1, 0]
    assert "failed: cell 1, seed 0: " in err
    assert err.splitlines()[-1].startswith("gdfq: 2 cells failed, the first: ")


def test_figure1(gdfq, tmp_path):
    code, out, _ = gdfq("reproduce", "figure1", "--scale", 0.005, "--seeds", 3, "--out", tmp_path, "--json")
    assert (code, json.loads(out)["seed"]) == (0, 3)
    assert json.loads(out) == json.loads((tmp_path / "figure1.json").read_text())
    assert (tmp_path / "figure1.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table10"], ["table10", "table9"]),
        (["figure1", "--seeds", 1, "--seeds", 2], ["figure1", "one --seeds"]),
        (["figure1", "--cell", 1], ["figure1"]),
        (["table2", "--offline", "--set", "schedule.epochs=abc"], ["schedule.epochs", "abc"]),
        (["table2", "--offline", "--set", "schedule.epochs"], ["section.key=value"]),
        (["table2", "--data", "/no/where"], ["/no/where"]),
        (["table2", "--offline", "--scale", "-1"], ["scale is -1"]),
        ([], ["Missing argument", "name"]),
    ],
)
def test_bad_input_is_one_message(gdfq, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = gdfq("reproduce", *arguments)
    assert (code, out) == (2, "")
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_nothing_could_be_run(gdfq, tmp_path):
    code, out, err = gdfq("reproduce", "table2", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "no cell of table2 could be run" in err
    assert err.count("--data cifar100=FOLDER") == 1
