"""`gdfq quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from gdfq import ranks
from gdfq.cli.app import app
from gdfq.cli.options import (
    CalibrationDataArgsOption,
    CalibrationDataOption,
    DataArgsOption,
    DataKindOption,
    DataOption,
    ImageSizeOption,
    JsonOption,
    ModelArgsOption,
    ModelOption,
    TrainingDataArgsOption,
    TrainingDataOption,
    WeightsEntryOption,
    WeightsOption,
    listed,
    numbers,
)
from gdfq.config import DEFAULT_EFFORT, Config, parse_override, presets
from gdfq.errors import GdfqError
from gdfq.registry import METHODS, TARGETS


@app.command()
@ranks.started()
def quantize(
    out: Annotated[Path | None, typer.Option(help="new folder for models, log, checkpoints and report")] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    weights_entry: WeightsEntryOption = None,
    model_arg: ModelArgsOption = None,
    preset: Annotated[
        str | None, typer.Option(help=f"{', '.join(presets())}, or a TOML file; default: by image size")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="fast, default or best: how long the preset's method takes, as the preset says")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=listed(METHODS)),
    ] = None,
    weight_bits: Annotated[int | None, typer.Option(help="2 to 8; default 4")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="2 to 8; default 4")] = None,
    target: Annotated[
        str | None, typer.Option(help=f"{', '.join(TARGETS)}, or a TOML file, see gdfq targets; default onnx")
    ] = None,
    image_size: ImageSizeOption = None,
    input_mean: Annotated[
        str | None,
        typer.Option(
            help="of the images as the model takes them, 0 where pixels are standardized: a number, or one a channel "
            "as 104,117,124; default: inferred from the model"
        ),
    ] = None,
    input_std: Annotated[str | None, typer.Option(help="standard deviation of these images, as --input-mean")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N; default auto")] = None,
    seed: Annotated[int | None, typer.Option(help="default 0")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, any setting of the preset; may be repeated")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="a bank of images that an earlier run has made, images.safetensors in its folder, instead of new ones"
        ),
    ] = None,
    data: DataOption = None,
    data_kind: DataKindOption = None,
    data_arg: DataArgsOption = None,
    calibration_data: CalibrationDataOption = None,
    calibration_data_arg: CalibrationDataArgsOption = None,
    training_data: TrainingDataOption = None,
    training_data_arg: TrainingDataArgsOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="go on with the run in this folder; no other option needed; some settings may change"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a trained model without data.

    Example: gdfq quantize --model pytorchcv:resnet20_cifar10 --model-arg pretrained=True --out runs/resnet20

    On several GPUs: torchrun --nproc-per-node 8 -m gdfq quantize ...
    """
    from gdfq import inputs
    from gdfq.api import default_preset
    from gdfq.api import quantize as run
    from gdfq.run import folder as run_folder

    shortcuts = {
        "method": method,
        "quantizer.weight_bits": weight_bits,
        "quantizer.activation_bits": activation_bits,
        "quantizer.target": target,
        "model.image_size": image_size,
        "model.input_mean": numbers(input_mean),
        "model.input_std": numbers(input_std),
        "images.file": images and str(images.absolute()),
        "run.device": device,
        "run.seed": seed,
    }
    overrides = dict(parse_override(text) for text in settings or [])
    overrides |= {key: value for key, value in shortcuts.items() if value is not None}
    if resume is not None:
        _nothing_but_settings(
            out=out, model=model, weights=weights, weights_entry=weights_entry, model_arg=model_arg, preset=preset,
            effort=effort, data=data, data_kind=data_kind, data_arg=data_arg, calibration_data=calibration_data,
            calibration_data_arg=calibration_data_arg, training_data=training_data, training_data_arg=training_data_arg,
        )  # fmt: skip
        config, source = run_folder.read_run(resume, overrides)
    elif model is None or out is None:
        raise GdfqError("say what to quantize and where the result goes: --model SPEC --out FOLDER (see --help)")
    else:
        source = inputs.model_source(model, weights, weights_entry, model_arg)
        source |= inputs.data_source(data, data_kind, data_arg)
        source |= inputs.data_source(calibration_data, None, calibration_data_arg, inputs.CALIBRATION)
        source |= inputs.data_source(training_data, None, training_data_arg, inputs.TRAINING)
    network = inputs.model_of(source)
    if resume is None:
        preset = preset or default_preset(network, overrides.get("model.image_size"))
        config = Config.load(preset, overrides, effort or DEFAULT_EFFORT)
    folder = resume or out
    result = run(
        network,
        config,
        run_dir=folder,
        resume=resume is not None or ranks.is_restarted(),
        calibrate_on=inputs.data_of(source, network, config.model, inputs.CALIBRATION),
        train_on=inputs.data_of(source, network, config.model, inputs.TRAINING),
        evaluate_on=inputs.data_of(source, network, config.model),
        progress=not as_json,
        source=source,
    )
    if ranks.is_first():
        typer.echo(result.report.to_json() if as_json else f"{result.report}\nwritten      {folder}")


def _nothing_but_settings(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise GdfqError(
            f"--resume goes on with the model and the data that the run was started with: leave out {', '.join(given)}"
        )
