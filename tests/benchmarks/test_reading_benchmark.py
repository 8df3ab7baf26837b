"""The reading benchmark's decoder prepares images as the package does, and both read all of them."""

import json

import numpy as np
import torch

from benchmarks import reading
from gdfq.data import load_dataset


def test_decoder_and_evaluation(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "DIFFERENT", 3)
    reading.make_folder(tmp_path / "images", 5)
    images = load_dataset(tmp_path / "images", image_size=224)
    assert len(images) == 5
    decoded, asarray = [], np.asarray
    monkeypatch.setattr(np, "asarray", lambda image: decoded.append(asarray(image)))
    reading.decode(images.files[:3])
    monkeypatch.setattr(np, "asarray", asarray)
    for number, pixels in enumerate(decoded):
        assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), images.pixels(number))
    arguments = ["--images", "4", "--workers", "2", "--rounds", "1", "--out", str(tmp_path / "reading.json")]
    threads = torch.get_num_threads()
    assert reading.main(arguments) == 0
    torch.set_num_threads(threads)
    result = json.loads((tmp_path / "reading.json").read_text())
    assert result["arguments"]["workers"] == 2
    assert result["ratio"].keys() == {"clock", "cpu"}
    assert len(result["seconds"]) == 1
    assert "of the decoder's speed by the clock" in capsys.readouterr().out
