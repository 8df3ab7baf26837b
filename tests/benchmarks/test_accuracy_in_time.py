"""As many iterations as fit: what is planned for the time that is given, and what is said of it."""

import json
import math

import pytest

from benchmarks import accuracy_in_time as benchmark


@pytest.mark.parametrize(("seconds", "milliseconds"), [(200, 5.0), (60, 20.0)])
def test_the_schedule_fills_the_time(tmp_path, monkeypatch, seconds, milliseconds):
    given = {}

    def train(what, run, left, settings):
        given.update(settings, left=left, run=run)
        return 130

    top1 = {"float": 80.0, "quantized": 70.0}
    monkeypatch.setattr(benchmark, "milliseconds_of_an_iteration", lambda *arguments: milliseconds)
    monkeypatch.setattr(benchmark, "train", train)
    monkeypatch.setattr(benchmark, "evaluated", lambda *_: {"iterations": 7, "seconds": 3.0, "top1": top1})
    out = tmp_path / "result.json"
    assert benchmark.main(["--seconds", str(seconds), "--run", str(tmp_path / "run"), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["top1"] == top1
    assert result["planned_iterations"] == 15 * given["schedule.iterations"]
    # The evaluation and twice the time that a process needs to start are kept free, and a tenth of the rest.
    kept = min(20, seconds / 4)
    assert seconds - kept - 15 < given["left"] <= seconds - kept - 6
    most = 0.9 * (given["left"] - 6) * 1e3 / milliseconds
    assert math.isclose(result["planned_iterations"], most, rel_tol=0.2)
    assert result["planned_iterations"] <= most


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (130, 0), (-9, 1), (2, 1)])
def test_only_a_run_that_ended_or_saved_counts(tmp_path, monkeypatch, code, expected):
    monkeypatch.setattr(benchmark, "milliseconds_of_an_iteration", lambda *arguments: 5.0)
    monkeypatch.setattr(benchmark, "train", lambda *arguments: code)
    top1 = {"float": 80.0, "quantized": 70.0}
    monkeypatch.setattr(benchmark, "evaluated", lambda *_: {"iterations": 7, "seconds": 3.0, "top1": top1})
    arguments = ["--seconds", "9", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out.json")]
    assert benchmark.main(arguments) == expected
