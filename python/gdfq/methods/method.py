"""What a method is, what it is given and what it leaves behind."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gdfq.config import Config
from gdfq.evaluate import Agreement
from gdfq.graph import CapturedModel, Teacher
from gdfq.registry import METHODS


class Data(Enum):
    """Real data that a method takes."""

    NONE = "nothing"
    IMAGES = "images, or made ones"
    LABELED = "labeled images"


@dataclass
class Task:
    """What a method is given; it calibrates or trains the student in place.

    Attributes:
        captured: what teacher and student were built from.
        folder: of the run, or None: then nothing is written. Of several ranks only the first has one.
        resume: go on from the folder's checkpoint.
        progress: show bars.
        calibrate_on, train_on: data sets of the user's, or None.
    """

    captured: CapturedModel
    teacher: Teacher
    student: fx.GraphModule
    config: Config
    device: torch.device
    folder: Path | None
    resume: bool
    progress: bool
    calibrate_on: Any
    train_on: Any


@dataclass
class Outcome:
    """What a method leaves behind besides the student.

    Attributes:
        held_out: images for the data-free figures.
        same_source: whether they are of the source whose images the student was made with.
        seconds: that it took.
        generator: G, where one was trained.
        bank: the images `(N, C, H, W)` that the student was made with, where they are few and stay the same.
        selected: `trained` or `calibrated`.
        choice: the epoch that the data-free criterion would choose, and its figures.
        choice_state: the student's state then.
        iterations: how they were carried out.
    """

    held_out: Iterable[Tensor]
    seconds: float
    generator: nn.Module | None = None
    bank: Tensor | None = None
    selected: str = "calibrated"
    choice: tuple[int, Agreement] | None = None
    choice_state: dict[str, Tensor] | None = None
    iterations: str = "eager"
    same_source: bool = True


# Of methods that train by the section `schedule`.
TRAINING_SIZES = ("schedule.batch_size", "run.held_out_images")


def training_amount(config: Config) -> str:
    schedule = config.schedule
    return f"{schedule.epochs:,} epochs of {schedule.iterations:,} iterations of {schedule.batch_size} images"


@dataclass(frozen=True)
class Method:
    """A way to quantize. Making one makes it known to the setting `method`.

    A section of settings of its own is added to `gdfq.registry.SECTIONS`.

    Attributes:
        name: of the method.
        help: what it does, half a line.
        run: does it.
        data: real data that it takes.
        source: of its images, where `images.source` does not say another; None: neither that nor `images.file` is for
            this method.
        trains: whether it trains Q, by the section `schedule`.
        amount: how much it computes, in words, as the settings have it; nothing where it is over soon.
        sizes: settings that decide how much memory it takes, the first to be lowered first.
        prepare: changes the captured model before the student is built of it.
    """

    name: str
    help: str
    run: Callable[[Task], Outcome]
    data: Data = Data.NONE
    source: str | None = None
    trains: bool = False
    amount: Callable[[Config], str] = lambda config: ""
    sizes: tuple[str, ...] = ("schedule.batch_size", "calibration.count")
    prepare: Callable[[CapturedModel], CapturedModel] = lambda captured: captured

    def __post_init__(self) -> None:
        METHODS[self.name] = self

    @property
    def takes_bank(self) -> bool:
        """Whether its images can be those of a file."""
        return self.source is not None or self.data is Data.IMAGES


def source_name(config: Config) -> str:
    """Of the images that the method of the settings takes, where it makes them."""
    method = METHODS[config.method]
    return config.calibration.images if method.data is Data.IMAGES else config.images.source or method.source
