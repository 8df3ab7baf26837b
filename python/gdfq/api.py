"""`quantize(model, config)`: from a trained model to a quantized one and a report."""

import copy
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq import ambient, memory, ranks
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.evaluate import Agreement, agreement, evaluate
from gdfq.fit import Fit, fit
from gdfq.graph import (
    CapturedModel,
    Summary,
    build_quantized,
    build_teacher,
    capture,
    infer,
    pixels_of,
    size_in_bytes,
    stated_size,
    unwrapped,
)
from gdfq.images.bank import by_class
from gdfq.images.generator import images_per_class
from gdfq.images.networks import Generator
from gdfq.images.real import check_labeled
from gdfq.memory import images_at_once
from gdfq.methods import Data, Method, Outcome, Task
from gdfq.methods.method import source_name
from gdfq.models import check_finite
from gdfq.precision import products_in_tf32
from gdfq.progress import draws_bars, plan, say
from gdfq.provenance import versions
from gdfq.registry import METHODS
from gdfq.run import folder as run_folder
from gdfq.run.files import save_tensors, write_text
from gdfq.run.report import Report, save_picture


@dataclass
class Result:
    """What `quantize` returns.

    Attributes:
        model: Q, `(N, C, H, W) -> (N, classes)`, an ordinary module in float that computes as the quantized one does.
        report: what was done and how good it is.
        generator: G, for the method `gdfq` where its images have one (not ZeroQ's or noise); None for other methods.
        held_out_images: synthetic batches `(N, C, H, W)` that Q was not trained on; the data-free figures are theirs.
        choice_state: Q's state dict at the epoch of `report.choice`; None where there is no such choice.
    """

    model: nn.Module
    report: Report
    generator: Generator | None
    held_out_images: list[Tensor]
    choice_state: dict[str, Tensor] | None = None


@products_in_tf32(False)
@ambient.of_its_own()
@ranks.one_run()
def quantize(
    model: nn.Module,
    config: Config | None = None,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    held_out_images: Iterable[Tensor] | None = None,
    calibrate_on: Any = None,
    train_on: Any = None,
    evaluate_on: Any = None,
    progress: bool = True,
    source: dict[str, Any] | None = None,
) -> Result:
    """Quantize `model`, without data unless a baseline is given some. The model itself is not changed.

    In a process group of torch.distributed all processes call it alike, share the work and return the same; the first
    one alone writes and speaks.

    Args:
        model: a trained classifier with BatchNorm layers, images `(N, C, H, W)` to logits `(N, classes)`.
        config: default: the preset `cifar` for images up to 64 pixels, else `imagenet`.
        run_dir: where log, checkpoints, models, picture and report go; None leaves no files and cannot be resumed.
        resume: continue the run in `run_dir` from its last checkpoint, bit for bit (from the start if it has none yet).
        held_out_images: batches for the data-free figures, to compare methods on the same; default: the method's own.
        calibrate_on: for the methods `calibrated`, `mse`, `aciq` and `kl`, a dataset of real images, alone or with
            labels; default: images are made, as the setting `calibration.images` says.
        train_on: for the method `finetune`, a dataset of real `(image, label)` pairs.
        evaluate_on: a dataset of real `(image, label)` pairs; gives top-1 in the report and decides nothing.
        progress: say on standard error what is done and how long it takes, with bars on a terminal.
        source: JSON values kept in `run_dir`: how the command line can load the model again.

    Raises:
        GdfqError: whatever the model, the settings or the files can have wrong, in words.
        gdfq.Stopped: Ctrl-C or SIGTERM.
    """
    model = unwrapped(model)
    config = config or Config.load(default_preset(model))
    method = METHODS[config.method]
    _check_real_images(method, calibrate_on, train_on)
    _check_bank(method, config, calibrate_on)
    device = device_named(config.run.device)
    check_finite(model)
    with memory.explained("the model alone", {"model.image_size": config.model.image_size or stated_size(model)}):
        captured = capture(model, config.model.image_size, config.model.channels, device)
    _check_classes(captured, config)
    if config.run.compile and ranks.count() > 1:
        raise GdfqError("setting 'run.compile' is for one process: leave it out where several ranks share a run")
    ranks.check_alike("weights and settings", [captured.digest, run_folder.deciding_settings(config)])
    if evaluate_on is not None:  # looked at before anything takes long
        check_labeled("evaluate_on", evaluate_on, captured.image_shape, captured.num_classes)
    folder = Path(run_dir) if run_dir is not None and ranks.is_first() else None
    progress = progress and ranks.is_first()
    with ranks.together():
        if folder is not None:
            run_folder.open_run(folder, config, device, resume, source)

    if progress:
        images = _images(method, config, calibrate_on)
        shape, classes = captured.image_shape, captured.num_classes
        for line in plan(
            type(model).__name__, shape, classes, config, method.help, images, method.amount(config), device, folder
        ):
            say(line)
    with memory.explained("the run", _sizes(config, captured), folder):
        teacher = build_teacher(captured)
        inferred = infer(teacher, captured.image_shape)
        captured = replace(captured, pixels=pixels_of(model, inferred, config.model))
        captured = method.prepare(captured)
        student, summary = build_quantized(captured, config.quantizer)
        task = Task(captured, teacher, student, config, device, folder, resume, progress, calibrate_on, train_on)
        outcome = method.run(task)
        held_out = list(outcome.held_out if held_out_images is None else held_out_images)
        data_free = agreement(teacher, student, held_out)
        judged = fit(teacher, held_out, inferred, outcome.same_source and held_out_images is None)

    report = _report(task, summary, outcome, data_free, judged, evaluate_on)
    result = Result(student, report, outcome.generator, held_out, outcome.choice_state or None)
    if folder is not None:
        _write(folder, result, captured)
    if evaluate_on is not None:
        _add_top1(task, outcome, evaluate_on, report)
    if folder is not None:
        _write_extras(folder, result, task, outcome.bank)
    return result


