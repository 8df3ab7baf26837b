"""The main job end to end on real images, with an accuracy floor: with the native kernels and in pure PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_shipped_model_to_four_bits(kernels, tmp_path):
    """A third of the demonstration. The floor is what min-max calibration on noise does not reach."""
    short = ["schedule.epochs=5", "schedule.iterations=50", "schedule.warmup_epochs=3", "schedule.milestones=[4]"]
    command = [sys.executable, "-m", "gdfq", "quantize", "--model", "gdfq.demo:teacher", "--preset", "demo"]
    command += ["--method", "gdfq", "--out", str(tmp_path / "run"), "--data", "fashion-mnist", "--json"]
    command += [f"--set={setting}" for setting in short]
    path = os.pathsep.join(map(str, (ROOT / "python", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "GDFQ_EXT": kernels}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["top1"]["float"] == pytest.approx(94.17, abs=0.02)
    assert report["top1"]["quantized"] > 88
    assert {entry["bits"] for entry in report["summary"]["weights"]} == {4}
