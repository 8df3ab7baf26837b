import textwrap

import pytest
import torch

NETWORK = """
    import torch
    from torch import nn

    CONSTANT = 3
    INSTANCE = nn.Linear(1, 1)


    def network(classes=4):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, classes))

    def broken():
        raise ValueError("no such width")

    def text():
        return "a network"
"""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def network_file(tmp_path):
    path = tmp_path / "my_network.py"
    path.write_text(textwrap.dedent(NETWORK))
    return path


@pytest.fixture
def spec(network_file):
    return f"{network_file}:network"
