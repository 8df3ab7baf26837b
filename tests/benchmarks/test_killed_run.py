"""Two runs are compared by what their checkpoints hold."""

import pytest
import torch

from benchmarks import killed_run
from gdfq.run import folder as run_folder
from gdfq.run.files import save_tensors


@pytest.mark.parametrize(
    ("change", "equal", "difference"), [(0.0, True, 0.0), (0.5, False, 0.125), (torch.nan, False, torch.nan)]
)
def test_difference(tmp_path, change, equal, difference):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tensors = {
        "weight": torch.tensor([4.0, -1.0]),
        "a": torch.zeros(3),
        "count": torch.tensor(5),
        "none": torch.empty(0),
    }
    save_tensors(whole / run_folder.CHECKPOINT, tensors)
    save_tensors(killed / run_folder.CHECKPOINT, tensors | {"weight": torch.tensor([4.0, -1.0 + change])})
    assert killed_run.difference(killed, whole) == (equal, pytest.approx(difference, nan_ok=True))
