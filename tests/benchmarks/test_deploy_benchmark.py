"""The benchmark of files, on the network that is there in no time."""

import json

import pytest

from benchmarks import deploy


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
