"""Models by name, and weights from files that cannot run code."""

import ast
import difflib
import importlib
import importlib.util
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gdfq.errors import GdfqError
from gdfq.run.files import load_tensors

SPEC_HELP = (
    "a model is given as pytorchcv:NAME, timm:NAME, torchvision:NAME, package.module:factory or "
    "path/to/file.py:factory, where factory is a callable that returns a torch.nn.Module"
)
LISTED = 5  # how many names an error lists before it says "and N more"
STATE_DICT_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "weights")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def load_model(spec: str, weights: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """The model that `spec` names, in eval mode, on the CPU unless its factory decides otherwise.

    Args:
        spec: `pytorchcv:NAME`, `timm:NAME`, `torchvision:NAME`, `package.module:factory` (the current folder is
            importable, as with `python -m`) or `path/to/file.py:factory`. The factory is a callable that returns a
            `torch.nn.Module`; a module instance is taken as it is.
        weights: a safetensors file, or a state dict saved with `torch.save`; None keeps what the factory made.
        kwargs: handed to the factory. `pretrained=True` asks pytorchcv, timm and torchvision for their own weights,
            which they download.

    Raises `GdfqError` for an unknown source or name, a factory that fails, weights that cannot be read or do not
    fit, and NaN or Inf in a parameter or buffer.
    """
    model = _build(spec, kwargs)
    if weights is not None:
        _load_into(model, read_state_dict(weights), f"{weights} does not fit {spec}")
    check_finite(model)
    return model.eval()


def parse_model_args(items: Iterable[str]) -> dict[str, Any]:
    """`["in_channels=1", "in_size=(28, 28)", "name=abc"]` as keyword arguments for `load_model`.

    A value is a Python literal; `true` and `false` count as one, anything else is text.
    Raises `GdfqError` for an item that is not `name=value`, a repeated name, and names that are not free.
    """
    arguments: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name.isidentifier():
            raise GdfqError(f"a model argument is name=value, for example in_channels=1; given: {item!r}")
        if name in ("spec", "weights"):
            raise GdfqError(f"{name} cannot be a model argument; a weights file has its own option")
        if name in arguments:
            raise GdfqError(f"the model argument {name} is given twice")
        arguments[name] = _literal(text)
    return arguments


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check_finite(model: nn.Module) -> None:
    """Raise `GdfqError`, naming the first tensors at fault, if a parameter or buffer holds NaN or Inf."""
    bad = [
        name
        for tensors in (model.named_parameters(), model.named_buffers())
        for name, tensor in tensors
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach()).all()
    ]
    if bad:
        raise GdfqError(
            f"the model's weights hold NaN or Inf in {_listing(bad)}; such a model predicts nothing: "
            "load a sound copy of the weights"
        )


# --- where a model comes from


def _build(spec: str, kwargs: dict[str, Any]) -> nn.Module:
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise GdfqError(f"{spec!r} does not name a model: {SPEC_HELP}")
    if source in ZOOS:
        factory = ZOOS[source](name)
    else:
        module = _module_from_file(Path(source)) if source.endswith(".py") else _module_by_name(source, spec)
        factory = _attribute(module, name, spec)
    if isinstance(factory, nn.Module) and not kwargs:
        return factory
    if isinstance(factory, nn.Module) or not callable(factory):
        raise GdfqError(f"{spec} is a {type(factory).__name__} and takes no arguments: {SPEC_HELP}")
    return _call(factory, spec, kwargs)


def _call(factory: Callable[..., Any], spec: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**kwargs)
    except GdfqError:
        raise
    except (Exception, SystemExit) as error:
        arguments = ", ".join(f"{name}={value!r}" for name, value in kwargs.items())
        raise GdfqError(f"the factory {spec} failed when called with ({arguments}): {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise GdfqError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module: {SPEC_HELP}")
    return model


def _pytorchcv(name: str) -> Callable[..., nn.Module]:
    provider = _import_zoo("pytorchcv", "pytorchcv.model_provider")
    known = getattr(provider, "_models", {})  # the package lists its names nowhere else
    if known and name.lower() not in known:
        raise GdfqError(_unknown_name("pytorchcv", name, known))
    return lambda **kwargs: provider.get_model(name, **kwargs)


