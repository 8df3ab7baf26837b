"""Small networks from a grammar: a network is its `Spec`, which hypothesis draws and prints."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from small_models import randomize_batch_norm
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Conv:
    """A convolution of the given order with its BN and activation; `groups` 0 is depthwise."""

    channels: int
    kernel: int
    stride: int
    groups: int
    bias: bool
    order: str
    act: str
    weight: str


@dataclass(frozen=True)
class Residual:
    """x + branch(x), where both have x's shape; `in_place`: x += branch(x)."""

    branch: tuple[Conv, ...]
    in_place: bool
    act: str


@dataclass(frozen=True)
class Branches:
    """Concatenation of branches that keep the size; an empty one is x itself."""

    branches: tuple[tuple[Conv, ...], ...]


@dataclass(frozen=True)
class Shared:
    """One convolution block, called twice."""

    conv: Conv


@dataclass(frozen=True)
class Gate:
    """x times a sigmoid of a layer of its mean."""

    bias: bool


@dataclass(frozen=True)
class Function:
    """A function of x by name."""

    name: str


@dataclass(frozen=True)
class Spec:
    size: tuple[int, int]
    image: str
    steps: tuple
    head: str
    seed: int


ACTS = {
    "none": lambda: nn.Identity(),
    "ReLU": lambda: nn.ReLU(),
    "ReLU, in place": lambda: nn.ReLU(inplace=True),
    "relu": lambda: F.relu,
    "relu_": lambda: lambda x: x.clone().relu_(),
    "ReLU6": lambda: nn.ReLU6(inplace=True),
    "clamp_min": lambda: lambda x: x.clamp(min=0),
    "clamp to 6": lambda: lambda x: x.clamp(0, 6),
    "threshold": lambda: lambda x: F.threshold(x, 0, 0),
    "clamp to 2": lambda: lambda x: x.clamp(-1, 2),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "PReLU": lambda: nn.PReLU(init=0.2),
    "hardswish": lambda: F.hardswish,
    "tanh": lambda: torch.tanh,
}
FUNCTIONS = {
    "max pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "max pool, same size": lambda x: F.max_pool2d(x, 3, 1, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "average pool, same size": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, 4),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, (3, 4)),
    "transpose": lambda x: x.permute(0, 1, 3, 2),
    "flip": lambda x: x.flip(3),
    "roll": lambda x: x.roll(1, 2),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "shuffle by view": lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "halves exchanged": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "there and back": lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(x.shape),
    "every other channel twice": lambda x: x[:, ::2].repeat_interleave(2, 1),
    "channels by index": lambda x: x[:, list(range(x.shape[1]))[::-1]],
    "padded": lambda x: F.pad(x, (1, 0, 0, 1)),
    "padded with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "padded, replicate": lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"),
    "cropped": lambda x: x[:, :, 1:],
    "twice as large": lambda x: F.interpolate(x, scale_factor=2),
    "other size": lambda x: F.interpolate(x, size=(5, 6), mode="bilinear", align_corners=False),
    "to pixels and back": lambda x: F.pixel_shuffle(F.pixel_unshuffle(F.interpolate(x, size=(6, 6)), 2), 2),
    "written into": lambda x: torch.zeros_like(x).index_copy(1, torch.tensor([0]), x[:, :1]) + x,
    "scaled in place": lambda x: x.clone().mul_(0.5).add_(0.1),
    "scaled by its size": lambda x: x * (8 / x.shape[3]),
    "otherwise where large": lambda x: x * 2 if x.shape[2] > 12 else x,
    "difference": lambda x: x - x.mean((2, 3), keepdim=True),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}  # fmt: skip
IMAGES = {
    "as it is": lambda x: x,
    "standardized": lambda x: (x - 0.5) / 0.25,
    "standardized in place": lambda x: x.sub_(0.5).div_(0.25),
    "other order": lambda x: x[:, [2, 1, 0]],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "clamped": lambda x: x.clamp(-2, 2),
}
HEADS = {
    "mean": lambda x: x.mean((2, 3)),
    "pool and flatten": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "pool and view": lambda x: F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1),
    "pool and squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
    "pool and squeeze two": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2),
    "max": lambda x: x.amax((2, 3)),
    "sum by size": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "four by four": lambda x: F.adaptive_avg_pool2d(x, 2).reshape(-1, 4 * x.shape[1]),
    "all of it": lambda x: x.reshape(x.shape[0], -1),
}


class Block(nn.Module):
    def __init__(self, channels: int, spec: Conv) -> None:
        super().__init__()
        groups = channels if spec.groups == 0 else spec.groups
        self.conv = nn.Conv2d(
            channels, spec.channels, spec.kernel, spec.stride, spec.kernel // 2, groups=groups, bias=spec.bias
        )
        if spec.weight == "normalized":
            self.conv = parametrizations.weight_norm(self.conv)
        self.functional = spec.weight == "functional"
        self.bn = nn.BatchNorm2d(channels if spec.order.startswith("bn") else spec.channels)
        self.act = ACTS[spec.act]()
        self.order = spec.order.split()

    def forward(self, x):
        for name in self.order:
            if name == "conv" and self.functional:
                conv = self.conv
                x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
            else:
                x = getattr(self, name)(x)
        return x


