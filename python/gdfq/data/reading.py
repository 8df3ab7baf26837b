"""Images batch by batch, decoded by worker processes ahead of who takes them.

Workers send bytes through a pipe, a quarter of what normalized images are, and they are normalized where they are used.
Shared memory, which tensors would take, is slower here, and containers have little of it.
"""

import atexit
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gdfq.data.folder import ImageFolder
from gdfq.data.images import LabeledImages
from gdfq.errors import GdfqError

MOST_WORKERS = 8
PART = 32  # images that a worker decodes at once
PARTS_AHEAD = 4  # of each worker


def reading_workers(images: Any) -> int:
    """How many, where nobody says it: one for each CPU that the process may use, at most 8, to decode files; none for
    what lies in memory."""
    if not isinstance(images, ImageFolder):
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cpus)


def read(
    images: LabeledImages,
    batches: Iterable[Sequence[int]],
    workers: int | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[Tensor]:
    """Batches `(N, C, H, W)` float32, channels last, on `device`: bit for bit what `images.image` gives. The next is
    written over the last.

    Args:
        batches: numbers of the images in each.
        workers: processes that decode ahead; 0 decodes in this one. None: see `reading_workers`.

    Raises:
        GdfqError: an image cannot be decoded, or a worker is killed.
    """
    workers = reading_workers(images) if workers is None else workers
    device = torch.device(device)
    batches, ahead = itertools.tee(batches)
    loader = DataLoader(
        _Pixels(images),
        batch_sampler=(numbers[start : start + PART] for numbers in ahead for start in range(0, len(numbers), PART)),
        num_workers=workers,
        prefetch_factor=PARTS_AHEAD if workers else None,
        collate_fn=_together,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # of its own: torch's random state stays as it is
    )
    # Memory that is new every time would cost more than the arithmetic.
    batch = torch.empty(0, device=device)
    with errors_of_workers(), _iterator(loader) as parts:
        for numbers in batches:
            for start in range(0, len(numbers), PART):
                pixels = torch.from_numpy(next(parts)).to(device)
                batch.resize_(len(numbers), *pixels.shape[1:])
                _normalize(images, pixels, batch[start : start + PART])
            yield batch.permute(0, 3, 1, 2)


@contextmanager
def _iterator(loader: DataLoader) -> Iterator[Iterator[np.ndarray]]:
    """Its workers end with the block, or with Python if that comes first, as where an error holds the block's frame."""
    iterator = iter(loader)
    stop = getattr(iterator, "_shutdown_workers", int)  # where there are none nothing is to be done
    atexit.register(stop)
    try:
        yield iterator
    finally:
        stop()
        atexit.unregister(stop)


def _normalize(images: LabeledImages, pixels: Tensor, out: Tensor) -> None:
    """`images.image` of uint8 `(N, H, W, C)` into float32: by rows, in which means and deviations are repeated."""
    most = torch.tensor(255.0, device=out.device)  # by a mere number a GPU multiplies with the inverse
    mean, std = (values.flatten().to(out.device).repeat(out.shape[2]) for values in (images.mean, images.std))
    out.copy_(pixels).flatten(2).div_(most).sub_(mean).div_(std)


class _Pixels(Dataset):
    def __init__(self, images: LabeledImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor:
        return self.images.pixels(index)


def _together(pixels: list[Tensor]) -> np.ndarray:
    """`(N, H, W, C)`, as Pillow gives them: nothing is moved."""
    return np.stack([image.permute(1, 2, 0).numpy() for image in pixels])


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM go to all processes of a group: it is the first one that decides, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # a second one counts


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """What went wrong in a worker, as if it had gone wrong here."""
    try:
        yield
    except GdfqError as error:  # a worker sends its whole traceback as the message
        raise GdfqError(str(error).rpartition("GdfqError: ")[2].strip()) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise GdfqError(
            "a process that reads images was ended from outside, for want of memory perhaps: take fewer of them, by "
            f"--workers or run.workers ({error})"
        ) from error
