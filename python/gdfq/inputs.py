"""Model and data as the command line names them: JSON values that a run keeps, and how to load both from these."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from gdfq.config import ModelConfig
from gdfq.data import LabeledImages, find_data, load_dataset
from gdfq.errors import GdfqError
from gdfq.graph import stated_channels, stated_size
from gdfq.models import load_model, parse_model_args

EVALUATION, CALIBRATION, TRAINING = "", "calibration_", "training_"  # before the names of values


def model_source(model: str, weights: Path | None, entry: str | None, model_args: list[str] | None) -> dict[str, Any]:
    """Where a model comes from."""
    file = weights and str(weights.absolute())
    return {"model": model, "weights": file, "weights_entry": entry, "model_args": model_args or []}


def data_source(
    data: str | None, kind: str | None, data_args: list[str] | None, purpose: str = EVALUATION
) -> dict[str, Any]:
    """Where images come from."""
    folder = data and (str(Path(data).absolute()) if Path(data).exists() else data)
    return {f"{purpose}data": folder, f"{purpose}data_kind": kind, f"{purpose}data_args": data_args or []}


def model_of(source: dict[str, Any]) -> nn.Module:
    """The model; errors as those of `load_model`."""
    arguments = parse_model_args(source["model_args"])
    return load_model(source["model"], source["weights"], source.get("weights_entry"), **arguments)


def data_of(
    source: dict[str, Any], model: nn.Module, settings: ModelConfig, purpose: str = EVALUATION
) -> LabeledImages | None:
    """The images, prepared as the model takes them, or None where there are none.

    Their size is `settings.image_size` or what the model says of itself, as are the channels; a folder of images is
    normalized, resized and cut as timm's models say, and a model with a `normalization` (an ONNX file) gets what that
    says. Options of the data go before.

    Raises:
        GdfqError: the size is not known; or as `load_dataset`.
    """
    if source[f"{purpose}data"] is None:
        return None
    data, kind, arguments = (source[f"{purpose}{key}"] for key in ("data", "data_kind", "data_args"))
    _, found = find_data(data, kind)
    options = parse_model_args(arguments)
    size = settings.image_size or stated_size(model)
    channels = settings.channels or stated_channels(model)
    if found == "folder":
        if size is None and "crop" not in options:
            raise GdfqError(
                f"{data} holds images of any size, and the one that the model takes is not known: give it as "
                "`--image-size`, for example 32 for CIFAR or 224 for most ImageNet models"
            )
        options = _of_timm(model, size, options) | options
    options = getattr(model, "normalization", {}) | options
    return load_dataset(data, kind, image_size=size, channels=channels, labeled=purpose != CALIBRATION, **options)


def _of_timm(model: nn.Module, size: int | tuple[int, int] | None, options: dict[str, Any]) -> dict[str, Any]:
    """What timm says of the images that its model was trained on."""
    known = getattr(model, "default_cfg", None) or {}
    found = {name: known[name] for name in ("mean", "std", "interpolation") if known.get(name)}
    if known.get("crop_pct") and size is not None and "crop" not in options:
        found["resize"] = math.floor(min(size if isinstance(size, tuple) else (size,)) / known["crop_pct"])
    return found