class Several(nn.Module):
    """Residuals, branches, shared blocks, gates."""

    def __init__(self, channels: int, spec) -> None:
        super().__init__()
        self.spec = spec
        if isinstance(spec, Gate):
            self.layer = nn.Conv2d(channels, channels, 1, bias=spec.bias)
        elif isinstance(spec, Shared):
            self.layer = Block(channels, spec.conv)
        else:
            branches = [spec.branch] if isinstance(spec, Residual) else spec.branches
            self.branches = nn.ModuleList(sequence(channels, branch) for branch in branches)
        self.act = ACTS[spec.act]() if isinstance(spec, Residual) else None

    def forward(self, x):
        if isinstance(self.spec, Gate):
            return x * self.layer(x.mean((2, 3), keepdim=True)).sigmoid()
        if isinstance(self.spec, Shared):
            return self.layer(self.layer(x))
        if isinstance(self.spec, Branches):
            return torch.cat([branch(x) for branch in self.branches], 1)
        y = self.branches[0](x)
        if self.spec.in_place:
            y += x
        else:
            y = x + y
        return self.act(y)


def sequence(channels: int, convs: tuple[Conv, ...]) -> nn.Sequential:
    blocks = []
    for conv in convs:
        blocks.append(Block(channels, conv))
        channels = conv.channels
    return nn.Sequential(*blocks)


class Network(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        layers: list = []
        channels = 8
        for step in spec.steps:
            if isinstance(step, Conv):
                layers.append(Block(channels, step))
            else:
                layers.append(step.name if isinstance(step, Function) else Several(channels, step))
            channels = width(channels, step)
        self.names = [layer if isinstance(layer, str) else "" for layer in layers]
        self.layers = nn.ModuleList(nn.Identity() if isinstance(layer, str) else layer for layer in layers)
        self.eval()
        with torch.no_grad():
            features = self.features(torch.zeros(2, 3, *spec.size))
        self.fc = nn.Linear(features.shape[1], 5)
        randomize_batch_norm(self, spec.seed)

    def features(self, x):
        x = self.stem(IMAGES[self.spec.image](x))
        for name, layer in zip(self.names, self.layers, strict=True):
            x = FUNCTIONS[name](x) if name else layer(x)
        return HEADS[self.spec.head](x)

    def forward(self, x):
        return self.fc(self.features(x))


def width(channels: int, step) -> int:
    if isinstance(step, Conv):
        return step.channels
    if isinstance(step, Branches):
        return sum(branch[-1].channels if branch else channels for branch in step.branches)
    return channels


@st.composite
def convs(draw, channels: int, same: bool = False) -> Conv:
    """One that takes `channels`; `same`: and gives as many, of the same size."""
    groups = draw(st.sampled_from((1, 1, 2, 0)))
    wide = channels if same or groups == 0 else draw(st.sampled_from((4, 8, 12)))
    return Conv(
        wide,
        kernel=draw(st.sampled_from((1, 3))),
        stride=1 if same else draw(st.sampled_from((1, 1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        order=draw(
            st.sampled_from(("conv bn act", "conv bn act", "bn act conv", "conv act bn", "conv act", "conv bn"))
        ),
        act=draw(st.sampled_from(list(ACTS))),
        weight=draw(st.sampled_from(("stored", "stored", "functional", "normalized"))),
    )


@st.composite
def steps(draw, channels: int):
    kind = draw(st.sampled_from(("conv", "conv", "residual", "branches", "shared", "gate", "function", "function")))
    same = convs(channels, same=True)
    if kind == "conv":
        return draw(convs(channels))
    if kind == "residual":
        branch = draw(st.lists(same, min_size=1, max_size=2))
        return Residual(tuple(branch), draw(st.booleans()), draw(st.sampled_from(list(ACTS))))
    if kind == "branches":
        branches = draw(st.lists(st.lists(same, max_size=1).map(tuple), min_size=2, max_size=2))
        return Branches(tuple(branches))
    if kind == "shared":
        return Shared(draw(same))
    if kind == "gate":
        return Gate(draw(st.booleans()))
    return Function(draw(st.sampled_from(list(FUNCTIONS))))


@st.composite
def specs(draw) -> Spec:
    channels, found = 8, []
    for _ in range(draw(st.integers(2, 6))):
        found.append(draw(steps(channels)))
        channels = width(channels, found[-1])
    return Spec(
        size=draw(st.sampled_from(((8, 8), (9, 12), (16, 16)))),
        image=draw(st.sampled_from(list(IMAGES))),
        steps=tuple(found),
        head=draw(st.sampled_from(list(HEADS))),
        seed=draw(st.integers(0, 99)),
    )
