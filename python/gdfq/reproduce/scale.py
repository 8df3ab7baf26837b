"""`--scale`: an experiment made shorter for a trial, in all its phases alike."""

import math

from gdfq.errors import GdfqError


def check_scale(scale: float) -> None:
    """Raise `GdfqError` unless `scale` is a finite number above 0."""
    if not 0 < scale < math.inf:
        raise GdfqError(f"scale is {scale}, but must be a number above 0, for example 0.1 for a tenth of the training")


def scaled(count: int, scale: float) -> int:
    """`count` epochs or iterations times `scale`, at least one."""
    return max(1, round(count * scale))
