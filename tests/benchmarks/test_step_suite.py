"""The suite measures what it was asked for, goes on after a failure and where it stopped, and writes what it has."""

import json
import sys

import pytest

from benchmarks import step, step_suite
from gdfq.provenance import provenance


def result(task, plan, milliseconds):
    seconds = {name: [value / 1e3] * 2 for name, value in milliseconds.items()}
    rows = {
        name: {
            **step.summary(times, task.batch), "peak_memory_mb": 100.0, "profiled_ms": 1.0, "parts_ms": None,
            "launches": {"leaf operator calls": 7.0}, "first_iteration": {}, "backend": "none",
        }
        for name, times in seconds.items()
    }  # fmt: skip
    facts = {**provenance(1), "arguments": step.arguments_of(task, plan), "finished": True}
    reasons = {"disagreements": [], "skipped": {"compile": "no compiler"}, "failed": {}}
    return {**facts, "providers": rows, "ratio_to_ours": step.ratios(seconds), **reasons}


@pytest.fixture
def measured(monkeypatch):
    """The batches that were measured, of every model; `resnet50` fails."""
    done = []

    def measure(task, plan, keep):
        done.append((task.model.removeprefix("pytorchcv:"), task.batch))
        if "resnet50" in task.model:
            raise RuntimeError("ours: GdfqError: it broke")
        return result(task, plan, {"released": 30.0, "ours": 10.0, "floor": 5.0})

    monkeypatch.setattr(step, "measure", measure)
    return done


def run(folder, *arguments):
    return step_suite.main(["--out", str(folder), "--providers", "released", "ours", "floor", *arguments])


def test_all_cells_the_most_important_first(measured, tmp_path, capsys):
    assert run(tmp_path) == 1
    imagenet = ["resnet50", "mobilenetv2_w1", "bn_vgg16", "inceptionv3"]
    assert measured == [
        ("resnet18", 16), ("resnet20_cifar10", 200), *((model, 16) for model in imagenet),
        ("resnet18", 64), *((model, 64) for model in imagenet),
    ]  # fmt: skip
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert len(suite["cells"]) == 9
    assert {"machine", "torch", "gdfq_commit"} <= suite.keys()
    assert suite["failed"] == dict.fromkeys(["resnet50-batch16", "resnet50-batch64"], "ours: GdfqError: it broke")
    cell = json.loads((tmp_path / "resnet20-batch200.json").read_text())
    assert cell == suite["cells"]["resnet20-batch200"]
    assert (cell["arguments"]["preset"], cell["arguments"]["batch"]) == ("cifar", 200)
    assert not (tmp_path / "resnet50-batch16.json").exists()
    assert (tmp_path / "suite.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert text == (tmp_path / "suite.txt").read_text()
    for words in ("resnet20-batch200: pytorchcv:resnet20_cifar10", "3.00", "20000.0", "skipped: no compiler", "failed"):
        assert words in text


def test_resume_measures_what_is_missing_or_was_measured_otherwise(measured, tmp_path):
    few = ["--networks", "resnet20", "resnet18", "--image-size", "32", "--batch", "4"]
    assert run(tmp_path, *few) == 0
    (tmp_path / "resnet18-batch4.json").write_text("{")
    measured.clear()
    assert run(tmp_path, *few, "--resume") == 0
    assert measured == [("resnet18", 4)]
    cells = json.loads((tmp_path / "suite.json").read_text())["cells"]
    assert {name: cell["arguments"]["preset"] for name, cell in cells.items()} == {
        "resnet20-batch4": "cifar", "resnet18-batch4": "imagenet",
    }  # fmt: skip
    assert run(tmp_path, *few, "--resume", "--precision", "bfloat16") == 0
    assert measured == [("resnet18", 4), ("resnet20_cifar10", 4), ("resnet18", 4)]
    path = tmp_path / "resnet20-batch4.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gdfq_commit": {"hash": "another", "dirty": False}}))
    measured.clear()
    assert run(tmp_path, *few, "--resume", "--precision", "bfloat16") == 0
    assert measured == [("resnet20_cifar10", 4)]


