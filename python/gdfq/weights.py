"""Weights from files that cannot run code, put into a model whatever wrapped it when they were saved."""

import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq.errors import GdfqError
from gdfq.run.files import load_tensors

LISTED = 5  # how many names a message lists before it says "and N more"
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
AVERAGES = {"ema", "swa", "averaged", "average", "avg", "shadow", "polyak"}
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loops|grad", re.IGNORECASE)  # entries of a checkpoint
COUNTERS = {"num_batches_tracked", "n_averaged", "num_updates", "decay", "initted", "step", "steps"}
COUNTERS |= {"total_ops", "total_params"}  # thop's
OF_TRAINING = re.compile(
    r"(criterion|metrics?|loss\w*|\w*_(loss|metrics?|acc|accuracy)|(train|val|valid|test)_\w+)\.|"
    r"(class_weights?|pos_weight)$"
)
CHOICE = "`--weights-entry NAME` (in Python `weights_entry`)"


@dataclass
class Entry:
    """A set of weights under the model's own names.

    Attributes:
        name: what stands before these names in the file, the entries of a checkpoint included: `state_dict.model`.
        tensors: by the model's names.
        places: the mappings of the file that they are in.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: set[tuple[str, ...]] = field(default_factory=set)

    def __str__(self) -> str:
        return f"'{self.name or '.'}'"

    def holds(self, name: str) -> bool:
        return not self.name or f"{name}.".startswith(self.name if self.name.endswith("_") else f"{self.name}.")


class _Inert:
    """Stands in for whatever a checkpoint holds besides tensors: settings, metrics. Keeps nothing and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_weights(model: nn.Module, path: str | Path, entry: str | None = None, complaint: str | None = None) -> None:
    """Fill `model` in place from a safetensors file or a file of `torch.save`; no code in it is ever run.

    The model's names are looked for in all of the file, behind any prefix: entries of a training checkpoint, wrappers
    as DataParallel, torch.compile and Lightning modules. Of raw weights and their moving average the average is taken,
    and a warning says so; what is left out beside the weights is named in a warning, too.

    Args:
        entry: which weights, where a file holds several: what stands before their names, or a part of it
            (`state_dict_ema`, `teacher`); `.` for those that nothing stands before.
        complaint: how the message begins that lists what does not fit; default: the file's name.

    Raises:
        GdfqError: the file is missing, truncated, or holds no tensors; several sets of weights fit, or none.
    """
    complaint = complaint or f"{path} does not fit the model"
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    content, refused = read_checkpoint(path)
    stored = _unwrapped(_stored(content), expected)
    entries = _entries(stored, expected)
    complete = [one for one in entries if _is_complete(one, expected)]
    fitting = [one for one in complete if not _misshapen(one, expected)]
    averages = _without_buffers(entries, fitting, expected, parameters) + _listed(content, fitting, model)
    if not fitting:
        best = max(complete or entries, key=lambda one: len(one.tensors), default=Entry(_largest(stored)))
        _explain(best, stored, expected, complaint, path, refused)
    chosen = _choose(fitting + averages, entry, path, _is_swapped(stored))
    left_out = _left_out(chosen, stored, expected, fitting + averages, complaint)
    _say_left_out(left_out, stored, path)
    if entry is None:
        known = fitting + averages
        _say_unread_averages([*_averages_in(stored, expected, known), *_unread_averages(content, known)], chosen, path)
    model.load_state_dict(chosen.tensors, strict=False)


# --- reading


