"""Files that are either whole or absent: written beside under a temporary name, then renamed."""

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gdfq.errors import GdfqError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` in the folder of `path`, then rename the temporary file to `path`.

    The folder is created when it is missing. A reader sees the old file or the new one, never a part: whatever
    `write` raises (Ctrl-C included), the temporary file is removed and `path` stays as it was.

    Raises `GdfqError`, naming `path` and the reason, for a full disk, missing permission and every other `OSError`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # processes of several machines may write
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise GdfqError(f"cannot write {path}: {error.strerror or error}; nothing was left behind") from error
        raise
    # The file is whole and in place; some file systems cannot flush a folder, which is no reason to fail.
    with contextlib.suppress(OSError):
        _flush_to_disk(path.parent)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with `write_atomically`, and with its errors."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, of any device, layout and dtype safetensors knows, as a safetensors file.

    Each name gets its own contiguous copy, so views and tensors that share memory are saved in full.
    `metadata` maps text to text. Raises `GdfqError` as `write_atomically` does.
    """
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    # Not safetensors' save_file: it hides a full disk in its own error type.
    content = save(copies, dict(metadata or {}))
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors by name, on the CPU, and its metadata (empty when it has none).

    Raises `GdfqError` when the file is missing, unreadable, truncated or not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise GdfqError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise GdfqError(
            f"{path} is truncated or is not a safetensors file ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise GdfqError(f"cannot read {path}: {error.strerror or error}") from error