def _timm(name: str) -> Callable[..., nn.Module]:
    timm = _import_zoo("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise GdfqError(_unknown_name("timm", name, timm.list_models()))
    return lambda **kwargs: timm.create_model(name, **kwargs)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    models = _import_zoo("torchvision", "torchvision.models")
    if name not in models.list_models():
        raise GdfqError(_unknown_name("torchvision", name, models.list_models()))

    def factory(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return models.get_model(name, weights="DEFAULT" if pretrained else None, **kwargs)

    return factory


ZOOS: dict[str, Callable[[str], Callable[..., nn.Module]]] = {
    "pytorchcv": _pytorchcv,
    "timm": _timm,
    "torchvision": _torchvision,
}


def _import_zoo(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise GdfqError(f"{package} is not installed; install it with: pip install {package}") from error
        raise GdfqError(f"{package} is installed but does not import here: {_reason(error)}") from error
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        raise GdfqError(f"{package} is installed but does not import here: {_reason(error)}") from error


def _module_by_name(source: str, spec: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # stays: the user's modules may import one another later
    importlib.invalidate_caches()
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
            close = _suggestion(source, ZOOS)
            raise GdfqError(f"{spec}: there is no module {source}{close}; {SPEC_HELP}") from error
        raise GdfqError(f"{spec}: importing {source} failed: {_reason(error)}") from error
    except (Exception, SystemExit) as error:
        raise GdfqError(f"{spec}: importing {source} failed: {_reason(error)}") from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise GdfqError(f"no such file: {path}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the file may import its neighbors, as with `python path/to/file.py`
    name = f"gdfq_model_{path.stem}"  # prefixed, so that a file called types.py shadows nothing
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise GdfqError(f"running {path} failed: {_reason(error)}") from error
    return module


def _attribute(module: ModuleType, name: str, spec: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        public = [other for other in vars(module) if not other.startswith("_")]
        where = getattr(module, "__file__", None) or module.__name__
        raise GdfqError(f"{spec}: {where} defines no {name}{_suggestion(name, public)}") from None


def _unknown_name(source: str, name: str, known: Iterable[str]) -> str:
    return f"{source} has no model called {name!r}{_suggestion(name.lower(), known)}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


# --- weights


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file or in a file of `torch.save`, on the CPU; no code in it is ever run.

    A training checkpoint is searched for its entry `state_dict`, `model_state_dict`, `model`, `net` or `weights`.
    Raises `GdfqError` when the file is missing, truncated, needs unrestricted pickle or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise GdfqError(f"no such weights file: {path}")
    with path.open("rb") as file:
        start = file.read(4)
    # A torch.save file is a zip archive, or, in its old form, a pickle; anything else must be safetensors.
    if start == b"PK\x03\x04" or start[:1] == b"\x80":
        return _find_state_dict(_torch_load(path), path)
    return load_tensors(path)[0]


def _torch_load(path: Path) -> Any:
    convert = "if you trust the file, load the model and save its weights alone: torch.save(model.state_dict(), FILE)"
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's advice on formats; the errors below say it in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise GdfqError(f"{path} is truncated or is no state dict; copy or download it again") from error
        raise GdfqError(
            f"{path} is truncated or holds more than tensors ({refused[1]}), and to read that could run any code; "
            f"{convert}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "TorchScript" in str(error):
            raise GdfqError(f"{path} is a TorchScript archive, not a state dict; {convert}") from error
        raise GdfqError(f"{path} is truncated or is no state dict ({_reason(error)})") from error


def _find_state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        entry = next((key for key in STATE_DICT_ENTRIES if isinstance(content.get(key), Mapping)), None)
        if entry is None and tensors:
            return tensors
        if entry is None:
            break
        content = content[entry]
    raise GdfqError(
        f"{path} holds no state dict: a mapping from names to tensors, alone or as the entry "
        f"{', '.join(STATE_DICT_ENTRIES)}, was looked for"
    )


def _load_into(model: nn.Module, state: dict[str, torch.Tensor], complaint: str) -> None:
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    state = _without_wrappers(state, expected)
    # Networks from before 2018 have no num_batches_tracked, and inference never reads it.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} (file {tuple(state[name].shape)}, model {tuple(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    problems = [
        f"{kind}: {_listing(names)}"
        for kind, names in (("missing", missing), ("not in the model", unexpected), ("shapes differ", misshapen))
        if names
    ]
    if problems:
        raise GdfqError(f"{complaint}; {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _without_wrappers(state: dict[str, torch.Tensor], expected: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Take off the prefixes that wrappers put before every name, unless the model itself uses them."""
    for _ in WRAPPER_PREFIXES:  # wrappers nest, in any order
        for prefix in WRAPPER_PREFIXES:
            own = any(name.startswith(prefix) for name in expected)
            if state and not own and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _reason(error: BaseException) -> str:
    first_line = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first_line[0]}" if first_line else type(error).__name__