def read_checkpoint(path: str | Path) -> tuple[Mapping[str, Any], list[str]]:
    """What a safetensors file or a file of `torch.save` holds, tensors on the CPU, and the names of what was not read
    because it is neither a tensor nor plain.

    Raises `GdfqError` when the file is missing, truncated or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise GdfqError(f"no such weights file: {path}")
    with path.open("rb") as file:
        start = file.read(4)
    # A torch.save file is a zip archive, or, in its old form, a pickle; anything else must be safetensors.
    if start != b"PK\x03\x04" and start[:1] != b"\x80":
        return load_tensors(path)[0], []
    content, refused = _torch_load(path)
    if not isinstance(content, Mapping) or not any(True for _ in _stored(content)):
        if refused:
            raise GdfqError(_unreadable(path, refused[0]))
        raise GdfqError(f"{path} holds no state dict: a mapping from names to tensors, alone or within others")
    return content, refused


def _torch_load(path: Path) -> tuple[Any, list[str]]:
    refused: list[str] = []
    while True:
        inert: list[Any] = [(_Inert, name) for name in refused]
        try:
            with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(inert):
                return torch.load(path, map_location="cpu", weights_only=True), refused
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found is None and not refused:
                raise GdfqError(f"{path} is truncated or is no state dict; copy or download it again") from error
            if found is None or found[1] in refused or "blocked" in str(error):
                raise GdfqError(_unreadable(path, found[1] if found else refused[-1])) from error
            refused.append(found[1])
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if "TorchScript" in str(error):
                raise GdfqError(f"{path} is a TorchScript archive, not a state dict; {_CONVERT}") from error
            if refused:
                raise GdfqError(_unreadable(path, refused[-1])) from error
            reason = next(iter(str(error).strip().splitlines()), "")
            raise GdfqError(f"{path} is truncated or is no state dict ({type(error).__name__}: {reason})") from error


_CONVERT = "if you trust the file, load the model and save its weights alone: torch.save(model.state_dict(), FILE)"


def _unreadable(path: Path, name: str) -> str:
    return f"{path} is truncated or holds more than tensors ({name}), and to read that could run any code; {_CONVERT}"


def _stored(content: Mapping[Any, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """All tensors under names: the mapping they are in, their name in it, the tensor. Optimizers' are none."""
    for key, value in content.items():
        if not isinstance(key, str) or (isinstance(value, Mapping) and NOT_WEIGHTS.search(key)):
            continue
        if isinstance(value, Tensor):
            yield place, key, value
        elif isinstance(value, Mapping):
            yield from _stored(value, (*place, key))


Stored = dict[str, tuple[tuple[str, ...], Tensor]]


def _unwrapped(stored: Iterator[tuple[tuple[str, ...], str, Tensor]], expected: Mapping[str, Tensor]) -> Stored:
    """By full names, without the parts that wrappers put into them, unless the model has such parts itself."""
    found = {".".join((*place, name)): (place, tensor) for place, name, tensor in stored}
    own = {part for name in expected for part in name.split(".")}
    for wrapper in WRAPPERS:
        names = {name: ".".join(part for part in name.split(".") if part != wrapper) for name in found}
        if wrapper not in own and len(set(names.values())) == len(names):
            found = {names[name]: value for name, value in found.items()}
    return found


# --- which weights


def _entries(stored: Stored, expected: Mapping[str, Tensor]) -> list[Entry]:
    """Every prefix behind which some of the model's names stand, or names written together as averages do."""
    entries: dict[str, Entry] = {}
    joined = {"": {name.replace(".", ""): name for name in expected}}
    joined["_"] = {name.replace(".", "_"): name for name in expected}
    for full, (place, tensor) in stored.items():
        parts = full.split(".")
        found = [(".".join(parts[:i]), rest) for i in range(len(parts)) if (rest := ".".join(parts[i:])) in expected]
        if not found and len(parts) > 1 and _is_average(parts[-2]) and parts[-1] in joined[""]:
            found = [(".".join(parts[:-1]), joined[""][parts[-1]])]
        elif not found and parts[-1].startswith("ema_") and (name := parts[-1].removeprefix("ema_")) in joined["_"]:
            found = [(".".join([*parts[:-1], "ema_"]), joined["_"][name])]
        for prefix, name in found:
            entry = entries.setdefault(prefix, Entry(prefix))
            entry.tensors[name] = tensor
            entry.places.add(place)
    return list(entries.values())


def _is_complete(entry: Entry, expected: Mapping[str, Tensor]) -> bool:
    # Networks from before 2018 have no num_batches_tracked, and inference never reads it.
    return all(name in entry.tensors or name.endswith("num_batches_tracked") for name in expected)


