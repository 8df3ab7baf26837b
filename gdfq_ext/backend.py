"""Which backend each op runs on, and why, for people (`str`) and for machines (`as_dict`)."""

from dataclasses import asdict, dataclass

import torch

from ._loader import LoadResult
from ._schemas import SCHEMAS

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class OpBackend:
    """What one op runs on for tensors of one device."""

    backend: str
    """"native" or "reference"."""
    reason: str


@dataclass(frozen=True)
class BackendReport:
    """The state of the ops package in this process."""

    mode: str
    """GDFQ_EXT: auto, reference or require."""
    library: str | None
    """The compiled library that is loaded, None without one."""
    cause: str
    """Why the library is used or not."""
    ops: dict[str, dict[str, OpBackend]]
    """Op name -> device ("cpu", "cuda") -> backend."""

    def as_dict(self) -> dict:
        """The report as plain dicts and strings, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"gdfq_ext: GDFQ_EXT={self.mode}; {self.cause}"]
        width = max(map(len, self.ops))
        for name, devices in self.ops.items():
            lines.append(f"  {name:{width}}  " + "  ".join(f"{d}: {devices[d].backend:9}" for d in DEVICES).rstrip())
        reasons = {op.reason: None for devices in self.ops.values() for op in devices.values()}
        return "\n".join([*lines, *(f"  - {reason}" for reason in reasons)])


def report(loaded: LoadResult) -> BackendReport:
    """The backends of all ops after `loaded`."""
    return BackendReport(
        mode=loaded.mode,
        library=None if loaded.library is None else str(loaded.library),
        cause=loaded.cause,
        ops={name: {device: _op_backend(name, device, loaded) for device in DEVICES} for name in SCHEMAS},
    )


def _op_backend(name: str, device: str, loaded: LoadResult) -> OpBackend:
    kind = device.upper()
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"gdfq_ext::{name}", kind):
        if device == "cuda" and not torch.cuda.is_available():
            return OpBackend("native", "cuda: the library has CUDA kernels, but PyTorch finds no CUDA device")
        return OpBackend("native", f"{device}: the library has kernels")
    if loaded.library is None:
        return OpBackend("reference", f"{device}: pure PyTorch, because {loaded.cause}")
    return OpBackend("reference", f"{device}: the library has no {kind} kernel for the ops marked reference")
