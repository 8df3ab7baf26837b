"""A bank of images that are made once, part by part, when they are first asked for."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gdfq import ranks
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import Teacher
from gdfq.images.source import ImageSource


class Kept(Protocol):
    """Where a bank's parts are, when they have been made."""

    def find(self, part: int) -> Tensor | None: ...

    def leave(self, part: int, images: Tensor) -> None: ...


class Bank(ImageSource):
    """Images drawn from a bank at random, labeled by P.

    Args:
        teacher, shape, config, device: see `ImageSource`.
        make: `make(part)` gives the images `(n, *shape)` of a part, the same ones every time. Parts count from 0.
        parts: that the bank has. The next one is held out.
        settings: by which they are made, JSON values.

    Attributes:
        kept: where parts are found again and left, or None.
        while_made: gives what is around the making of parts.
        bank: all images that are not held out, `(N, *shape)` float32, behind the transforms.
    """

    held_out_setting = "inversion.batch_size"

    def __init__(
        self,
        teacher: Teacher,
        shape: tuple[int, int, int],
        config: Config,
        device: torch.device,
        make: Callable[[int], Tensor],
        parts: int = 1,
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(teacher, shape, config, device)
        self.make = make
        self.parts = parts
        self.settings = settings or {}
        self.kept: Kept | None = None
        self.while_made: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._of_all_ranks: dict[int, Tensor] = {}

    @classmethod
    def in_parts(
        cls,
        teacher: Teacher,
        shape: tuple[int, int, int],
        config: Config,
        device: torch.device,
        make: Callable[[int, int], Tensor],
        images: int,
        most: int,
        settings: dict[str, Any],
    ) -> "Bank":
        """A bank of `images` in parts of about the same size.

        Args:
            make: `make(count, part)`.
            most: that a part has.
            settings: see the class.

        Raises:
            GdfqError: when a part is made, images are NaN or infinite.
        """
        parts = -(-images // most)

        def of_its_size(part: int) -> Tensor:
            made = make(images // parts + (part < images % parts), part)
            if not made.isfinite().all():
                raise GdfqError(
                    f"images of a bank have become NaN or infinite: lower the learning rate ({', '.join(settings)})"
                )
            return made

        return cls(teacher, shape, config, device, of_its_size, parts, settings)

    @cached_property
    def bank(self) -> Tensor:
        with self.while_made():
            return torch.cat([self._part(number) for number in range(self.parts)])

    @cached_property
    def held_out_part(self) -> Tensor:
        with self.while_made():
            return self._part(self.parts)

    def _part(self, number: int) -> Tensor:
        """In one layout, whether it was made or read."""
        if ranks.count() == 1:
            images = self._found(number)
            images = self._made(number, self.make(number)) if images is None else images
        else:
            self._of_all_ranks = self._of_all_ranks or self._together()
            images = self._of_all_ranks.pop(number)
        return self.transform(images.to(self.device).contiguous(memory_format=torch.channels_last))

    def _together(self) -> dict[int, Tensor]:
        """All parts and what is held out: found by the first rank, or made by all ranks, several at a time."""
        numbers = range(self.parts + 1)
        found = {number: self._found(number) for number in numbers}
        missing = ranks.from_first(lambda: [number for number in numbers if found[number] is None])
        parts = {number: ranks.broadcast(found[number]) for number in numbers if number not in missing}
        for number, images in ranks.spread(missing, self.make):
            parts[number] = self._made(number, images)
        return parts

    def _found(self, number: int) -> Tensor | None:
        return None if self.kept is None else self.kept.find(number)

    def _made(self, number: int, images: Tensor) -> Tensor:
        if self.kept is not None:
            self.kept.leave(number, images)
        return images

    def images(self, count: int) -> tuple[Tensor, None]:
        chosen = torch.randint(len(self.bank), (count,), generator=self.random.generator, device=self.device)
        return self.bank.index_select(0, chosen), None

    def calibration(self) -> Iterator[Tensor]:
        """The whole bank, a part at a time."""
        yield from self.bank.tensor_split(self.parts)

    def held_out(self) -> Iterator[Tensor]:
        yield self.held_out_part


@torch.no_grad()
def by_class(images: Tensor, teacher: Teacher, num_classes: int, count: int) -> list[Tensor]:
    """Of each of the first classes the images `(n, C, H, W)`, `count` at most, that P takes for it most surely."""
    chances = torch.cat([teacher(part) for part in images.split(128)]).softmax(1)
    labels = chances.argmax(1)
    order = chances.amax(1).argsort(descending=True)
    return [images[order[labels[order] == label][:count]] for label in range(num_classes)]


def seed_of_part(config: Config, part: int) -> int:
    """Of what is drawn for a part: another one for every part and every `run.seed`."""
    return random.Random(f"{config.run.seed} {part}").getrandbits(63)