def _misshapen(entry: Entry, expected: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} (file {tuple(tensor.shape)}, model {tuple(expected[name].shape)})"
        for name, tensor in entry.tensors.items()
        if tensor.shape != expected[name].shape
    ]


def _is_average(name: str) -> bool:
    """Of MMCV's `ema_conv_weight`, which may be either, it is not said."""
    return not name.endswith("_") and not AVERAGES.isdisjoint(
        part.lower() for part in re.split(r"[._-]|(?<=[a-z])(?=[A-Z])", name)
    )


def _without_buffers(
    entries: list[Entry], fitting: list[Entry], expected: Mapping[str, Tensor], parameters: set[str]
) -> list[Entry]:
    """Averages of the parameters alone, with the buffers of the raw weights."""
    raw = [one for one in fitting if not _is_average(one.name)]
    partial = [
        one
        for one in entries
        if one not in fitting
        and _is_average(one.name)
        and parameters <= one.tensors.keys()
        and not _misshapen(one, expected)
    ]
    return [Entry(one.name, raw[0].tensors | one.tensors, one.places) for one in partial if len(raw) == 1]


def _listed(content: Mapping[Any, Any], fitting: list[Entry], model: nn.Module, place: str = "") -> list[Entry]:
    """Averages that are lists of tensors in the order of the parameters, with the buffers of the raw weights."""
    raw = [one for one in fitting if not _is_average(one.name)]
    parameters = dict(model.named_parameters())
    found = []
    for key, value in content.items():
        name = f"{place}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            found += _listed(value, fitting, model, name)
        elif isinstance(value, (list, tuple)) and _is_average(name) and "collected" not in name and len(raw) == 1:
            shapes = [tensor.shape for tensor in value if isinstance(tensor, Tensor)]
            if shapes == [parameter.shape for parameter in parameters.values()]:
                tensors = dict(zip(parameters, value, strict=True))
                found.append(Entry(name, raw[0].tensors | tensors, {tuple(name.split("."))}))
    return found


def _is_swapped(stored: Stored) -> bool:
    """MMEngine saves the average as `state_dict` and the raw weights as `ema_state_dict`, Lightning's WeightAveraging
    the raw ones as `current_model_state`."""
    return "ema_state_dict.steps" in stored or any(name.startswith("current_model_state.") for name in stored)


def _choose(entries: list[Entry], wanted: str | None, path: str | Path, is_swapped: bool) -> Entry:
    names = ", ".join(sorted({str(entry) for entry in entries}))
    if wanted is not None:
        return _named(entries, wanted, path, names)
    if all(_same(entries[0], other) for other in entries[1:]):
        return entries[0]
    if is_swapped:
        averages = [entry for entry in entries if entry.name.split(".")[0] == "state_dict"]
    else:
        averages = [entry for entry in entries if _is_average(entry.name)]
    if len(averages) != 1:
        raise GdfqError(f"{path} holds several sets of this model's weights, {names}: say which with {CHOICE}")
    warnings.warn(
        f"{path} holds several sets of this model's weights, {names}: the moving average is taken, {averages[0]}; for "
        f"another: {CHOICE}",
        stacklevel=4,
    )
    return averages[0]


def _named(entries: list[Entry], wanted: str, path: str | Path, names: str) -> Entry:
    """The entry of that name, or the one that has it among the parts of its own."""
    name = wanted.strip(".")
    found = [entry for entry in entries if entry.name == name]
    found = found or [entry for entry in entries if name and f".{name}." in f".{entry.name}."]
    if len({entry.name for entry in found}) != 1:
        what = "several of the" if found else "none of the"
        raise GdfqError(f"'{wanted}' names {what} sets of this model's weights in {path}; there are: {names}")
    return found[0]


def _same(one: Entry, other: Entry) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items()
    )


# --- what else there is


def _beside(entry: Entry, stored: Stored, others: list[Entry]) -> list[str]:
    """Full names in the same mappings that are none of the entries' tensors."""
    taken = {id(tensor) for one in (entry, *others) for tensor in one.tensors.values()}
    return [name for name, (place, tensor) in stored.items() if place in entry.places and id(tensor) not in taken]


