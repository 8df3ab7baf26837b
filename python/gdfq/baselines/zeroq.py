"""ZeroQ (Cai et al., CVPR 2020): images optimised from noise until the BN statistics fit; no labels, no training."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import trange

import gdfq_ext
from gdfq.baselines.images import SyntheticImages
from gdfq.config import Config, ZeroqConfig
from gdfq.graph import Teacher


def zeroq(
    teacher: Teacher, shape: tuple[int, int, int], config: Config, device: torch.device, progress: bool = False
) -> SyntheticImages:
    """Distilled images of `shape`, one batch of them to calibrate on, and one held out."""

    def batches(seed: int) -> Iterator[Tensor]:
        yield distill(teacher, shape, config.zeroq, seed, device, progress)

    return SyntheticImages(batches(config.run.seed), batches(config.run.seed + 1))


@torch.enable_grad()  # images may be made when a calibration asks for them, which itself needs no gradients
def distill(
    teacher: Teacher,
    shape: tuple[int, int, int],
    config: ZeroqConfig,
    seed: int,
    device: torch.device,
    progress: bool = False,
) -> Tensor:
    """Images `(config.images, *shape)` that minimise, over the image itself and all BN inputs l,

        sum_l |mean_l - mu_l|^2 + |std_l - sigma_l|^2        (ZeroQ, Eq. 3; per channel means of the squares)

    with mu, sigma the running statistics, and 0, 1 for the image, which is in normalised pixels.
    """
    random = torch.Generator(device).manual_seed(seed)
    images = torch.randn(config.images, *shape, generator=random, device=device)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(True)
    optimizer = torch.optim.Adam([images], config.learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=100)
    zero, one = torch.zeros(shape[0], device=device), torch.ones(shape[0], device=device)
    for _ in trange(config.iterations, disable=not progress, desc="ZeroQ images", unit="it", dynamic_ncols=True):
        _, layers = teacher.with_statistics(images)
        image_variance, image_mean = torch.var_mean(images, (0, 2, 3), correction=0)
        loss = gdfq_ext.bns_loss(
            [image_mean, *layers.means],
            [_std(variance) for variance in (image_variance, *layers.variances)],
            [zero, *layers.running_means],
            [one, *(_std(variance) for variance in layers.running_vars)],
            reduction="mean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss.detach())
    return images.detach()


def _std(variance: Tensor) -> Tensor:
    return (variance + 1e-6).sqrt()
