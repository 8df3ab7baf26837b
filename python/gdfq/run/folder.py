"""The folder of a run: what is in it, what it may be opened for, and how a quantized model is stored and read back."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from gdfq.config import Config, QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture
from gdfq.nn import BatchNormAct
from gdfq.provenance import versions
from gdfq.run.checkpoint import check_same
from gdfq.run.files import load_tensors, save_tensors, write_text

CONFIG = "config.toml"
SOURCE = "source.json"  # where model, weights and data came from; written by the command line
VERSIONS = "versions.json"
CHECKPOINT = "checkpoint.safetensors"
BLOCKS = "blocks.safetensors"  # the checkpoint of a reconstruction
LOG = "log.jsonl"
EVENTS = "tensorboard"
MODEL = "model.safetensors"
GENERATOR = "generator.safetensors"
IMAGES = "images.safetensors"  # a bank
IMAGES_PART = "images-part-{}.safetensors"  # of one that is being made
PICTURE = "images.png"
REPORT = "report.json"
DECIDING = ("seed", "precision", "held_out_images")  # of the section `run`, what decides what is computed
OF_THE_SHAPE = ("model.image_size", "model.channels", "model.num_classes")  # which the model is checked to have


def open_run(
    folder: Path, config: Config, device: torch.device, resume: bool, source: dict[str, Any] | None = None
) -> None:
    """Make the folder, and write down what is about to run.

    Raises:
        GdfqError: it cannot be written, it holds a run that is not to be resumed, or one of other settings.
    """
    if not resume and any((folder / name).exists() for name in (CONFIG, CHECKPOINT, BLOCKS, MODEL)):
        raise GdfqError(f"{folder} already holds a run: resume it (gdfq quantize --resume {folder}), or choose another")
    if (folder / CHECKPOINT).exists() and (folder / CONFIG).exists():
        check_same(folder / CHECKPOINT, deciding_settings(Config.load(folder / CONFIG)), deciding_settings(config))
    for unfinished in folder.glob(".*.tmp"):  # of a write that was killed, see `write_atomically`
        unfinished.unlink()
    if source is not None:
        write_text(folder / SOURCE, json.dumps(source, indent=2) + "\n")
    write_text(folder / VERSIONS, json.dumps(versions(device), indent=2) + "\n")
    write_text(folder / CONFIG, config.to_toml())


def deciding_settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is computed, by their names; the shape of images and logits aside."""
    settings = config.model_dump(mode="json")
    settings["run"] = {name: settings["run"][name] for name in DECIDING}
    sections = {name: values for name, values in settings.items() if isinstance(values, dict)}
    named = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    return {name: value for name, value in named.items() if name not in OF_THE_SHAPE} | {"method": config.method}


def read_run(folder: Path, overrides: dict[str, Any] | None = None) -> tuple[Config, dict[str, Any]]:
    """Configuration, with `{"section.key": value}` changed, and source of a run that the command line started.

    Raises:
        GdfqError: `folder` is not one, or as `Config.load`.
    """
    missing = [name for name in (CONFIG, SOURCE) if not (folder / name).is_file()]
    if missing:
        raise GdfqError(f"{folder} is not the folder of a run of `gdfq quantize`: it has no {' and no '.join(missing)}")
    return Config.load(folder / CONFIG, overrides), json.loads((folder / SOURCE).read_text())


def save_quantized(
    path: str | Path, model: nn.Module, config: QuantizerConfig, image_shape: tuple[int, int, int]
) -> None:
    """Store Q as safetensors: weights in float as trained, ranges, and how it is quantized; see `load_quantized`."""
    activations = {name: module.act for name, module in model.named_modules() if isinstance(module, BatchNormAct)}
    about = {
        "quantizer": config.model_dump_json(),
        "image_shape": json.dumps(image_shape),
        "activations": json.dumps(activations),  # DFQ replaces some of the architecture's
    }
    save_tensors(path, model.state_dict(), about)


def image_shape_of(path: str | Path) -> tuple[int, int, int]:
    """`(channels, height, width)` of a stored Q's images; errors as those of `load_quantized`."""
    return tuple(json.loads(_stored_model(path)[1]["image_shape"]))


def _stored_model(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = load_tensors(path)
    if "quantizer" not in metadata:
        raise GdfqError(f"{path} is a safetensors file, but not a quantized model written by this package")
    return tensors, metadata


def load_quantized(path: str | Path, model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Read a stored Q. `model` is the float model's architecture; its weights are not used and not changed.

    Raises:
        GdfqError: the file is broken, not a quantized model, or of another architecture.
    """
    tensors, metadata = _stored_model(path)
    try:
        config = QuantizerConfig.model_validate_json(metadata["quantizer"])
    except ValidationError:
        raise GdfqError(
            f"{path} was written by a version whose quantizer had other settings; read it with that one"
        ) from None
    channels, *size = json.loads(metadata["image_shape"])
    captured = capture(model, tuple(size), channels, device)
    student, _ = build_quantized(captured, config)
    try:
        student.load_state_dict(tensors)
        student.to(device)  # stored weights come from the file's
        for name, act in json.loads(metadata["activations"]).items():
            student.get_submodule(name).act = act
    except (RuntimeError, AttributeError, IndexError) as error:
        raise GdfqError(f"{path} does not fit this architecture: {error}") from None
    return student
