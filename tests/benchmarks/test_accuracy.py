"""Rows of the accuracy benchmark: what is measured again is replaced, banks are made once, means are over seeds."""

import argparse
import json
from pathlib import Path

import pytest

import gdfq
from benchmarks import accuracy

SHORT = [
    "--test-images=64",
    *(
        f"--set={setting}"
        for setting in (
            "inversion.images=8",
            "inversion.iterations=1",
            "reconstruction.iterations=1",
            "reconstruction.finetune_iterations=1",
            "run.cuda_graph=false",
        )
    ),
]


@pytest.mark.long
def test_rows_and_banks(tmp_path, monkeypatch, capsys):
    def measured(*arguments):
        banks, out = tmp_path / "banks", tmp_path / "out.json"
        monkeypatch.setattr("sys.argv", ["accuracy", f"--banks={banks}", f"--out={out}", *SHORT, *arguments])
        accuracy.main()
        return json.loads(out.read_text())["rows"]

    (first,) = measured("--bits", "4:4")
    assert (first["bank"], first["bits"], first["preset"]) == ("made", "W4A4", "cifar")
    assert first["images"] == "64 of test"
    again, other = sorted(measured("--bits", "4:4", "8:8", "--jobs", "2"), key=lambda row: row["bits"])
    assert (again["bank"], other["bank"]) == ("read", "read")
    assert again["top1"] == first["top1"], "the same images, the same result"
    assert again["as_float"]["kl"] > other["as_float"]["kl"] > 0
    assert "W8A8, onnx, cifar, inversion.images=8" in capsys.readouterr().out


def test_a_bank_of_other_settings_is_another():
    args = argparse.Namespace(banks=Path("banks"), cifar=None, effort="fast")
    bank = accuracy.bank_of(args, "demo", {}, 0)
    assert bank == accuracy.bank_of(args, "demo", {"reconstruction.keep": 0.0}, 0)
    others = [accuracy.bank_of(args, "demo", {"inversion.images": 64}, 0), accuracy.bank_of(args, "demo", {}, 1)]
    assert len({bank, *others, accuracy.bank_of(args, "cifar", {}, 0)}) == 4


def test_means_are_over_seeds():
    row = {
        "network": "a", "images": "test", "method": "m", "bits": "W4A4", "target": "onnx", "preset": "cifar",
        "effort": "fast", "settings": {}, "float": 90.0, "seconds": 10.0,
        "peak_gib": 0.5, "bank": "read",
    }  # fmt: skip
    made = row | {"seed": 1, "top1": 81.0, "seconds": 20.0, "bank": "made", "as_float": {"kl": 0.25}}
    text = accuracy.table([row | {"seed": 0, "top1": 80.0}, made])
    figures = "90.00 | 80.50 | 80.00, 81.00 | 0.2500 | 15 (1 with the bank) | 0.50"
    assert text.splitlines()[-1] == f"| a, test, m, W4A4, onnx, cifar, fast | {figures} |"


def test_each_thing_of_the_ablation_is_a_setting():
    default = gdfq.Config.load("cifar", {})
    configs = [gdfq.Config.load("cifar", variant) for variant in accuracy.ABLATION]
    assert configs[0] == default
    assert len({config.model_dump_json() for config in configs}) == len(configs)
