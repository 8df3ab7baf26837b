"""Images for the baselines: made of nothing (noise, a generator), or real ones that the user gives."""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdfq.calibrate import gaussian_images
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.trainer import Trainer


class SyntheticImages(NamedTuple):
    """Batches `(N, C, H, W)`, made when they are asked for.

    Attributes:
        calibration: for the activation ranges.
        held_out: others of the same kind, for the data-free figures.
    """

    calibration: Iterable[Tensor]
    held_out: Iterable[Tensor]


def calibration_count(config: Config) -> int:
    """How many images a calibration looks at."""
    return config.calibration.count or config.schedule.range_batches * config.schedule.batch_size


def gaussian(shape: tuple[int, int, int], config: Config, device: torch.device) -> SyntheticImages:
    """N(0, 1) noise of `shape`."""
    batch, seed = config.schedule.batch_size, config.run.seed
    return SyntheticImages(
        gaussian_images(shape, calibration_count(config), batch, seed, device),
        gaussian_images(shape, config.run.held_out_images, batch, seed + 1, device),
    )


def warm_up_only(config: Config) -> Config:
    """The configuration of a run that ends where Q would first be stepped."""
    schedule = config.schedule.model_copy(update={"epochs": config.schedule.warmup_epochs})
    return config.model_copy(update={"schedule": schedule})


def generated(trainer: Trainer) -> SyntheticImages:
    """Images of a trained generator."""
    count, batch = calibration_count(trainer.config), trainer.config.schedule.batch_size
    batches = (trainer.images(*trainer.latents.draw(min(batch, count - start))) for start in range(0, count, batch))
    return SyntheticImages(batches, trainer.held_out_images())


# --- real images -------------------------------------------------------------------------------------------------


def calibration_batches(
    dataset: Any, shape: tuple[int, int, int], config: Config, device: torch.device
) -> Iterator[Tensor]:
    """Batches of images `(N, *shape)`, drawn from `dataset` without replacement; all of it where it holds too few.

    Args:
        dataset: has `len()` and is indexed; its items are images, float `(C, H, W)`, or tuples that begin with one.

    Raises:
        GdfqError: it is empty, or an image is not float, not of `shape`, or not finite.
    """
    _check_dataset("calibrate_on", dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.run.seed))
    for chosen in order[: calibration_count(config)].split(config.schedule.batch_size):
        items = [dataset[index] for index in chosen.tolist()]
        images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
        yield _stack("calibrate_on", images, shape).to(device)


class TrainingImages:
    """Batches of real labelled images, in a new order in every pass; which ones depends on the iteration alone, so that
    a resumed run sees what it would have seen.

    Args:
        dataset: has `len()` and is indexed; its items are `(image, label)`, float `(C, H, W)` and an int.
        shape: `(C, H, W)` that every image must have.
        num_classes: labels are below it.
        config: `schedule.batch_size` (less where the data set is smaller) and `run.seed` are read.
        device: where batches are put.

    Raises:
        GdfqError: it is empty; in `batch`: an item is no such pair, an image is not float, not of `shape` or not
            finite, or a label is outside the classes.
    """

    def __init__(
        self, dataset: Any, shape: tuple[int, int, int], num_classes: int, config: Config, device: torch.device
    ) -> None:
        _check_dataset("train_on", dataset)
        self.dataset = dataset
        self.shape = shape
        self.num_classes = num_classes
        self.batch_size = min(config.schedule.batch_size, len(dataset))
        self.seed = config.run.seed
        self.device = device
        self._order = functools.lru_cache(maxsize=1)(self._order)

    def batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Images `(N, *shape)` float32 and labels `(N,)` int64."""
        number, place = divmod(iteration, len(self.dataset) // self.batch_size)
        chosen = self._order(number)[place * self.batch_size :][: self.batch_size]
        items = [self.dataset[index] for index in chosen.tolist()]
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
            raise GdfqError("`train_on`: every item must be a pair (image, label)")
        images, labels = zip(*items, strict=True)
        batch = _stack("train_on", images, self.shape), _checked_labels(labels, self.num_classes)
        return batch[0].to(self.device), batch[1].to(self.device)

    def _order(self, number: int) -> Tensor:
        """Of the images in a pass over all of them."""
        return torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(self.seed + number))


def _check_dataset(name: str, dataset: Any) -> None:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise GdfqError(f"`{name}` must have len() and be indexed, as a map-style data set; given: {type(dataset)}")
    if len(dataset) == 0:
        raise GdfqError(f"`{name}` holds no images; give at least one")


def _stack(name: str, images: Sequence[Any], shape: tuple[int, int, int]) -> Tensor:
    for image in images:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            given = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
            raise GdfqError(
                f"`{name}`: an image must be a float tensor (C, H, W), normalised as the model was trained; "
                f"given: {given}"
            )
        if tuple(image.shape) != shape:
            raise GdfqError(
                f"`{name}` holds an image of shape {tuple(image.shape)}, the model takes {shape} (channels, height, "
                "width); prepare it as those that the model was trained on"
            )
    batch = torch.stack(list(images)).float()
    if not batch.isfinite().all():
        raise GdfqError(f"`{name}` holds an image with NaN or Inf; leave it out or mend it")
    return batch


def _checked_labels(labels: Sequence[Any], num_classes: int) -> Tensor:
    for label in labels:
        try:
            known = 0 <= operator.index(label) < num_classes
        except TypeError:
            raise GdfqError(f"`train_on`: a label must be an integer, 0..{num_classes - 1}; given: {label!r}") from None
        if not known:
            raise GdfqError(
                f"`train_on` holds the label {int(label)}, but the model knows {num_classes} classes "
                f"(0..{num_classes - 1}); give the data that the model was trained for"
            )
    return torch.tensor([int(label) for label in labels])
