"""Small stand-ins for what the experiments need."""

import numpy as np
import pytest
from safetensors.torch import save_file
from small_models import randomize_batch_norm
from torch.utils.data import Subset

from gdfq import demo
from gdfq.models import load_model
from gdfq.reproduce import sources


@pytest.fixture
def few_shipped_images(monkeypatch):
    """50 of the shipped images, 30 of them for training."""
    images = demo.test_set()
    monkeypatch.setattr(sources, "test_set", lambda: Subset(images, range(50)))
    monkeypatch.setattr(sources, "SHIPPED_FOR_TRAINING", 30)


@pytest.fixture
def cifar10(tmp_path):
    """A folder in the layout of CIFAR-10's binary version: 20 random images to test on, and 6 in each training file."""
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for name, count in (("test_batch", 20), *((f"data_batch_{number}", 6) for number in range(1, 6))):
        records = random.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def resnet20_weights(tmp_path):
    """A file of random weights for pytorchcv's ResNet-20."""
    path = tmp_path / "resnet20.safetensors"
    save_file(randomize_batch_norm(load_model("pytorchcv:resnet20_cifar10")).state_dict(), path)
    return path
