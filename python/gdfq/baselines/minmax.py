"""The plainest baseline: no training, activation ranges observed on Gaussian noise, weights by their min and max."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gdfq.calibrate import calibrate, gaussian_images
from gdfq.config import Config


def minmax(student: nn.Module, shape: tuple[int, int, int], config: Config, device: torch.device) -> Iterator[Tensor]:
    """Calibrate `student` in place; returns held-out noise images `(N, *shape)` in batches."""
    batch, seed = config.schedule.batch_size, config.run.seed
    calibrate(student, gaussian_images(shape, config.schedule.range_batches * batch, batch, seed, device))
    return gaussian_images(shape, config.run.held_out_images, batch, seed + 1, device)