def _left_out(
    chosen: Entry, stored: Stored, expected: Mapping[str, Tensor], entries: list[Entry], complaint: str
) -> list[str]:
    """What is beside the weights and is none of them; raises if it has its place within the model."""
    others = [entry for entry in entries if entry.name and entry.name != chosen.name]
    beside = [
        name
        for name in _beside(chosen, stored, entries)
        if name.split(".")[-1] not in COUNTERS and not any(other.holds(name) for other in others)
    ]
    start = len(chosen.name) + 1 if chosen.name else 0
    own = {name.split(".")[0] for name in expected}
    unexpected = [
        name[start:]
        for name in beside
        if chosen.holds(name) and (name[start:].split(".")[0] in own or not OF_TRAINING.match(name[start:]))
    ]
    averaged = [name for name in beside if _is_average(name) and not _is_average(".".join(expected))]
    unexpected = [name for name in unexpected if name not in averaged]
    if unexpected:
        raise GdfqError(f"{complaint}; not in the model: {listing(unexpected)}")
    return beside


def _say_left_out(names: list[str], stored: Stored, path: str | Path) -> None:
    names = [name for name in names if not _is_average(name)]
    if not names:
        return
    pixels = [name for name in names if re.search(r"(^|\.)([a-z]+_)?(?<!running_)(mean|std)$", name)]
    values = ", ".join(f"{name} {stored[name][1].flatten()[:4].tolist()}" for name in pixels[:LISTED])
    advice = f"; as it seems, it was saved with its own normalization of images, which now have to come so: {values}"
    warnings.warn(
        f"{path} holds more than this model, which is left out: {listing(names)}{advice if pixels else ''}",
        stacklevel=4,
    )


def _averages_in(stored: Stored, expected: Mapping[str, Tensor], entries: list[Entry]) -> list[str]:
    """Tensors that seem to be averaged weights and are none of the entries'."""
    if _is_average(".".join(expected)):
        return []
    counted = [name for name in stored if name.split(".")[-1] not in COUNTERS]
    return [name for name in counted if _is_average(name) and not any(one.name and one.holds(name) for one in entries)]


def _unread_averages(content: Mapping[Any, Any], entries: list[Entry], place: str = "") -> Iterator[str]:
    """Objects and lists that seem to be averaged weights and are none of the entries'."""
    for key, value in content.items():
        name = f"{place}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            yield from _unread_averages(value, entries, name)
        elif _is_average(name) and not any(entry.name == name for entry in entries):
            is_list = isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value)
            if isinstance(value, _Inert) or (is_list and "collected" not in name):
                yield name


def _say_unread_averages(names: list[str], chosen: Entry, path: str | Path) -> None:
    if names:
        warnings.warn(
            f"{path} seems to hold averaged weights, {listing(names)}, but not all of this model's or not so that they "
            f"can be read; taken are {chosen}",
            stacklevel=4,
        )


def _largest(stored: Stored) -> str:
    places = defaultdict(int)
    for place, _ in stored.values():
        places[place] += 1
    return ".".join(max(places, key=lambda place: places[place]))


def _explain(
    entry: Entry,
    stored: Stored,
    expected: Mapping[str, Tensor],
    complaint: str,
    path: str | Path,
    refused: list[str],
) -> None:
    """Raise for weights that do not fit, with what is nearest."""
    entry.places = entry.places or {place for place, _ in stored.values() if entry.holds(".".join(place))}
    missing = [name for name in expected if name not in entry.tensors and not name.endswith("num_batches_tracked")]
    beside = [name for name in _beside(entry, stored, []) if entry.holds(name) and name.split(".")[-1] not in COUNTERS]
    problems = [
        f"{kind}: {listing(names)}"
        for kind, names in (
            ("missing", missing),
            ("not in the model", [name.removeprefix(f"{entry.name}.") for name in beside]),
            ("shapes differ", _misshapen(entry, expected)),
        )
        if names
    ]
    where = f" (behind {entry})" if entry.name else ""
    unread = f"; not read, being no tensors: {listing(refused)}" if refused else ""
    raise GdfqError(f"{complaint}{where}; {'; '.join(problems)}{unread}")


def listing(names: list[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
