"""The shipped network and images are what the documentation says they are."""

import gzip
import hashlib
import importlib.util
import struct
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from gdfq import demo
from gdfq.evaluate import evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_resnet20.py"


@pytest.fixture
def example():
    specification = importlib.util.spec_from_file_location("custom_resnet20", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("t10k-images-idx3-ubyte", "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels-idx1-ubyte", "bb300cfdad3c16e7a12a480ee83cd310"),
    ],
)
def test_images_are_fashion_mnist(name, published):
    """Debian's files differ from the published ones in the gzip header alone: it lost the name and the first date."""
    shipped = (demo.FOLDER / f"{name}.gz").read_bytes()
    has_name, made = 8, 1504176627  # 31 August 2017
    header = struct.pack("<BBBBIBB", 0x1F, 0x8B, 8, has_name, made, 0, 3) + name.encode() + b"\0"
    assert hashlib.md5(header + shipped[10:]).hexdigest() == published


def test_test_set():
    dataset = demo.test_set()
    assert len(dataset) == 10_000
    assert dataset.classes == demo.CLASSES
    assert torch.bincount(dataset.labels).tolist() == [1000] * 10
    raw = gzip.decompress((demo.FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes())
    image = torch.tensor(list(raw[16 + 784 * 7 : 16 + 784 * 8])).view(1, 28, 28)
    torch.testing.assert_close(dataset[7][0], (image / 255 - 0.2860) / 0.3530)


def test_licence_is_beside_the_images():
    text = (demo.FOLDER / "LICENSE.fashion-mnist").read_text()
    assert "Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


def test_teacher_is_as_good_as_stated():
    teacher = demo.teacher()
    assert not teacher.training
    assert teacher(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    result = evaluate(teacher, Subset(demo.test_set(), range(2000)))
    assert result.top1 > 92
    assert result.top5 > 99


def test_custom_example_has_the_stated_state_dict(example):
    model = example.resnet20().eval()
    modules = {name.rpartition(".")[0] for name in model.state_dict()}
    blocks = {
        f"layer{stage}.{block}.{part}"
        for stage in (1, 2, 3)
        for block in range(3)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert modules == {"conv1", "bn1", "linear"} | blocks
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("stride", [1, 2])
def test_custom_example_shortcut_subsamples_and_pads(example, stride):
    x = torch.randn(2, 4, 6, 6)
    y = example.Block(4, 10, stride).shortcut(x)
    assert torch.equal(y[:, 3:7], x[:, :, ::stride, ::stride])
    assert y.shape[1] == 10
    assert not y[:, :3].any()
    assert not y[:, 7:].any()
