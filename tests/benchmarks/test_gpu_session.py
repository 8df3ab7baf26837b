"""The script of a visit to a GPU machine, at the smallest size on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_session.sh"


def session(*arguments, **environment) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables)


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = session(tmp_path / "visit", "--dry-run")
    summary = (tmp_path / "visit" / "summary.txt").read_text()
    assert done.returncode == 0, summary
    for stage in (
        "environment", "build", "bench", "bench-more", "step-resnet18", "step-resnet20", "every-op-once",
        "step-resnet20-compile", "step-suite",
    ):  # fmt: skip
        assert f"\n{stage}: ok" in "\n" + summary
    results = ["bench/results", "bench-more/results", "suite/resnet20-batch4", "suite/suite", "step-resnet20-compile"]
    for name in results:
        assert json.loads((tmp_path / "visit" / f"{name}.json").read_text())["torch"]
    # The first stages' results are kept by the last.
    assert "measured" not in (tmp_path / "visit" / "step-suite.log").read_text()
    assert list(json.loads((tmp_path / "visit" / "suite" / "suite.json").read_text())["cells"]) == ["resnet18-batch2"]


def test_a_failing_stage_stops_none_that_follows(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    done = session(tmp_path / "visit", "--dry-run", PYTHON=str(python))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert next(line for line in lines if "failed with code 3" in line).startswith("environment")
    assert any(line.startswith("every-op-once: failed with code 3") for line in lines)
    assert "step benchmarks: skipped" in done.stdout


def test_usage(tmp_path):
    assert session().returncode != 0
    done = session(tmp_path, "--dryrun")
    assert done.returncode == 2
    assert "usage:" in done.stderr
