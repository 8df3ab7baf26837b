"""Real images that the user gives: to calibrate on, and labeled ones to train on."""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import Config
from gdfq.data import LabeledImages
from gdfq.errors import GdfqError
from gdfq.graph import Teacher
from gdfq.images.noise import GaussianImages
from gdfq.images.source import ImageSource
from gdfq.precision import autocast


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
    for chosen in order[: config.calibration_images].split(config.schedule.batch_size):
        items = [dataset[index] for index in chosen.tolist()]
        images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
        yield _stack("calibrate_on", images, shape).to(device)


class RealImages(ImageSource):
    """Real labeled images, in a new order in every pass; which ones depends on how many batches there were alone, so
    that a resumed run sees what it would have seen. Held out is Gaussian noise.

    Args:
        dataset: has `len()` and is indexed; its items are `(image, label)`, float `(C, H, W)` and an int.
        teacher, shape, config, device: see `ImageSource`.
        num_classes: labels are below it.

    Raises:
        GdfqError: it is empty; in `draw`: an item is no such pair, an image is not float, not of `shape` or not finite,
            or a label is outside the classes.
    """

    obstacle = "its images come from the host"

    def __init__(
        self,
        dataset: Any,
        teacher: Teacher,
        shape: tuple[int, int, int],
        num_classes: int,
        config: Config,
        device: torch.device,
    ) -> None:
        super().__init__(teacher, shape, config, device)
        _check_dataset("train_on", dataset)
        if len(dataset) < ranks.count():
            raise GdfqError(f"`train_on` holds {len(dataset)} images, less than the {ranks.count()} ranks: start fewer")
        self.dataset = dataset
        self.num_classes = num_classes
        self.drawn = 0
        self._order = functools.lru_cache(maxsize=1)(self._order)

    @torch.no_grad()
    def draw(self, count: int) -> Batch:
        with autocast(self.config.run.precision, self.device):
            return self.labeled(*self._read(ranks.shard(self._next(count))))

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` images, less where the data set is smaller, and labels `(N,)` int64."""
        return self._read(self._next(count))

    def _next(self, count: int) -> Tensor:
        """Which ones."""
        count = min(count, len(self.dataset))
        number, place = divmod(self.drawn, len(self.dataset) // count)
        self.drawn += 1
        return self._order(number)[place * count :][:count]

    def _read(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        items = [self.dataset[index] for index in chosen.tolist()]
        if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
            raise GdfqError("`train_on`: every item must be a pair (image, label)")
        images, labels = zip(*items, strict=True)
        batch = _stack("train_on", images, self.shape), _checked_labels("train_on", labels, self.num_classes)
        return self.transform(batch[0].to(self.device)), batch[1].to(self.device)

    def _order(self, number: int) -> Tensor:
        """Of the images in a pass over all of them."""
        random = torch.Generator().manual_seed(self.config.run.seed + number)
        return torch.randperm(len(self.dataset), generator=random)

    def held_out(self) -> Iterator[Tensor]:
        return GaussianImages(self.teacher, self.shape, self.config, self.device).held_out()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.drawn = state["drawn"]


def check_labeled(name: str, dataset: Any, shape: tuple[int, int, int], num_classes: int) -> None:
    """Look at the first item of a data set of pairs (image, label), and at all labels where they are at hand.

    Raises:
        GdfqError: it is empty, its first item cannot be read or is no such pair, or a label is outside the classes.
    """
    _check_dataset(name, dataset)
    try:
        item = dataset[0]
    except GdfqError:
        raise
    except Exception as error:
        raise GdfqError(f"`{name}`: its first item cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise GdfqError(f"`{name}`: every item must be a pair (image, label)")
    _stack(name, item[:1], shape)
    labels = dataset.labels if isinstance(dataset, LabeledImages) else item[1:]
    _checked_labels(name, [min(labels), max(labels)], num_classes)


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
                f"`{name}`: an image must be a float tensor (C, H, W), normalized as the model was trained; "
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


def _checked_labels(name: str, labels: Sequence[Any], num_classes: int) -> Tensor:
    for label in labels:
        try:
            known = 0 <= operator.index(label) < num_classes
        except TypeError:
            raise GdfqError(f"`{name}`: a label must be an integer, 0..{num_classes - 1}; given: {label!r}") from None
        if not known:
            raise GdfqError(
                f"`{name}` holds the label {int(label)}, but the model knows {num_classes} classes "
                f"(0..{num_classes - 1}); give the data that the model was trained for"
            )
    return torch.tensor([int(label) for label in labels])
