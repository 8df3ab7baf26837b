"""A network of one's own, written as people write them: functional calls, lambdas, and shortcuts without parameters.

    gdfq quantize --model examples/custom_resnet20.py:resnet20 --weights WEIGHTS ...

Nothing here knows of gdfq. The network is the CIFAR ResNet-20 of He et al. (2016) with option A shortcuts: where the
width grows, the shortcut takes every second pixel and fills the new channels with zeros.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Shortcut(nn.Module):
    """Calls a function, so that a lambda can stand in the network as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut: `(N, in, H, W)` to `(N, out, H / stride, W / stride)`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Sequential()
        else:
            before = (out_channels - in_channels) // 2
            after = out_channels - in_channels - before
            self.shortcut = Shortcut(lambda x: F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, after)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """Images `(N, 3, 32, 32)` to logits `(N, num_classes)`."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.avg_pool2d(x, x.shape[3])
        return self.linear(x.view(x.shape[0], -1))


def resnet20(num_classes: int = 10) -> ResNet20:
    """The factory that `examples/custom_resnet20.py:resnet20` names."""
    return ResNet20(num_classes)
