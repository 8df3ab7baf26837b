"""A bank of images that are made once, part by part, when they are first asked for."""

import random
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import Teacher
from gdfq.images.source import ImageSource


class Bank(ImageSource):
    """Images drawn from a bank at random, labeled by P.

    Args:
        teacher, shape, config, device: see `ImageSource`.
        make: `make(part)` gives the images `(n, *shape)` of a part, the same ones every time. Parts count from 0.
        parts: that the bank has. The next one is held out.
        settings: by which they are made, JSON values.

    Attributes:
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
        return torch.cat([self._part(number) for number in range(self.parts)])

    @cached_property
    def held_out_part(self) -> Tensor:
        return self._part(self.parts)

    def _part(self, number: int) -> Tensor:
        """In one layout, whether it was made or read."""
        images = self.make(number).to(self.device)
        return self.transform(images.contiguous(memory_format=torch.channels_last))

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
