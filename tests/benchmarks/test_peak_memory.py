"""Which points are measured, and the table; measuring itself is the step benchmark's."""

import json
import os

from benchmarks import peak_memory, step


def test_files_and_table(tmp_path, monkeypatch, capsys):
    def measure(task, plan):
        (provider,) = plan.providers
        assert os.environ["MALLOC_MMAP_THRESHOLD_"]
        return {"providers": {provider: {"peak_memory_mb": 100.0 + task.batch * (5 - 2 * (provider != "ours"))}}}

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = ["--out", str(tmp_path), "--networks", "resnet20", "--batches", "10", "20"]
    assert peak_memory.main(arguments) == 0
    result = json.loads((tmp_path / "peak_memory.json").read_text())
    assert result["peak_memory_mb"] == {
        "resnet20": {
            "10": {"ours": 150.0, "ours-checkpointing": 130.0},
            "20": {"ours": 200.0, "ours-checkpointing": 160.0},
        }
    }
    assert capsys.readouterr().out.splitlines()[-1].split() == ["20", "200", "160", "40"]

    def broken(task, plan):
        raise RuntimeError("ours: OutOfMemoryError")

    monkeypatch.setattr(step, "measure", broken)
    assert peak_memory.main(arguments) == 1
    assert "ours: OutOfMemoryError" in capsys.readouterr().err
