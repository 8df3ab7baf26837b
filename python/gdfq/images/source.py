"""Where training and calibration images come from: the interface."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import Config
from gdfq.graph import Teacher
from gdfq.images.transforms import build_transform
from gdfq.random_state import RandomState


class ImageSource:
    """Images `(N, *shape)` and their targets; the trainer steps Q on what `step` and `draw` give.

    All that an iteration reads and writes is in tensors that stay where they are, so that it can be a CUDA graph.

    Args:
        teacher: P.
        shape: `(C, H, W)`.
        config: sections `images`, `schedule` and `run` are read.
        device: of the images.

    Attributes:
        random: what `step` and `draw` draw from.
        reads: what `Batch.readings` holds.
        read: P's forward pass, with all that is read, of a rank's share of a batch.
        learns: whether `step` changes anything.
        held_out_setting: the setting that says how many images `held_out` has.
        obstacle: why an iteration on these images cannot be a CUDA graph, or None.
    """

    learns = False
    held_out_setting = "run.held_out_images"
    obstacle: str | None = None

    def __init__(self, teacher: Teacher, shape: tuple[int, int, int], config: Config, device: torch.device) -> None:
        self.teacher = teacher
        self.shape = shape
        self.config = config
        self.device = device
        self.random = RandomState(config.run.seed, device)
        self.set_reads(())
        self.transform = build_transform(config.images.transforms)

    def set_reads(self, names: Iterable[str]) -> None:
        """Say what `Batch.readings` has to hold, by the names of `gdfq.graph.teacher.READINGS`."""
        self.reads = tuple(names)
        self.read = self.teacher.reader(self.reads).shared()

    # --- to be had from every source ---

    def images(self, count: int) -> tuple[Tensor, Tensor | None]:
        """New images and their targets, the same ones on all ranks; None: the class that P gives each."""
        raise NotImplementedError

    def held_out(self) -> Iterator[Tensor]:
        """Batches of images that training never sees, the same ones every time."""
        raise NotImplementedError

    # --- to be had from those that differ ---

    @torch.no_grad()
    def draw(self, count: int) -> Batch:
        """A batch to train Q on: of one of `count` images, this rank's share."""
        images, targets = self.images(count)
        return self.labeled(ranks.shard(images), None if targets is None else ranks.shard(targets))

    def step(self, count: int) -> Batch:
        """Learn from a batch, and give it, as `draw` does."""
        return self.draw(count)

    def calibration(self) -> Iterator[Tensor]:
        """Batches to observe ranges on: `calibration.count` images."""
        return self.batches(self.config.calibration_images)

    def begin_epoch(self, epoch: int, rate: float) -> None:
        """Epochs count from 0; `rate` is a factor on all learning rates."""

    def end_epoch(self) -> None:
        """The epoch is over."""

    def read_metrics(self) -> dict[str, float | None]:
        """What the log gets, means since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that changes; tensors, numbers and nested dicts of them."""
        return {"random": self.random.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.generator.set_state(state["random"])

    # --- the same for all ---

    def batches(self, count: int) -> Iterator[Tensor]:
        """`count` new images in batches of `schedule.batch_size`."""
        size = self.config.schedule.batch_size
        for start in range(0, count, size):
            yield self.images(min(size, count - start))[0]

    def labeled(self, images: Tensor, targets: Tensor | None) -> Batch:
        """A batch with what P says of the images."""
        logits, readings = self.read(images)
        return Batch(images, logits.argmax(1) if targets is None else targets, logits, readings=readings)
