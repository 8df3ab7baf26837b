"""Finds and loads the compiled library; without one the ops run in pure PyTorch.

The environment variable GDFQ_EXT chooses: `auto` (the default) uses the library where it loads, `reference` never loads
it, `require` raises ImportError where it does not load.
"""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ._stamp import read_stamp, sources_digest

MODES = ("auto", "reference", "require")
BUILD = "`python setup.py build_ext --inplace`"


@dataclass(frozen=True)
class LoadResult:
    """What became of the compiled library."""

    mode: str
    """GDFQ_EXT as read."""
    library: Path | None
    """The loaded file, None without one."""
    cause: str
    """In words, why the library is used or not."""
    stamp: dict = field(default_factory=dict)
    """What the loaded library was built from."""


def load_library(directory: Path) -> LoadResult:
    """Loads `directory/_C*.so` as GDFQ_EXT says: the newest that was built from the sources and loads in this torch.

    Raises:
        ValueError: GDFQ_EXT is none of `auto`, `reference`, `require`.
        ImportError: GDFQ_EXT is `require` and there is no such library.
    """
    mode = os.environ.get("GDFQ_EXT", "auto")
    if mode not in MODES:
        raise ValueError(f"GDFQ_EXT={mode!r} is not known; allowed are {', '.join(MODES)}")
    if mode == "reference":
        return LoadResult(mode, None, "GDFQ_EXT=reference asks for pure PyTorch")
    causes = []
    for library in _find(directory):
        stamp = read_stamp(library)
        cause = _misfit(library, stamp, directory.parent / "csrc") or _load_error(library, stamp)
        if cause is None:
            return LoadResult(mode, library, f"{library.name} is loaded", stamp)
        causes.append(cause)
    cause = "; ".join(causes) or f"no compiled library (_C*.so) lies in {directory}; build it with {BUILD}"
    if mode == "require":
        raise ImportError(f"GDFQ_EXT=require, but {cause}")
    if causes:
        warnings.warn(f"gdfq_ext runs in pure PyTorch, because {cause}", RuntimeWarning, stacklevel=3)
    return LoadResult(mode, None, cause)


def _find(directory: Path) -> list[Path]:
    """The libraries, the newest first: builds for several Pythons may lie side by side, and one serves them all."""
    found = [*directory.glob("_C.so"), *directory.glob("_C.*.so")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _misfit(library: Path, stamp: dict, csrc: Path) -> str | None:
    """In a checkout: why `library` is not what `csrc` makes. Contents are compared, as a copy has times of its own."""
    if not (csrc / "kernels").exists():
        return None
    if stamp.get("sources") == sources_digest(csrc, with_cuda=bool(stamp.get("cuda_architectures"))):
        return None
    return f"{library.name} was built from other sources than csrc/ holds now; rebuild it with {BUILD}"


def _load_error(library: Path, stamp: dict) -> str | None:
    """Loads `library`; what went wrong in one line, or None."""
    if stamp and _release(torch.__version__) < _release(stamp["torch_target"]):
        return f"{library.name} needs torch {stamp['torch_target']} or later, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]  # torch's own says no more than the path
        built = f" (it was built with {stamp['torch_version']})" if stamp else ""
        return f"{library.name} did not load in torch {torch.__version__}{built}: {reason}; rebuild it with {BUILD}"
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
