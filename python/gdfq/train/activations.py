"""Activations of many images, kept for as long as a block is trained on them: in memory, or in a file where they are
too many."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Activations:
    """One activation of all images, `(N, ...)` float32, in the layout of its first batch.

    Args:
        rows: `(N, ...)`, contiguous; of what is channels_last, `(N, H, W, C)`.
        is_channels_last: whether it is.
    """

    def __init__(self, rows: Tensor, is_channels_last: bool) -> None:
        self.rows = rows
        self.is_channels_last = is_channels_last

    def obstacle(self, device: torch.device) -> str | None:
        """Why an iteration that reads them cannot be a CUDA graph, or None."""
        return None if self.rows.device == device else "its activations are in a file (reconstruction.memory_gib)"

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, chosen: Tensor) -> Tensor:
        """Those of the images `chosen`, `(n,)` int64."""
        return self._shaped(self.rows.index_select(0, chosen.to(self.rows.device)).to(chosen.device))

    def batches(self, size: int, device: torch.device) -> Iterator[Tensor]:
        """All, in order."""
        return (self._shaped(rows.to(device)) for rows in self.rows.split(size))

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.movedim(-1, 1) if self.is_channels_last else rows


class Store:
    """Where activations are kept.

    Args:
        budget: bytes of memory for all that are needed at once; what is larger than its share goes to a file.
        folder: for such files, which are gone with the store; default: the system's for temporary ones.
    """

    AT_ONCE = 4  # what goes into a block and comes out of it, of P and of Q

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget = budget
        self.folder = folder
        self.files: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.files is not None:
            self.files.cleanup()

    def keep(self, count: int, batches: Iterator[Tensor]) -> Activations:
        """`count` rows in all, that come in `batches`."""
        kept, start = None, 0
        for batch in batches:
            if kept is None:
                is_channels_last = batch.dim() == 4 and not batch.is_contiguous()
                like = batch.movedim(1, -1) if is_channels_last else batch
                kept = Activations(self._empty((count, *like.shape[1:]), batch.device), is_channels_last)
            rows = batch.movedim(1, -1) if kept.is_channels_last else batch
            kept.rows[start : start + len(rows)] = rows
            start += len(rows)
        assert kept is not None
        return kept

    def _empty(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        size = math.prod(shape)
        if size * 4 * self.AT_ONCE <= self.budget:
            return torch.empty(shape, device=device)
        self.files = self.files or tempfile.TemporaryDirectory(prefix="activations-", dir=self.folder)
        path = Path(self.files.name) / "rows"
        rows = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32).view(shape)
        path.unlink()  # its space is free when nobody holds the tensor any more
        return rows
