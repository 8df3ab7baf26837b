"""Finds and loads the compiled library; without one the ops run in pure PyTorch.

The environment variable GDFQ_EXT chooses: `auto` (the default) uses the library where it loads, `reference` never loads
it, `require` raises ImportError where it does not load.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

MODES = ("auto", "reference", "require")


@dataclass(frozen=True)
class LoadResult:
    """What became of the compiled library."""

    mode: str
    """GDFQ_EXT as read."""
    library: Path | None
    """The loaded file, None without one."""
    cause: str
    """In words, why the library is used or not."""


def load_library(directory: Path) -> LoadResult:
    """Loads `directory/_C*.so` as GDFQ_EXT says.

    Raises:
        ValueError: GDFQ_EXT is none of `auto`, `reference`, `require`.
        ImportError: GDFQ_EXT is `require` and the library is absent or does not load.
    """
    mode = os.environ.get("GDFQ_EXT", "auto")
    if mode not in MODES:
        raise ValueError(f"GDFQ_EXT={mode!r} is not known; allowed are {', '.join(MODES)}")
    if mode == "reference":
        return LoadResult(mode, None, "GDFQ_EXT=reference asks for pure PyTorch")
    library = _find(directory)
    if library is None:
        cause = f"no compiled library (_C*.so) lies in {directory}; build it with `python setup.py build_ext --inplace`"
    else:
        cause = _load_error(library)
    if cause is None:
        return LoadResult(mode, library, f"{library.name} is loaded")
    if mode == "require":
        raise ImportError(f"GDFQ_EXT=require, but {cause}")
    if library is not None:
        warnings.warn(f"gdfq_ext runs in pure PyTorch, because {cause}", RuntimeWarning, stacklevel=3)
    return LoadResult(mode, None, cause)


def _find(directory: Path) -> Path | None:
    """The newest library: a build for another Python may have left an older one beside it."""
    found = [*directory.glob("_C.so"), *directory.glob("_C.*.so")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _load_error(library: Path) -> str | None:
    """Loads `library`; what went wrong in one line, or None."""
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError, ImportError) as error:
        return f"{library.name} did not load: {str(error).strip().splitlines()[0]}"
    return None
