"""The command line: `gdfq quantize`, `gdfq evaluate`, `gdfq targets`, `gdfq reproduce`, `gdfq doctor`."""

import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gdfq.config import Config, ModelConfig, parse_override, presets
from gdfq.errors import GdfqError
from gdfq.methods import Data
from gdfq.registry import METHODS, TARGETS, Registry

app = typer.Typer(
    help="Data-free quantization of CNNs: a trained network in, a low-bit network out, no data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _listed(registry: Registry) -> str:
    return "; ".join(f"{name}: {known.help}" for name, known in registry.items())


def _taking(data: Data) -> str:
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
        help=f"real images for the methods {_taking(Data.IMAGES)}: a folder as for --data, with classes or without; "
        "default: images are made, see the setting calibration.images"
    ),
]
CalibrationDataArgsOption = Annotated[
    list[str] | None,
    typer.Option("--calibration-data-arg", help="name=value, for example split=train; may be repeated"),
]
TrainingDataOption = Annotated[
    str | None,
    typer.Option(help=f"real labeled images for the methods {_taking(Data.LABELED)}: a folder as for --data"),
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


@app.command()
def quantize(
    out: Annotated[Path | None, typer.Option(help="new folder for models, log, checkpoints and report")] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    weights_entry: WeightsEntryOption = None,
    model_arg: ModelArgsOption = None,
    preset: Annotated[
        str | None, typer.Option(help=f"{', '.join(presets())}, or a TOML file; default: by image size")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=_listed(METHODS)),
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
        "model.input_mean": _numbers(input_mean),
        "model.input_std": _numbers(input_std),
        "run.device": device,
        "run.seed": seed,
    }
    overrides = dict(parse_override(text) for text in settings or [])
    overrides |= {key: value for key, value in shortcuts.items() if value is not None}
    if resume is not None:
        _nothing_but_settings(
            out=out, model=model, weights=weights, weights_entry=weights_entry, model_arg=model_arg, preset=preset,
            data=data, data_kind=data_kind, data_arg=data_arg, calibration_data=calibration_data,
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
        config = Config.load(preset or default_preset(network, overrides.get("model.image_size")), overrides)
    folder = resume or out
    result = run(
        network,
        config,
        run_dir=folder,
        resume=resume is not None,
        calibrate_on=inputs.data_of(source, network, config.model, inputs.CALIBRATION),
        train_on=inputs.data_of(source, network, config.model, inputs.TRAINING),
        evaluate_on=inputs.data_of(source, network, config.model),
        progress=not as_json,
        source=source,
    )
    typer.echo(result.report.to_json() if as_json else f"{result.report}\nwritten      {folder}")


@app.command()
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
        from gdfq.export.classifier import OnnxClassifier

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
        network, dataset, batch_size=batch_size, device=device, progress=not as_json and sys.stderr.isatty()
    )
    text = f"top-1 {figures.top1:.2f}%  top-5 {figures.top5:.2f}%  {figures.images} images  {figures.seconds:.1f} s"
    prepared = dataset.preparation
    typer.echo(json.dumps(asdict(figures) | {"preparation": asdict(prepared)}) if as_json else f"{text}\n{prepared}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="table1 to table9, or figure1")],
    out: Annotated[Path, typer.Option(help="folder for the results; tables may share one")] = Path("reproduce-output"),
    offline: Annotated[
        bool, typer.Option("--offline", help="on the network and images that the package ships, with no download")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER, NAME being cifar10, cifar100 or imagenet (val/ and train/); may be repeated"),
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="NETWORK=FILE instead of pytorchcv's weights; may be repeated")
    ] = None,
    models: Annotated[list[str] | None, typer.Option(help="only this NETWORK; may be repeated")] = None,
    cell: Annotated[int | None, typer.Option(help="only the cell of this number, for a scheduler; see --list")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="default 0; may be repeated")] = None,
    scale: Annotated[float, typer.Option(help="factor on the length of training, below 1 for a trial")] = 1.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, for all cells; may be repeated")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="keep what --out holds, and do the rest")] = False,
    list_cells: Annotated[
        bool, typer.Option("--list", help="the table's cells by number, and what they lack; runs nothing")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a table or the figure of the paper again, beside the published figures.

    Example: gdfq reproduce table5 --offline
    """
    from gdfq.reproduce import render
    from gdfq.reproduce.figure1 import figure1
    from gdfq.reproduce.grid import Grid

    progress = not as_json and sys.stderr.isatty()
    if name == "figure1":
        if data or weights or models or cell is not None or settings or list_cells or len(seeds or []) > 1:
            raise GdfqError("figure1 has no cells and takes no data: give --out, --scale, --json and one --seeds alone")
        result = figure1(out, *(seeds or []), scale=scale, progress=progress)
        typer.echo(json.dumps(result) if as_json else f"written to {out}: figure1.png, figure1.json")
        return
    grid = Grid(
        name,
        out,
        is_offline=offline,
        data=data or (),
        weights=weights or (),
        models=models or (),
        number=cell,
        seeds=seeds or (0,),
        scale=scale,
        settings=dict(parse_override(text) for text in settings or []),
    )
    if list_cells:
        listed = grid.listing()
        typer.echo(json.dumps(listed) if as_json else render.listing(listed))
        return
    result = grid.run(resume, progress, say=lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(result) if as_json else render.markdown(result))
    if grid.failed:
        _exit(f"gdfq: {len(grid.failed)} cells failed, the first: {next(iter(grid.failed.values()))}", 1)


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List what the quantized network can be made to run on, and what each means for the quantizer.

    A target of your own is a TOML table of what differs from one of these, in a file for --target or as the setting
    quantizer.target:

        extends = "onnx"
        name = "my accelerator"
        weight_scheme = "symmetric"
    """
    known = {name: target.model_dump(mode="json") for name, target in TARGETS.items()}
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    from gdfq.target import Target

    for name, values in known.items():
        typer.echo(f"{name}: {values['help']}")
        for key, value in values.items():
            if key not in ("name", "help"):
                shown = ", ".join(value) if isinstance(value, list) else "-" if value in (None, {}) else value
                typer.echo(f"  {key:18} {shown}")
    typer.echo("\nwhat each key says:")
    for key, field in Target.model_fields.items():
        if field.description:
            typer.echo(f"  {key:18} {field.description}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this installation can do: versions, devices, and which kernels every op uses and why."""
    import gdfq_ext
    from gdfq.provenance import versions

    build = gdfq_ext.build_info()
    backends = gdfq_ext.backend_report()
    if as_json:
        typer.echo(json.dumps({"versions": versions(), "build": build, "backends": backends.as_dict()}, indent=2))
        return
    for title, entries in (("versions", versions()), ("build", build or {"extension": "not built"})):
        typer.echo(title)
        for name, value in entries.items():
            typer.echo(f"  {name:18} {value}")
    typer.echo(str(backends))


def _of_shape(path: Path, image_size: int | None, size: tuple[int, int] | None, channels: int | None) -> ModelConfig:
    """Images as a stored network takes them; `size` is None where it takes several."""
    if None not in (image_size, size) and size != (image_size, image_size):
        raise GdfqError(f"{path} takes images of {size[0]} x {size[1]} pixels: leave out --image-size")
    return ModelConfig(image_size=size or image_size, channels=channels)


def _nothing_but_data(**options: object) -> None:
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise GdfqError(f"an ONNX file is all of a model, and runs on the CPU: leave out {', '.join(given)}")


def _nothing_but_settings(**options: object) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise GdfqError(
            f"--resume goes on with the model and the data that the run was started with: leave out {', '.join(given)}"
        )


def _numbers(text: str | None) -> Any:
    """One number, or several with commas between them; what is neither stays as it is, for the setting to refuse."""
    if text is None:
        return None
    _, values = parse_override(f"numbers=[{text}]")
    return values if isinstance(values, str) or len(values) > 1 else values[0]


def main() -> None:
    """Run the command line: 0 after success, 2 after an error that is the user's to mend, 130 after Ctrl-C."""
    from gdfq.run.training_run import Stopped

    warnings.formatwarning = _one_line
    try:
        app(prog_name="gdfq", standalone_mode=False)
    except Stopped as stopped:
        _exit(str(stopped), 130)
    except GdfqError as error:
        _exit(f"gdfq: {error}", 2)
    except KeyboardInterrupt:
        _exit("gdfq: interrupted", 130)
    except typer.Abort:
        _exit("gdfq: aborted", 130)
    except Exception as error:
        show = getattr(error, "show", None)  # an error of usage: typer says it better
        if show is None:
            raise
        show()
        sys.exit(2)


_standard_format = warnings.formatwarning


def _one_line(message: Warning | str, category: type[Warning], *where: Any) -> str:
    """A warning that is meant for the user, without the line of code that it is from."""
    return f"gdfq: {message}\n" if category is UserWarning else _standard_format(message, category, *where)


def _exit(message: str, code: int) -> None:
    typer.echo(message, err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
