"""Real images that the user gives: to calibrate on, and labeled ones to train on."""

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import Config
from gdfq.data import LabeledImages
from gdfq.data.reading import read
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
    parts = order[: config.calibration_images].split(config.schedule.batch_size)
    for images in _images(dataset, (part.tolist() for part in parts), config):
        yield _stack("calibrate_on", images, shape).to(device)


def _images(dataset: Any, batches: Iterable[list[int]], config: Config) -> Iterator[Iterable[Any]]:
    """Those of each batch; what the package knows is read ahead."""
    if isinstance(dataset, LabeledImages):
        yield from read(dataset, batches, config.run.workers)
        return
    for numbers in batches:
        items = [dataset[number] for number in numbers]
        yield [item[0] if isinstance(item, (tuple, list)) else item for item in items]


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
        self._kind, self._ahead = (0, False), iter(())

    @torch.no_grad()
    def draw(self, count: int) -> Batch:
        with autocast(self.config.run.precision, self.device):
            return self.labeled(*self._next(count, shared=True))

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` images, less where the data set is smaller, and labels `(N,)` int64."""
        return self._next(count, shared=False)

    def _next(self, count: int, shared: bool) -> tuple[Tensor, Tensor]:
        """The same; `shared` gives this rank's share of them."""
        count = min(count, len(self.dataset))
        numbers = _numbers(self.drawn, count, len(self.dataset), self.config.run.seed)
        numbers = ranks.shard(numbers) if shared else numbers
        if isinstance(self.dataset, LabeledImages) and len(self.dataset.labels):
            if (count, shared) != self._kind:
                self._kind, self._ahead = (count, shared), self._read_ahead(count, shared)
            images, labels = next(self._ahead), self.dataset.labels[numbers].tolist()
        else:
            items = [self.dataset[number] for number in numbers.tolist()]
            if not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
                raise GdfqError("`train_on`: every item must be a pair (image, label)")
            images, labels = zip(*items, strict=True)
        self.drawn += 1
        batch = _stack("train_on", images, self.shape), _checked_labels("train_on", labels, self.num_classes)
        return self.transform(batch[0].to(self.device)), batch[1].to(self.device)

    def _read_ahead(self, count: int, shared: bool) -> Iterator[Tensor]:
        """Batches from where `drawn` stands. It does not hold the source, with which its processes end."""
        of, seed = len(self.dataset), self.config.run.seed
        whole = (_numbers(drawn, count, of, seed) for drawn in itertools.count(self.drawn))
        batches = ((ranks.part(numbers) if shared else numbers).tolist() for numbers in whole)
        return read(self.dataset, batches, self.config.run.workers)

    def held_out(self) -> Iterator[Tensor]:
        return GaussianImages(self.teacher, self.shape, self.config, self.device).held_out()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.drawn, self._kind = state["drawn"], (0, False)


def _numbers(drawn: int, count: int, of: int, seed: int) -> Tensor:
    """Of the images in a batch `(count,)` out of `of`, before which so many batches were drawn."""
    number, place = divmod(drawn, of // count)
    return _order(of, seed + number)[place * count :][:count]


@functools.lru_cache(maxsize=2)  # of now, and of what is read ahead
def _order(of: int, seed: int) -> Tensor:
    """Of the images in a pass over all of them."""
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))


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


def _stack(name: str, images: Iterable[Any], shape: tuple[int, int, int]) -> Tensor:
    images = list(images)
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
    batch = torch.stack(images).float()
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
