"""Rows of the accuracy benchmark: what is measured again is replaced, banks are made once, means are over seeds."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

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
    assert len(measured("--methods", "minmax")) == 3
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
    known = {"as_float": {"kl": 0.25}, "paired_error": 0.3}
    made = row | known | {"seed": 1, "top1": 81.0, "seconds": 20.0, "bank": "made"}
    read = row | {"seed": 0, "top1": 80.0, "as_float": {"kl": 0.75}}
    text = accuracy.table([read, made])
    figures = "90.00 | 80.50 | 80.00, 81.00 |  | 0.5000 | 15 (1 with the bank) | 0.50"
    assert text.splitlines()[-1] == f"| a, test, m, W4A4, onnx, cifar, fast | {figures} |"


def test_networks_are_compared_on_the_same_images():
    """One image in four is lost, and one is won: the difference is 0, each image's is -1, 1, 0 or 0."""
    logits = {
        "p": [[2.0, 1.0], [1.0, 0.0], [3.0, 1.0], [0.0, 4.0]],
        "q": [[1.0, 2.0], [0.0, 1.0], [3.0, 1.0], [0.0, 4.0]],
    }
    labels = [0, 1, 0, 0]

    class Answers(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.register_buffer("answers", torch.tensor(logits[name]))

        def forward(self, x):
            return self.answers[x.long()]

    found = accuracy.compared(Answers("p"), Answers("q"), TensorDataset(torch.arange(4.0), torch.tensor(labels)))
    assert (found["float"], found["top1"]) == (50, 50)
    assert found["paired_error"] == pytest.approx(100 * math.sqrt(2 / 4) / math.sqrt(4))
    # Of two images logits are exchanged, 1 apart: log p - log q = 1 for the greater, -1 for the other.
    kl = 2 * math.tanh(1 / 2) / 4
    assert found["as_float"] == {"top1": 50, "kl": pytest.approx(kl), "images": 4}


def test_each_thing_of_the_ablation_is_a_setting():
    default = gdfq.Config.load("cifar", {})
    configs = [gdfq.Config.load("cifar", variant) for variant in accuracy.ABLATION]
    assert configs[0] == default
    assert len({config.model_dump_json() for config in configs}) == len(configs)
