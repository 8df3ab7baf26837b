"""Rows of the accuracy benchmark: what is measured again is replaced, banks are made once, means are over seeds."""

import json

import pytest
from torch.utils.data import Subset

from benchmarks import accuracy

SHORT = [
    f"--set={setting}"
    for setting in (
        "inversion.images=8",
        "inversion.iterations=1",
        "reconstruction.iterations=1",
        "reconstruction.finetune_iterations=1",
        "run.cuda_graph=false",
    )
]


@pytest.mark.slow
def test_rows_and_banks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "images_of", lambda what, cifar, training: ("test", Subset(what.images, range(64))))

    def measured(*arguments):
        banks, out = tmp_path / "banks", tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", ["accuracy", f"--banks={banks}", f"--out={out}", *SHORT, *arguments])
        accuracy.main()
        return json.loads(out.read_text())["rows"]

    (first,) = measured("--bits", "4:4")
    assert (first["bank"], first["bits"], first["preset"]) == ("made", "W4A4", "cifar")
    again, other = measured("--bits", "4:4", "8:8")
    assert (again["bank"], other["bank"]) == ("read", "read")
    assert again["top1"] == first["top1"], "the same images, the same result"
    assert len(measured("--methods", "minmax")) == 3
    assert "W8A8, onnx, cifar, inversion.images=8" in capsys.readouterr().out


def test_means_are_over_seeds():
    row = {
        "network": "a", "images": "test", "method": "m", "bits": "W4A4", "target": "onnx", "preset": "cifar",
        "effort": "fast", "settings": {}, "float": 90.0, "seconds": 10.0,
    }  # fmt: skip
    text = accuracy.table([row | {"seed": 0, "top1": 80.0}, row | {"seed": 1, "top1": 81.0, "seconds": 20.0}])
    assert text.splitlines()[-1] == "| a, test, m, W4A4, onnx, cifar, fast | 90.00 | 80.50 | 80.00, 81.00 | 15 |"
