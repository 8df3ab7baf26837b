"""What the benchmarks' pictures share."""

from pathlib import Path
from types import ModuleType
from typing import Any

from gdfq.bench.provenance import describe
from gdfq.errors import GdfqError
from gdfq.files import write_atomically


def pyplot() -> ModuleType:
    """matplotlib's, for files only.

    Raises:
        GdfqError: there is no matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise GdfqError(f"no picture was drawn, for that matplotlib is needed: {error}") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: Path, title: str, facts: dict[str, Any]) -> None:
    """Write the figure as PNG, with its title and what it was measured on (see `gdfq.bench.provenance`)."""
    subtitle = describe(facts).replace("\n", "; ")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=8)
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    pyplot().close(figure)
