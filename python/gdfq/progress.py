"""What a run says of itself on standard error: what it is about to do, how long it takes, and bars where they fit."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from gdfq.config import Config
from gdfq.target import target_of

LONG_ON_A_CPU = 6 * 3600
SHORT = 30  # seconds that nobody needs to be told of


def draws_bars() -> bool:
    """Whether standard error is a terminal or a notebook; into a file go words alone."""
    return sys.stderr.isatty() or hasattr(sys, "ps1")


def say(text: str) -> None:
    """A line on standard error, above the bars."""
    tqdm.write(f"gdfq: {text}", file=sys.stderr)


def duration(seconds: float) -> str:
    """To about two digits: `40 s`, `12 min`, `3.4 h`, `2.5 days`."""
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if unit == "h" and value < 10 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


class Pace:
    """How long one of many like iterations takes, once it can be told. The first one is left out: it warms up, unless
    its beginning is told.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start: float | None = None
        self.count = 0
        self.is_told = False

    def begin(self) -> None:
        """An iteration begins."""
        if self.start is None:
            self.start = self.clock()

    def tick(self) -> float | None:
        """An iteration is over. Seconds that one takes, said once: after five seconds and three of them, or after one
        that takes longer than half a minute."""
        now = self.clock()
        if self.start is None:
            self.start = now
            return None
        self.count += 1
        passed = now - self.start
        if self.is_told or not ((self.count >= 3 and passed >= 5) or passed >= 30):
            return None
        self.is_told = True
        return passed / self.count


class Estimate:
    """Says how long a training takes, in its first phase, and again where Q begins to be trained, which takes longer.

    Args:
        config: of the training: its method and schedule.
        device: that it is on; on a CPU what takes long is said to have a shorter way.
        tell: what is said goes there.
        clock: gives seconds.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        tell: Callable[[str], None] = say,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.method = config.method
        self.schedule = schedule = config.schedule
        self.device = device
        self.tell = tell
        self.clock = clock
        self.total = schedule.epochs * schedule.iterations
        self.until_training = max(schedule.warmup_epochs, schedule.range_epochs) * schedule.iterations
        self.is_training: bool | None = None
        self.has_advised = False
        self.pace = Pace(clock)

    def after(self, done: int) -> None:
        """So many iterations are done."""
        is_training = done > self.until_training
        if is_training != self.is_training:
            self.is_training, self.pace = is_training, Pace(self.clock)
        seconds = self.pace.tick()
        if seconds is None:
            return
        left = (self.total - done) * seconds
        if left < SHORT:
            return
        iterations = f"{self.total - done:,} iterations of {seconds:.2g} s"
        if is_training or self.total <= self.until_training:
            self.tell(f"about {duration(left)} to go, {iterations}")
        else:
            later = f"from number {self.until_training + 1:,} on, when Q is trained, they take longer"
            self.tell(f"at least {duration(left)} to go, {iterations}; {later}, and it is said again")
        if left > LONG_ON_A_CPU and self.device.type == "cpu" and not self.has_advised:
            self.has_advised = True
            self.tell(f"that is long for a CPU: {self._advice(seconds, left)}")

    def _advice(self, seconds: float, left: float) -> str:
        demo = Config.load("demo").schedule
        images = demo.epochs * demo.iterations * demo.batch_size
        with_q = 1.0 if self.is_training else 1.5  # half of its iterations train Q, which takes about as long again
        short = with_q * seconds / self.schedule.batch_size * images
        if short > left / 2:
            return "lower schedule.epochs, schedule.iterations or the image size, or take a GPU"
        return (
            f"a new run with --preset demo --method {self.method} ({demo.epochs} epochs of {demo.iterations} "
            f"iterations of {demo.batch_size} images) would take about {duration(short)}; or lower schedule.epochs, "
            "or take a GPU"
        )


def steps(count: int, what: str, progress: bool) -> Iterator[int]:
    """`range(count)`, with a bar or, where none fits, with words on how long it takes."""
    pace = Pace()
    for number in tqdm(range(count), what, disable=not (progress and draws_bars()), unit="it", dynamic_ncols=True):
        yield number
        if progress:
            say_what_is_left(f"{what}: ", count - number - 1, "steps", pace.tick())


def say_what_is_left(before: str, count: int, what: str, seconds: float | None) -> float:
    """Seconds that `count` more of `what` take, each so many, if known; said where somebody needs to be told."""
    if seconds is None or count * seconds < SHORT:
        return 0.0
    each = f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
    say(f"{before}about {duration(count * seconds)} to go, {count:,} {what} of {each}")
    return count * seconds


def plan(
    name: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    config: Config,
    what: str,
    images: str | None,
    amount: str,
    device: torch.device,
    folder: Path | None,
) -> list[str]:
    """What is about to happen, in two lines.

    Args:
        name: of the model's class.
        what: the method does, in words.
        images: that Q is trained or calibrated on, in words; None where `what` says it.
        amount: of its work, in words, or nothing.
    """
    quantizer = config.quantizer
    where = f"{device}, threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)
    first = (
        f"{name}, images {' x '.join(map(str, image_shape))}, {num_classes} classes, to "
        f"W{quantizer.weight_bits}A{quantizer.activation_bits} for target '{target_of(quantizer).name}', on {where}, "
        + ("no files" if folder is None else f"files in {folder}")
    )
    second = f"method '{config.method}': {what.removesuffix(' (default)')}"
    if images is not None:
        second += f"; {images}"
    return [first, f"{second}, {amount}" if amount else second]
