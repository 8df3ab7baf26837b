"""Models by name."""

import ast
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gdfq.errors import GdfqError
from gdfq.weights import listing, load_weights

SPEC_HELP = (
    "a model is given as pytorchcv:NAME, timm:NAME, torchvision:NAME, package.module:factory or "
    "path/to/file.py:factory, where factory is a callable that returns a torch.nn.Module"
)


def load_model(
    spec: str, weights: str | Path | None = None, weights_entry: str | None = None, **kwargs: Any
) -> nn.Module:
    """The model that `spec` names, in eval mode, on the CPU unless its factory decides otherwise.

    Args:
        spec: `pytorchcv:NAME`, `timm:NAME`, `torchvision:NAME`, `package.module:factory` (the current folder is
            importable, as with `python -m`) or `path/to/file.py:factory`. The factory is a callable that returns a
            `torch.nn.Module`; a module instance is taken as it is.
        weights: a safetensors file, or a state dict or checkpoint saved with `torch.save`; None keeps what the factory
            made. See `gdfq.weights.load_weights` for what is understood.
        weights_entry: which weights, where the file holds several sets of them: what stands before their names, as
            `state_dict_ema`. Default: a moving average, if that is the only other one, and a warning says so.
        kwargs: handed to the factory. `pretrained=True` asks pytorchcv, timm and torchvision for their own weights,
            which they download.

    Raises `GdfqError` for an unknown source or name, a factory that fails, weights that cannot be read or do not
    fit, and NaN or Inf in a parameter or buffer.
    """
    model = _build(spec, kwargs)
    if weights is not None:
        load_weights(model, weights, weights_entry, f"{weights} does not fit {spec}")
    elif weights_entry is not None:
        raise GdfqError(f"'{weights_entry}' names an entry of a weights file, but none is given: `--weights FILE`")
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
        if name in ("spec", "weights", "weights_entry"):
            raise GdfqError(f"{name} cannot be a model argument; a weights file has options of its own")
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
            f"the model's weights hold NaN or Inf in {listing(bad)}; such a model predicts nothing: "
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


def _reason(error: BaseException) -> str:
    first_line = str(error).strip().splitlines()[:1]
    return f"{type(error).__name__}: {first_line[0]}" if first_line else type(error).__name__
