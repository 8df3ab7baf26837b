"""The memory check finds a leak, and training has none."""

import json
from mmap import MAP_PRIVATE, mmap

import pytest

from benchmarks import memory
from gdfq.errors import GdfqError


@pytest.mark.slow
def test_training_stays_flat(tmp_path, capsys):
    out = tmp_path / "memory.json"
    sizes = ["--iterations", "120", "--every", "20", "--from-iteration", "60", "--limit-mb", "4"]
    assert memory.main([*sizes, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"machine", "threads", "torch", "gdfq_commit", "arguments"} <= result.keys()
    assert [sample["iteration"] for sample in result["samples"]] == [20, 40, 60, 80, 100, 120]
    assert (result["from_iteration"], result["to_iteration"]) == (60, 120)
    assert result["growth_mb"]["process_mb"] < 4
    assert "MB per 1000 iterations" in capsys.readouterr().out


def test_leak_is_found():
    leak = []

    def lose():
        leak.append(mmap(-1, 4_000_000, MAP_PRIVATE))  # new memory: torch could take what earlier tests have freed
        leak[-1].write(b"1" * 4_000_000)

    result = memory.measure(memory.new_trainer(60, batch=4), 10, 30, lose)
    assert 110 < result["growth_mb"]["process_mb"] < 130
    assert 3667 < result["growth_mb_per_1000_iterations"]["process_mb"] < 4333
    (problem,) = memory.exceeded(result["growth_mb"], 8)
    assert problem.startswith("process grew by")


def test_exit_code_tells_of_growth(monkeypatch, capsys):
    grown = {"samples": [], "from_iteration": 100, "to_iteration": 200}
    grown |= {"growth_mb": {"process_mb": 9.0}, "growth_mb_per_1000_iterations": {"process_mb": 90.0}}
    monkeypatch.setattr(memory, "measure", lambda *_: grown)
    assert memory.main(["--iterations", "10"]) == 1
    assert "process grew by 9.0 MB, allowed are 8 MB" in capsys.readouterr().err


def test_too_few_samples_are_no_result():
    with pytest.raises(GdfqError, match="leave 0 samples"):
        memory.measure(memory.new_trainer(10, batch=4), 10, 100)