def default_preset(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> str:
    """The preset for images of the given size, or of the size that the model says of itself."""
    size = image_size or stated_size(model) or 0
    return "cifar" if max(size if isinstance(size, (tuple, list)) else (size,)) <= 64 else "imagenet"


# --- report and files --------------------------------------------------------------------------------------------


def _report(
    task: Task, summary: Summary, outcome: Outcome, data_free: Agreement, judged: Fit, evaluate_on: Any
) -> Report:
    given = {"calibration": task.calibrate_on, "training": task.train_on, "top-1": evaluate_on}
    prepared = {name: getattr(dataset, "preparation", None) for name, dataset in given.items()}
    float_bytes, quantized_bytes = size_in_bytes(task.captured, summary)
    return Report(
        config=task.config,
        summary=summary,
        pixels=task.captured.pixels,
        data_free=data_free,
        fit=judged,
        choice=outcome.choice,
        float_bytes=float_bytes,
        quantized_bytes=quantized_bytes,
        seconds=outcome.seconds,
        selected=outcome.selected,
        iterations=outcome.iterations,
        versions=versions(task.device),
        images={name: str(images) for name, images in prepared.items() if images is not None},
    )


def _add_top1(task: Task, outcome: Outcome, dataset: Any, report: Report) -> None:
    """The result is there, written or returned: what goes wrong with the user's data now is no reason to lose it."""
    try:
        report.top1 = _top1(task, outcome, dataset)
    except Exception as error:
        again = f"; mend it, then: gdfq evaluate {task.folder}" if task.folder is not None else ""
        warnings.warn(f"top-1 was not measured: {str(error) or type(error).__name__}{again}", stacklevel=6)


def _top1(task: Task, outcome: Outcome, dataset: Any) -> dict[str, float]:
    size = images_at_once(*task.captured.image_shape[1:])
    progress = task.progress and draws_bars()
    models = {"float": task.teacher, "quantized": task.student}
    if outcome.choice_state:
        models["choice"] = copy.deepcopy(task.student)
        models["choice"].load_state_dict(outcome.choice_state)
    return {
        name: evaluate(model, dataset, batch_size=size, device=task.device, progress=progress).top1
        for name, model in models.items()
    }


def _write(folder: Path, result: Result, captured: CapturedModel) -> None:
    run_folder.save_quantized(
        folder / run_folder.MODEL, result.model, result.report.config.quantizer, captured.image_shape
    )
    write_text(folder / run_folder.REPORT, result.report.to_json())


def _write_extras(folder: Path, result: Result, task: Task, bank: Tensor | None) -> None:
    """The report with top-1, generator and picture: what of it fails costs no result, which is there."""
    if result.report.top1:
        write_text(folder / run_folder.REPORT, result.report.to_json())
    generator, classes = result.generator, min(task.captured.num_classes, 10)
    extras: list[tuple[str, str, Callable[[], None]]] = []
    if isinstance(generator, Generator):
        extras.append((run_folder.GENERATOR, "written", lambda: _save_generator(folder, generator)))
        extras.append((run_folder.PICTURE, "drawn", lambda: _draw(folder, images_per_class(generator, classes, 10))))
    elif bank is not None:
        extras.append((run_folder.PICTURE, "drawn", lambda: _draw(folder, by_class(bank, task.teacher, classes, 10))))
    for name, what, write in extras:
        try:
            write()
        except Exception as error:
            warnings.warn(f"{name} was not {what}: {error}", stacklevel=6)


def _save_generator(folder: Path, generator: Generator) -> None:
    save_tensors(folder / run_folder.GENERATOR, generator.state_dict())


def _draw(folder: Path, rows: list[Tensor]) -> None:
    save_picture(folder / run_folder.PICTURE, rows, [f"class {label}" for label in range(len(rows))])


# --- checks ------------------------------------------------------------------------------------------------------


def _images(method: Method, config: Config, calibrate_on: Any) -> str | None:
    """Which ones Q is trained or calibrated on, in words, where the method alone does not say it."""
    if method.data is Data.LABELED or calibrate_on is not None:
        return "the images that were given"
    if not method.takes_bank:
        return None
    if config.images.file is not None:
        return f"images of {config.images.file}"
    return f"images from '{source_name(config)}'"


def _sizes(config: Config, captured: CapturedModel) -> dict[str, Any]:
    """The settings that decide how much memory the run takes."""
    values = {"calibration.count": config.calibration_images}  # where it is not set
    sizes = {name: values.get(name, operator.attrgetter(name)(config)) for name in METHODS[config.method].sizes}
    height, width = captured.image_shape[1:]
    return sizes | {"model.image_size": f"{height} x {width}", "run.precision": config.run.precision}


def device_named(name: str) -> torch.device:
    """The device of the setting `run.device`; raises `GdfqError` where it cannot be used."""
    if name in ("auto", "cuda") and ranks.device() is not None:
        return ranks.device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GdfqError(f"setting 'run.device' = '{name}' cannot be used here: {error}") from None
    return device


def _check_real_images(method: Method, calibrate_on: Any, train_on: Any) -> None:
    if method.data is Data.LABELED and train_on is None:
        raise GdfqError(
            f"method '{method.name}' trains on real labeled images: give them as `train_on` (`--training-data` on the "
            "command line), or take a method that needs none, as 'reconstruction'"
        )
    for given, taken, name in (
        (train_on, Data.LABELED, "`train_on` (`--training-data`)"),
        (calibrate_on, Data.IMAGES, "`calibrate_on` (`--calibration-data`)"),
    ):
        if given is not None and method.data is not taken:
            takers = ", ".join(other.name for other in METHODS.values() if other.data is taken)
            raise GdfqError(f"{name} is for the methods {takers}, but the method is '{method.name}': leave it out")


def _check_bank(method: Method, config: Config, calibrate_on: Any) -> None:
    if config.images.file is None:
        return
    if not method.takes_bank:
        takers = ", ".join(name for name, other in METHODS.items() if other.takes_bank)
        raise GdfqError(
            f"setting 'images.file' (`--images`) is for the methods {takers}, but the method is '{method.name}': leave "
            "it out"
        )
    if calibrate_on is not None:
        raise GdfqError(
            "both a bank, by the setting 'images.file' (`--images`), and `calibrate_on` (`--calibration-data`) are "
            "given: leave one out"
        )


def _check_classes(captured: CapturedModel, config: Config) -> None:
    if config.model.num_classes not in (None, captured.num_classes):
        raise GdfqError(
            f"setting 'model.num_classes' = {config.model.num_classes}, but the model returns {captured.num_classes} "
            "logits; leave it out or correct it"
        )
