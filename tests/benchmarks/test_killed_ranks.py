"""Ranks are killed at random moments, in earnest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import killed_ranks
from gdfq.run import folder as run_folder
from gdfq.run.files import save_tensors

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_two_kills(tmp_path):
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.killed_ranks", "--kills", "2", "--iterations", "40", "--out", path]
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    result = json.loads(path.read_text())
    assert len(result["kills"]) == 2
    assert result["runs"] == len(result["apart"]) >= 1
    assert result["most_lost"] <= killed_ranks.CHECKPOINT_EVERY


def test_distance(tmp_path):
    tensors = {"weight": torch.tensor([3.0, 4.0]), "count": torch.tensor(7), "best": torch.tensor(torch.nan)}
    save_tensors(tmp_path / "whole" / run_folder.CHECKPOINT, tensors)
    changed = tensors | {"weight": torch.tensor([3.0, 4.5]), "count": torch.tensor(8)}
    save_tensors(tmp_path / "killed" / run_folder.CHECKPOINT, changed)
    assert killed_ranks.distance(tmp_path / "killed", tmp_path / "whole") == pytest.approx(0.1)


def test_of_a_run_without_a_checkpoint_nothing_is_saved(tmp_path):
    assert killed_ranks.saved(tmp_path) == 0
