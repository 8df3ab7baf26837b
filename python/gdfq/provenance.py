"""What a run or a figure depends on: versions, machine, threads, commit. Without these it is not a result."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gdfq
import gdfq_ext

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("triton", "brevitas", "torchao", "nvidia-modelopt")


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a result depends on besides the configuration."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "gdfq": gdfq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
        "kernels": gdfq_ext.backend_report().cause,
    }


def provenance(threads: int) -> dict[str, Any]:
    """Everything that a reader needs in order to judge a figure or to measure it again, as JSON values."""
    on_gpu = torch.cuda.is_available()
    known = versions()
    return {
        "machine": {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "driver": driver() if on_gpu else None,
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "load_average": list(os.getloadavg()),
        },
        "threads": threads,
        **{name: known[name] for name in ("gdfq", "torch", "python")},
        "cuda": torch.version.cuda if on_gpu else None,
        "peers": {name: version for name in PEERS if (version := installed(name))},
        "gdfq_commit": commit(),
        "command": command(),
    }


def command() -> list[str]:
    """This process's, without the machine's own folders."""
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def cpu_model() -> str:
    """The model name that Linux gives, with family and model number where the name alone says little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({numbers})"


def commit() -> dict[str, Any]:
    """The commit of the source tree; `dirty` is true where tracked files differ from it.

    Outside a checkout of its own the hash is GDFQ_COMMIT, for copies of a tree without its history, and `dirty` None.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == ROOT:
            dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
            return {"hash": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"hash": os.environ.get("GDFQ_COMMIT"), "dirty": None}


def describe(facts: dict[str, Any]) -> str:
    """`provenance()` in two lines for people."""
    machine, revision = facts["machine"], facts["gdfq_commit"]
    device = machine["cpu"] if machine["device"] == "cpu" else f"{machine['device']}, host {machine['cpu']}"
    state = {True: " with uncommitted changes", False: "", None: ""}[revision["dirty"]]
    load = " ".join(f"{value:.1f}" for value in machine["load_average"])
    return (
        f"{device}, {machine['cores']} cores, {facts['threads']} threads, load average {load}\n"
        f"torch {facts['torch']}, gdfq {(revision['hash'] or 'of unknown commit')[:12]}{state}"
    )
