"""The networks of the paper's two generators: noise and a label in, an image of that class out (Eq. 2, 3).

Images leave through a BatchNorm, so that every channel has the mean and the standard deviation that the model's images
have: 0 and 1 where it was trained on standardized pixels.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdfq_ext
from gdfq import ranks
from gdfq.config import GeneratorConfig
from gdfq.graph import Pixels
from gdfq.nn import batch_norm_of_all_ranks


class ConditionalBatchNorm(nn.Module):
    """BatchNorm whose gamma and beta are looked up by label (categorical conditional BN), and LeakyReLU behind it.

    Args:
        channels: C.
        num_classes: rows of the two tables, `(num_classes, C)`; gamma starts at one, beta at zero. With one class it is
            the ordinary BN.
        eps, momentum: as in BatchNorm.
        negative_slope: of LeakyReLU; 1 for no activation.
    """

    def __init__(
        self, channels: int, num_classes: int, eps: float = 1e-5, momentum: float = 0.1, negative_slope: float = 1.0
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_classes, channels))
        self.beta = nn.Parameter(torch.zeros(num_classes, channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = eps
        self.momentum = momentum
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training and ranks.count() == 1:
            return gdfq_ext.conditional_batch_norm_act(
                x, self.gamma, self.beta, labels, self.running_mean, self.running_var,
                momentum=self.momentum, eps=self.eps, negative_slope=self.negative_slope,
            )  # fmt: skip
        gamma, beta = (F.embedding(labels, table)[:, :, None, None] for table in (self.gamma, self.beta))
        if self.training:
            x = batch_norm_of_all_ranks(x, self.running_mean, self.running_var, self.momentum, self.eps)
        else:
            x = F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return F.leaky_relu(torch.addcmul(beta, x, gamma), self.negative_slope)

    def extra_repr(self) -> str:
        classes, channels = self.gamma.shape
        return f"{channels}, num_classes={classes}, eps={self.eps}, negative_slope={self.negative_slope}"


class UpsampledConvolution(nn.Conv2d):
    """Nearest up-sampling by 2 and a 3x3 convolution with padding 1, computed in one go.

    Every output pixel sees 2 x 2 pixels of the small grid, each through the sum of the weights that fall on it. So the
    pair is a transposed convolution of stride 2 whose 4x4 kernel holds these sums: 4/9 of the arithmetic, forward and
    backward, and no large copy of the input. Equal to the pair up to rounding; the parameters are the 3x3 ones.

    Args:
        in_channels, out_channels: as in `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.weight, (1, 1, 1, 1))
        rows = padded[:, :, :-1] + padded[:, :, 1:]
        sums = rows[:, :, :, :-1] + rows[:, :, :, 1:]
        return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), self.bias, stride=2, padding=1)


class ToPixels(nn.BatchNorm2d):
    """BatchNorm without parameters, and then the scale of the model's images.

    Args:
        channels: C.
        pixels: mean and standard deviation of each.
        learned: whether G's training moves both.
    """

    def __init__(self, channels: int, pixels: Pixels, learned: bool) -> None:
        super().__init__(channels, affine=False)
        mean, std = pixels.tensors()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.standardized = set(pixels.mean) == {0.0} and set(pixels.std) == {1.0}
        self.shift = self.log_gain = None
        if learned:
            self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
            self.log_gain = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        standard = x = self._standardized(x)
        if self.shift is not None and self.log_gain is not None:
            x = x * self.log_gain.exp() + self.shift
        if not self.standardized:
            x = x * self.std + self.mean
        return x.to(standard.dtype)

    def _standardized(self, x: Tensor) -> Tensor:
        if not self.training or ranks.count() == 1:
            return super().forward(x)
        self.num_batches_tracked += 1
        return batch_norm_of_all_ranks(x, self.running_mean, self.running_var, self.momentum, self.eps)


LARGEST_START = 64  # side of the grid that G starts at; the paper's for 224 pixels is 56


class Generator(nn.Module):
    """Linear -> BN -> Up2 -> Conv 128 -> BN -> LeakyReLU -> Up2 -> Conv 64 -> BN -> LeakyReLU -> Conv -> Tanh -> BN.

    For images of more than 256 pixels there are further stages Up2 -> Conv -> BN -> LeakyReLU, each of half the
    channels, so that no layer has more parameters for a larger image.

    `generator(noise, labels)`: noise `(N, latent_size)` float32, labels `(N,)` int64, gives `(N, channels, height,
    width)` float32. Its state does not depend on the batch.

    Args:
        image_shape: `(channels, height, width)`, any size: the grid starts at a quarter, rounded up, and is cropped;
            beyond 256 pixels at the 8th, 16th ... part that is at most 64 x 64.
        num_classes: labels are below it.
        pixels: the scale of the images, see `ToPixels`; default: standardized.
        config: `architecture` is `embedding` (the noise is multiplied by an embedding of the label; the paper's for
            CIFAR) or `conditional` (the BNs are conditional on the label; the paper's for ImageNet).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        config: GeneratorConfig,
        pixels: Pixels | None = None,
    ) -> None:
        super().__init__()
        channels, self.height, self.width = image_shape
        self.conditional = config.architecture == "conditional"
        stages = max(2, math.ceil(math.log2(max(self.height, self.width) / LARGEST_START)))
        self.start = (math.ceil(self.height / 2**stages), math.ceil(self.width / 2**stages))

        norm_classes, eps = num_classes if self.conditional else 1, config.batch_norm_eps

        self.embedding = None if self.conditional else nn.Embedding(num_classes, config.latent_size)
        self.linear = nn.Linear(config.latent_size, 128 * math.prod(self.start))
        self.norm0 = ConditionalBatchNorm(128, norm_classes)
        self.conv1 = UpsampledConvolution(128, 128)
        self.norm1 = ConditionalBatchNorm(128, norm_classes, eps, negative_slope=0.2)
        self.conv2 = UpsampledConvolution(128, 64)
        self.norm2 = ConditionalBatchNorm(64, norm_classes, eps, negative_slope=0.2)
        widths = [max(64 >> number, 16) for number in range(stages - 1)]
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv": UpsampledConvolution(before, after),
                    "norm": ConditionalBatchNorm(after, norm_classes, eps, negative_slope=0.2),
                }
            )
            for before, after in itertools.pairwise(widths)
        )
        self.conv3 = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.to_pixels = ToPixels(channels, pixels or Pixels.standardized(channels), config.learn_scale)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            noise = noise * self.embedding(labels)
            labels = torch.zeros_like(labels)  # to the BNs all are of one class
        return self.decode(noise, labels)

    def decode(self, noise: Tensor, labels: Tensor) -> Tensor:
        """All behind the embedding: `(N, latent_size)` and the rows `(N,)` of the BNs' tables, to images."""
        x = self.linear(noise).view(len(noise), 128, *self.start)
        x = x.contiguous(memory_format=_memory_format(self.conv1))
        x = self.norm0(x, labels)
        x = self.norm1(self.conv1(x), labels)
        x = self.norm2(self.conv2(x), labels)
        for stage in self.stages:
            x = stage["norm"](stage["conv"](x), labels)
        x = torch.tanh(self.conv3(x)[:, :, : self.height, : self.width])
        return self.to_pixels(x)


def _memory_format(convolution: nn.Conv2d) -> torch.memory_format:
    """The layout that the convolution's weight is in, so that `.to(memory_format=...)` decides for the images too."""
    weight = convolution.weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
