"""Where images come from. Those that the setting `images.source` can choose register themselves."""

from gdfq.images import distilled, generator, inversion, noise, qimera, zeroq  # noqa: F401
from gdfq.images.source import ImageSource

__all__ = ["ImageSource"]
