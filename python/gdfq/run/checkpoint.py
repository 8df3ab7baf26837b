"""The state of a run as one safetensors file: whole or absent, and readable without unpickling anything."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.memory import MAY_CHANGE
from gdfq.run.files import load_tensors, save_tensors

FORMAT = "2"  # of the state: raised when a trainer's or a source's state dict changes


def save_checkpoint(path: Path, state: dict, identity: dict) -> None:
    """Write `state` (tensors, numbers, text, None, nested in dicts and lists) and what it belongs to.

    Args:
        identity: JSON values; `load_checkpoint` refuses a file whose identity differs.

    Raises:
        GdfqError: the file cannot be written. The one before it is then still there.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _to_json(state, tensors, "")
    save_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(tree), "identity": json.dumps(identity)})


def load_checkpoint(path: Path, identity: dict) -> dict:
    """Read the state back, tensors on the CPU.

    Raises:
        GdfqError: no file, a broken one, or one of another model or configuration (names what differs).
    """
    tensors, metadata = load_tensors(path)
    if "state" not in metadata or "identity" not in metadata:
        raise GdfqError(f"{path} is a safetensors file, but not a checkpoint of a run")
    if metadata.get("format") != FORMAT:
        raise GdfqError(
            f"{path} is a checkpoint in an older form, which this version cannot go on with: start the run anew in "
            "another folder, or finish it with the version that began it"
        )
    saved = json.loads(metadata["identity"])
    identity = json.loads(json.dumps(identity))
    changed = check_same(path, saved, identity)
    if changed:
        warnings.warn(
            f"the run goes on with other settings than it began with ({changed}): its result is not bit for bit that "
            "of a run without the change",
            stacklevel=5,
        )
    return _from_json(json.loads(metadata["state"]), tensors)


def find_checkpoint(path: Path | None, identity: dict) -> dict | None:
    """`load_checkpoint` of the first rank's file, on all ranks; None where that has none yet."""
    return ranks.from_first(lambda: load_checkpoint(path, identity) if path is not None and path.exists() else None)


def check_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs of the settings that may, in words.

    Raises:
        GdfqError: anything else differs (names what).
    """
    differing = sorted(key for key in saved.keys() | now.keys() if saved.get(key) != now.get(key))
    others = [key for key in differing if key not in MAY_CHANGE]
    changes = "; ".join(f"{key}: {saved.get(key)!r} there, {now.get(key)!r} now" for key in (others or differing)[:5])
    if others:
        raise GdfqError(
            f"{path} belongs to another run ({changes}). Resume with the model and settings that it was started with, "
            f"or start anew in another folder. What may change is {', '.join(MAY_CHANGE)}."
        )
    return changes


def _to_json(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """`value` with every tensor moved to `tensors`; dicts become lists of pairs, since JSON keys are text only."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _to_json(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    return value


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _from_json(item, tensors) for key, item in value["dict"]}
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    return value
