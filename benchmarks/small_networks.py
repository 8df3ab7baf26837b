"""Small networks, trained here on Fashion-MNIST in the pixels that people train on: what becomes of them is measured.

All of the package's 10,000 images take part: 8,000 train a network, the other 2,000 judge what was made of it. Nothing
is chosen by the latter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from gdfq.demo import FASHION_MNIST_MEAN, FASHION_MNIST_STD, test_set
from gdfq.evaluate import evaluate

SIZE = 28
TRAINING = 8000
_BGR = torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)


@dataclass(frozen=True)
class Pixels:
    """How images come to a network: `outside(pixels)` of 0..1, `(N, 1, H, W)`, and what the network does first."""

    outside: Callable[[Tensor], Tensor]
    inside: Callable[[Tensor], Tensor] = lambda x: x
    channels: int = 1


def standardized(x: Tensor) -> Tensor:
    return (x - FASHION_MNIST_MEAN) / FASHION_MNIST_STD


PIXELS = {
    "standardized": Pixels(standardized),
    "0..1": Pixels(lambda x: x),
    "0..255": Pixels(lambda x: 255 * x),
    "BGR minus mean": Pixels(lambda x: 255 * x.expand(-1, 3, -1, -1) - _BGR, channels=3),
    "standardized inside": Pixels(lambda x: x, standardized),
}


class Network(nn.Module):
    """Five convolutions with BN and ReLU, the mean of the last maps, a linear layer."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.inside = pixels.inside
        widths = ((pixels.channels, 12, 1), (12, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1))
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
                for before, after, stride in widths
            )
        )
        self.linear = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(self.inside(x)).mean((2, 3)))


def images(name: str) -> tuple[TensorDataset, TensorDataset]:
    """Those that train, and those that judge."""
    stored = test_set()
    x, y = PIXELS[name].outside(stored.images.float() / 255), stored.labels
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split((TRAINING, len(y) - TRAINING))
    return TensorDataset(x[order[0]], y[order[0]]), TensorDataset(x[order[1]], y[order[1]])


def trained(name: str, seed: int) -> nn.Module:
    """Six epochs of SGD; about 86% on the images that judge. In eval mode."""
    torch.manual_seed(seed)
    network = Network(PIXELS[name])
    x, y = images(name)[0].tensors
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6 * len(x) // 100)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(100):
            loss = F.cross_entropy(network(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def top1(model: nn.Module, name: str) -> float:
    """On the images that judge."""
    return evaluate(model, images(name)[1]).top1
