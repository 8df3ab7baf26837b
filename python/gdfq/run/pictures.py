"""Pictures, drawn into files without a screen."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdfq.errors import GdfqError
from gdfq.run.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(*, dpi: int = 110, **options: Any) -> "Figure":
    """An empty figure; options are those of `matplotlib.figure.Figure`.

    Raises:
        GdfqError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GdfqError(f"no picture was drawn, for that matplotlib is needed: {error}") from None
    return Figure(dpi=dpi, **options)


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write the figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
