"""What does not fit in memory, in words: which settings decide how much it takes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gdfq.errors import GdfqError

# Settings that a run may go on with changed: its state has the same shapes, whatever they are.
MAY_CHANGE = (
    "schedule.batch_size", "run.held_out_images", "run.precision", "zeroq.images", "inversion.batch_size",
    "distillation.batch_size", "calibration.count",
)  # fmt: skip
_WORDS = (
    "out of memory", "allocate memory", "not enough memory", "bad_alloc", "bad alloc", "alloc_failed",
    "memoryallocation", "valid cudnn algorithm", "could not create a memory", "insufficient memory",
)  # fmt: skip


class OutOfMemory(GdfqError):  # noqa: N818 - as torch's own
    """Something did not fit. The message names what decides how much memory it takes, and the values.

    Args:
        doing: what did not fit.
        settings: their names and values, the first to be lowered first; a value that is no number is context.
        reason: the allocator's words.
        folder: of the run that can be gone on with.
    """

    def __init__(self, doing: str, settings: Mapping[str, Any], reason: str, folder: Path | None = None) -> None:
        self.doing, self.settings, self.reason = doing, settings, reason
        values = ", ".join(f"{name} = {value}" for name, value in settings.items())
        lower = [name for name, value in settings.items() if type(value) is int]
        advice = f"lower {' or '.join(lower)}" if lower else "take smaller images, or a machine with more"
        if settings.get("run.precision") == "float32":
            advice += ", or take run.precision=bfloat16"
        if settings.get("run.checkpointing") is False:
            advice += ", or set run.checkpointing=true, which takes longer"
        if folder is not None:
            halved = [
                f" --set {name}={settings[name] // 2}" for name in lower if name in MAY_CHANGE and settings[name] > 3
            ]
            advice += f". To go on, for example: gdfq quantize --resume {folder}{''.join(halved[:1])}"
        super().__init__(f"not enough memory for {doing}, with {values}: {advice} ({reason})")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was not enough, on the CPU or a GPU: torch's, NumPy's or Python's error, or one caused by it."""
    if error is None:
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in _WORDS):
        return True
    return is_out_of_memory(error.__cause__)


@contextmanager
def explained(doing: str, settings: Mapping[str, Any], folder: Path | None = None) -> Iterator[None]:
    """Turn errors inside that say that memory is not enough into `OutOfMemory`, see there."""
    try:
        yield
    except OutOfMemory as error:
        if folder is None:
            raise
        raise OutOfMemory(error.doing, error.settings, error.reason, folder) from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if any(word in line.lower() for word in _WORDS)]
        raise OutOfMemory(doing, settings, next(iter(lines), type(error).__name__), folder) from error


def images_at_once(height: int, width: int) -> int:
    """How many images a pass without gradients takes at once: 256 up to 224 x 224, fewer of larger ones."""
    return max(1, min(256, 256 * 224 * 224 // (height * width)))