def test_what_was_measured_is_written_before_the_next_cell_begins(tmp_path, monkeypatch):
    def measure(task, plan, keep):
        if "resnet18" in task.model:
            raise KeyboardInterrupt
        return result(task, plan, {"ours": 10.0})

    monkeypatch.setattr(step, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--networks", "resnet20", "resnet18")
    assert list(json.loads((tmp_path / "suite.json").read_text())["cells"]) == ["resnet20-batch200"]


def test_the_rounds_of_a_cell_are_written_before_it_ends_and_measured_again(tmp_path, monkeypatch):
    done = []

    def measure(task, plan, keep):
        done.append(task.batch)
        keep(result(task, plan, {"ours": 10.0}) | {"finished": False})
        if len(done) == 1:
            raise KeyboardInterrupt
        return result(task, plan, {"ours": 20.0})

    monkeypatch.setattr(step, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--networks", "resnet20")
    assert "8 rounds of 1, unfinished: 2 of them\n" in (tmp_path / "suite.txt").read_text()
    assert json.loads((tmp_path / "suite.json").read_text())["cells"].keys() == {"resnet20-batch200"}
    assert run(tmp_path, "--networks", "resnet20", "--resume") == 0
    assert done == [200, 200]
    cell = json.loads((tmp_path / "resnet20-batch200.json").read_text())
    assert cell["finished"]
    assert cell["providers"]["ours"]["ms"]["median"] == pytest.approx(20)


def test_variants_of_a_provider_are_drawn_and_a_failed_one_is_measured_again(tmp_path, monkeypatch):
    done, labels = [], []

    def measure(task, plan, keep):
        done.append(task.batch)
        times = {"ours": 10.0, "ours@bfloat16": 5.0, "floor": 4.0, "floor@bfloat16": 2.0}
        return result(task, plan, times) | {"failed": {"eager@tf32": "eager@tf32: ValueError: it broke"}}

    def save(figure, path, *_):
        labels.extend(figure.axes[0].get_legend_handles_labels()[1])

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step_suite, "save_measured", save)
    providers = ["--providers", "ours", "floor", "floor@bfloat16", "ours@bfloat16", "eager@tf32"]
    for _ in range(2):
        assert run(tmp_path, "--networks", "resnet20", "--resume", *providers) == 1
    assert done == [200, 200]
    assert labels[:3] == ["floor", "ours", "ours@bfloat16"]
    text = (tmp_path / "suite.txt").read_text()
    for words in ("floor@bfloat16", "failed: eager@tf32: ValueError: it broke"):
        assert words in text


def test_a_failing_cell_leaves_no_older_result(measured, tmp_path):
    old = tmp_path / "resnet50-batch4.json"
    old.write_text("{}")
    assert run(tmp_path, "--networks", "resnet50", "--batch", "4") == 1
    assert not old.exists()


def test_no_cell_is_begun_when_the_time_is_up(measured, tmp_path, capsys):
    assert run(tmp_path, "--networks", "resnet20", "--minutes", "-1") == 0
    assert measured == []
    assert "left out: resnet20-batch200: the -1 minutes were up" in capsys.readouterr().out


def test_what_was_measured_is_kept_when_the_time_is_up(measured, tmp_path):
    assert run(tmp_path, "--networks", "resnet20") == 0
    assert run(tmp_path, "--networks", "resnet20", "resnet18", "--resume", "--minutes", "-1") == 0
    suite = json.loads((tmp_path / "suite.json").read_text())
    assert list(suite["cells"]) == ["resnet20-batch200"]
    assert list(suite["left_out"]) == ["resnet18-batch16", "resnet18-batch64"]


def test_without_matplotlib_the_figures_remain(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(tmp_path, "--networks", "resnet20") == 0
    assert "no picture was drawn" in capsys.readouterr().err
    assert (tmp_path / "suite.json").exists()


@pytest.mark.parametrize("option", ["--batch", "--image-size", "--iterations"])
def test_counts_begin_at_one(tmp_path, capsys, option):
    with pytest.raises(SystemExit):
        run(tmp_path, option, "0")
    assert f"{option} is 0; allowed is 1 or more" in capsys.readouterr().err
