"""`gdfq export`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gdfq.cli.app import app, leave
from gdfq.cli.options import DataArgsOption, DataKindOption, DataOption, JsonOption, numbers
from gdfq.config import ModelConfig
from gdfq.errors import GdfqError


class Input(StrEnum):
    """What a file takes."""

    float = "float"
    uint8 = "uint8"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    out: Annotated[
        Path | None, typer.Option(help="the file, NAME.onnx; default: model.onnx in the run's folder")
    ] = None,
    input: Annotated[
        Input,
        typer.Option(
            help="float: images as the model takes them; uint8: pixels 0 to 255, which the file normalizes itself"
        ),
    ] = Input.float,
    pixel_mean: Annotated[
        str | None,
        typer.Option(
            help="that pixels in 0..1 are normalized by, a number or one a channel as 0.485,0.456,0.406; default: "
            "what the run's data or a timm model says"
        ),
    ] = None,
    pixel_std: Annotated[str | None, typer.Option(help="as --pixel-mean")] = None,
    integer_only: Annotated[
        bool, typer.Option("--integer-only", help="fail where something stays float, and name it")
    ] = False,
    verify: Annotated[bool, typer.Option(help="try in onnxruntime whether the file computes what Q does")] = True,
    images: Annotated[int, typer.Option(min=1, help="synthetic images to verify on")] = 512,
    data: DataOption = None,
    data_kind: DataKindOption = None,
    data_arg: DataArgsOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of onnxruntime; default: PyTorch's")] = None,
    opset: Annotated[int, typer.Option(min=21, help="of ONNX")] = 21,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a file that is there")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a run's result as an ONNX file in integers, and verify it; exit code 1 where it computes something else.

    What was found stands in a JSON file of the same name, too.

    Example: gdfq export runs/resnet20 --input uint8
    """
    from gdfq import inputs
    from gdfq.deploy.export import NotTheSame, Quantized, images_of
    from gdfq.deploy.export import export as write
    from gdfq.deploy.writer import Normalization
    from gdfq.run import folder as run_folder

    _, source = run_folder.read_run(run)
    if data is not None:
        source |= inputs.data_source(data, data_kind, data_arg)
    network = inputs.model_of(source)
    quantized = Quantized.of_run(run, network, images)
    channels, *size = quantized.image_shape
    dataset = inputs.data_of(source, network, ModelConfig(image_size=tuple(size), channels=channels))
    normalization = _normalization(numbers(pixel_mean), numbers(pixel_std), channels)
    if normalization is None and dataset is not None:
        normalization = Normalization(dataset.preparation.mean, dataset.preparation.std)
    try:
        exported = write(
            quantized,
            out or run / "model.onnx",
            input=input.value,
            normalization=normalization,
            integer_only=integer_only,
            verified=verify,
            real_images=None if dataset is None else images_of(dataset),
            classes=None if dataset is None else dataset.classes,
            threads=threads,
            opset=opset,
            overwrite=overwrite,
        )
    except NotTheSame as error:
        leave(f"gdfq: {error}", 1)
    typer.echo(json.dumps(exported.to_dict(), indent=2) if as_json else str(exported))


def _normalization(mean: Any, std: Any, channels: int) -> Any:
    from gdfq.deploy.writer import Normalization

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise GdfqError("--pixel-mean and --pixel-std belong together: give both")
    found = []
    for name, values in (("--pixel-mean", mean), ("--pixel-std", std)):
        values = values if isinstance(values, list) else [values] * channels
        if len(values) != channels or not all(isinstance(value, int | float) for value in values):
            raise GdfqError(f"{name}: it is a number, or {channels} with commas between them, one a channel")
        found.append([float(value) for value in values])
    if min(found[1]) <= 0:
        raise GdfqError("--pixel-std: a standard deviation is above 0")
    return Normalization(*found)
