"""Small networks with everything that users write: for tests that need a model and not its accuracy."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from gdfq.graph import CapturedModel, Pixels, capture


def randomize_batch_norm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BN layers statistics and parameters that are not the identity, and switch to eval mode."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.2, generator=random)
                nn.init.normal_(module.bias, 0, 0.2, generator=random)
    return model.eval()


@torch.no_grad()
def remembering(images: torch.Tensor) -> nn.Module:
    """A `Residual`, in eval mode, whose BN statistics are those of the images."""
    model = Residual().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model(images)
    return model.eval()


@functools.cache
def capture_once(
    make: Callable[[], nn.Module], size: int | None = None, device: torch.device | str = "cpu"
) -> CapturedModel:
    """`make()` with such a BN, captured: it takes a second, and whatever is built of it is a copy. Random numbers that
    are drawn afterwards are those without it."""
    with torch.random.fork_rng(), torch.inference_mode(False):  # whoever asks first
        torch.manual_seed(0)
        return capture(randomize_batch_norm(make()), size, device=device)


PIXELS = Pixels.around((0.3, -0.2, 0.1), (0.5, 0.6, 0.4), "set")


def capture_remembering_smooth_images() -> CapturedModel:
    """That of smooth images, whose pixels are `PIXELS`."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(500, 3, 3, 3), (8, 8), mode="bilinear")
    return replace(capture(remembering(PIXELS.scaled(1.6 * smooth))), pixels=PIXELS)


class Plain(nn.Module):
    """conv, BN, ReLU, pool, linear: 3 x 8 x 8 images, 5 classes. `in_size` is what pytorchcv's models have."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """Functional relu, a lambda shortcut with F.pad, in-place operators, one activation module used three times."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn3 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.bn4 = nn.BatchNorm2d(16, affine=False)
        self.shortcut = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        self.act = nn.ReLU6(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += self.shortcut(x)
        y = self.act(y)
        y = self.act(self.bn3(self.depthwise(y)))
        y = self.act(self.bn4(self.grouped(y)))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        return self.fc(self.dropout(y))


class TwoHeads(nn.Module):
    """One convolution whose output goes through two BNs, and a max pool between a ReLU and the next convolution."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(8)
        self.bn_b = nn.BatchNorm2d(8)
        self.next = nn.Conv2d(16, 8, 3)
        self.bn = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.conv(x)
        x = torch.cat([F.relu(self.bn_a(x)), F.relu6(self.bn_b(x))], 1)
        x = self.next(F.max_pool2d(x, 2)).mean((2, 3))
        return self.fc(self.bn(x).clamp(min=0))


class Unusual(nn.Module):
    """Channels picked by index, writing into slices, a Conv3d over the channels, one convolution under two names."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.again = self.twice
        self.over_channels = nn.Conv3d(1, 1, (4, 1, 1), stride=(2, 1, 1))
        self.register_buffer("order", torch.arange(8))
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = self.twice(x.index_select(1, (self.order + 3) % 8))
        y = torch.zeros(x.shape)
        y[:, :4] = x[:, 4:]
        y[:, 4:] = x[:, :1]
        x = self.again(y)
        return self.fc(self.over_channels(x.unsqueeze(1)).mean((1, 3, 4)))
