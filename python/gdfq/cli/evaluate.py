"""`gdfq evaluate`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gdfq import ranks
from gdfq.cli.app import app
from gdfq.cli.options import (
    DataArgsOption,
    DataKindOption,
    DataOption,
    ImageSizeOption,
    JsonOption,
    ModelArgsOption,
    ModelOption,
    WeightsEntryOption,
    WeightsOption,
)
from gdfq.config import ModelConfig
from gdfq.errors import GdfqError


@app.command()
@ranks.started()
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="folder of a run, whose quantized model is evaluated, or an ONNX file")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    weights_entry: WeightsEntryOption = None,
    model_arg: ModelArgsOption = None,
    quantized: Annotated[
        Path | None, typer.Option(help="a quantized model (model.safetensors of a run) of --model's architecture")
    ] = None,
    data: DataOption = None,
    data_kind: DataKindOption = None,
    data_arg: DataArgsOption = None,
    image_size: ImageSizeOption = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 256,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Top-1 and top-5 on real labeled images, of a quantized or a float model, or an ONNX file in onnxruntime.

    Example: gdfq evaluate runs/resnet20 --data path/to/cifar-10-batches-py
    """
    import gdfq
    from gdfq import inputs
    from gdfq.run import folder as run_folder

    settings = ModelConfig(image_size=image_size)
    source: dict[str, Any] = {"data": None}
    is_onnx = run is not None and (run.is_file() or run.suffix == ".onnx")
    if is_onnx:
        from gdfq.deploy.classifier import OnnxClassifier

        _nothing_but_data(model=model, weights=weights, quantized=quantized, device=device != "cpu")
        network = OnnxClassifier(run)
        settings = _of_shape(run, image_size, network.in_size, network.channels)
    elif run is not None:
        _, source = run_folder.read_run(run)
        quantized = run / run_folder.MODEL
    elif model is not None:
        source = inputs.model_source(model, weights, weights_entry, model_arg)
    else:
        raise GdfqError("say what to evaluate: the folder of a run, an ONNX file, or --model SPEC (see --help)")
    if data is not None or run is None:
        source |= inputs.data_source(data, data_kind, data_arg)
    if source["data"] is None:
        raise GdfqError("say what to evaluate on: --data FOLDER, or --data fashion-mnist")
    if not is_onnx:
        network = inputs.model_of(source)
    if quantized is not None:
        channels, *size = run_folder.image_shape_of(quantized)
        settings = _of_shape(quantized, image_size, tuple(size), channels)
    dataset = inputs.data_of(source, network, settings)
    if quantized is not None:
        network = gdfq.load_quantized(quantized, network)
    figures = gdfq.evaluate(
        network, dataset, batch_size=batch_size, device=device,
        progress=not as_json and sys.stderr.isatty() and ranks.is_first(),
    )  # fmt: skip
    if not ranks.is_first():
        return
    text = f"top-1 {figures.top1:.2f}%  top-5 {figures.top5:.2f}%  {figures.images} images  {figures.seconds:.1f} s"
    prepared = dataset.preparation
    typer.echo(json.dumps(asdict(figures) | {"preparation": asdict(prepared)}) if as_json else f"{text}\n{prepared}")


def _of_shape(path: Path, image_size: int | None, size: tuple[int, int] | None, channels: int | None) -> ModelConfig:
    """Images as a stored network takes them; `size` is None where it takes several."""
    if None not in (image_size, size) and size != (image_size, image_size):
        raise GdfqError(f"{path} takes images of {size[0]} x {size[1]} pixels: leave out --image-size")
    return ModelConfig(image_size=size or image_size, channels=channels)


def _nothing_but_data(**options: object) -> None:
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise GdfqError(f"an ONNX file is all of a model, and runs on the CPU: leave out {', '.join(given)}")
