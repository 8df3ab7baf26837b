"""Options that several commands have, and how their values are read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gdfq.config import parse_override
from gdfq.methods import Data
from gdfq.registry import METHODS, Registry


def listed(registry: Registry) -> str:
    return "; ".join(f"{name}: {known.help}" for name, known in registry.items())


def taking(data: Data) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.data is data)


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="pytorchcv:NAME, timm:NAME, torchvision:NAME, package.module:factory or path/to/file.py:factory",
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="trained weights: a safetensors file, a .pth state dict or checkpoint (never unpickled freely)"),
]
WeightsEntryOption = Annotated[
    str | None,
    typer.Option(
        help="which weights of a file that holds several, as state_dict_ema; default: a moving average, where there is "
        "one, and it is said"
    ),
]
ModelArgsOption = Annotated[
    list[str] | None, typer.Option("--model-arg", help="name=value for the factory; may be repeated")
]
CalibrationDataOption = Annotated[
    str | None,
    typer.Option(
        help=f"real images for the methods {taking(Data.IMAGES)}: a folder as for --data, with classes or without; "
        "default: images are made, see the setting calibration.images"
    ),
]
CalibrationDataArgsOption = Annotated[
    list[str] | None,
    typer.Option("--calibration-data-arg", help="name=value, for example split=train; may be repeated"),
]
TrainingDataOption = Annotated[
    str | None,
    typer.Option(help=f"real labeled images for the methods {taking(Data.LABELED)}: a folder as for --data"),
]
TrainingDataArgsOption = Annotated[
    list[str] | None,
    typer.Option("--training-data-arg", help="name=value, for example split=train; may be repeated"),
]
DataOption = Annotated[
    str | None,
    typer.Option(help="real labeled images, for evaluation only: a folder, or fashion-mnist (built in)"),
]
DataKindOption = Annotated[
    str | None, typer.Option(help="fashion-mnist, cifar10, cifar100 or folder; default: read off the folder")
]
DataArgsOption = Annotated[
    list[str] | None,
    typer.Option("--data-arg", help="name=value, for example mean=[0.5,0.5,0.5] or crop=224; may be repeated"),
]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="pixels, that the model takes; default: what it says of itself")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on standard output, nothing else")]


def numbers(text: str | None) -> Any:
    """One number, or several with commas between them; what is neither stays as it is, for the setting to refuse."""
    if text is None:
        return None
    _, values = parse_override(f"numbers=[{text}]")
    return values if isinstance(values, str) or len(values) > 1 else values[0]
