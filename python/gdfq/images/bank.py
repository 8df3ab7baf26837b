"""A bank of images that were made once, or are made when they are first asked for."""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from gdfq.config import Config
from gdfq.graph import Teacher
from gdfq.images.source import ImageSource


class Bank(ImageSource):
    """Images drawn from a bank at random, labeled by P.

    Args:
        teacher, shape, config, device: see `ImageSource`.
        make: `make(seed)` gives the images `(N, *shape)` of a bank. Those that are held out are another bank's.
    """

    held_out_setting = "zeroq.images"

    def __init__(
        self,
        teacher: Teacher,
        shape: tuple[int, int, int],
        config: Config,
        device: torch.device,
        make: Callable[[int], Tensor],
    ) -> None:
        super().__init__(teacher, shape, config, device)
        self.make = make

    @cached_property
    def bank(self) -> Tensor:
        return self.transform(self.make(self.config.run.seed))

    @cached_property
    def other_bank(self) -> Tensor:
        return self.transform(self.make(self.config.run.seed + 1))

    def images(self, count: int) -> tuple[Tensor, None]:
        chosen = torch.randint(len(self.bank), (count,), generator=self.random.generator, device=self.device)
        return self.bank.index_select(0, chosen), None

    def calibration(self) -> Iterator[Tensor]:
        """The whole bank as one batch."""
        yield self.bank

    def held_out(self) -> Iterator[Tensor]:
        yield self.other_bank
