"""The benchmark of files, on the network that is there in no time."""

import json

import pytest
from torch import nn

import gdfq
from benchmarks import deploy
from gdfq.deploy.grids import Grid
from gdfq.graph import build_quantized, capture


def test_averages_of_a_few_codes_cannot_use_all_codes_of_a_quantizer():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3),
        nn.Flatten(), nn.Linear(16, 5),
    ).eval()  # fmt: skip
    student, _ = build_quantized(capture(network, 8, 3), gdfq.Config.load("cifar").quantizer)
    before, after = "activation_quantizers.1.quantizer", "activation_quantizers.3"  # BN with its ReLU; pool
    codes = Grid(step=1.0, zero_point=0, lowest=0, highest=15)  # whose averages are the quarters from 0 to 15
    for step, zero_point, count in ((0.0625, 0, 61), (0.25, 0, 61), (0.3, 100, 51), (1.0, 0, 16)):
        grids = {before: codes, after: Grid(step, zero_point, 0, 255)}
        assert deploy.attainable(student, grids) == {before: 16, after: count}, step


@pytest.mark.long
def test_a_row_says_what_was_found(tmp_path, monkeypatch, capsys):
    arguments = ["--networks", "demonstration", "--bits", "4:4", "--images", "32", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["deploy", *arguments])
    deploy.main()
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    verification = found["verification"]
    assert (found["network"], found["bits"], found["counts"]) == ("demonstration", "W4A4", True)
    assert verification["argmax"]["synthetic"] == {"equal": 32, "images": 32, "classes": found["classes_seen"]}
    assert not any(check["wrong"] for check in verification["layers"].values())
    assert "| demonstration, W4A4 | 21 of 21, 1 of 1, 9 of 9, 1 of 1, - | 0 / " in capsys.readouterr().out
