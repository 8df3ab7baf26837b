"""`quantize(model, config)`: from a trained model to a quantized one and a report."""

import copy
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdfq import run_folder
from gdfq.baselines.clipping import RULES, clip
from gdfq.baselines.dfq import dfq, replace_relu6
from gdfq.baselines.finetune import FineTuner
from gdfq.baselines.images import (
    SyntheticImages,
    TrainingImages,
    calibration_batches,
    gaussian,
    generated,
    warm_up_only,
)
from gdfq.baselines.zeroq import zeroq
from gdfq.calibrate import Agreement, agreement, calibrate
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.evaluate import evaluate
from gdfq.files import save_tensors, write_text
from gdfq.generator import Generator, images_per_class
from gdfq.graph import Account, CapturedModel, Teacher, build_quantized, build_teacher, capture, size_in_bytes
from gdfq.models import check_finite
from gdfq.precision import products_in_tf32
from gdfq.provenance import versions
from gdfq.report import Report, save_picture
from gdfq.trainer import Trainer
from gdfq.training_run import TrainingRun


@dataclass
class Result:
    """What `quantize` returns.

    Attributes:
        model: Q, `(N, C, H, W) -> (N, classes)`, an ordinary module in float that computes as the quantized one does.
        report: what was done and how good it is.
        generator: G, for the method `gdfq`; None for the baselines.
        held_out_images: synthetic batches `(N, C, H, W)` that Q was not trained on; the data-free figures are theirs.
        choice_state: Q's state dict at the epoch of `report.data_free_choice`; None where there is no such choice.
    """

    model: nn.Module
    report: Report
    generator: Generator | None
    held_out_images: list[Tensor]
    choice_state: dict[str, Tensor] | None = None


@products_in_tf32(False)
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
        progress: show progress bars on standard error.
        source: JSON values kept in `run_dir`: how the command line can load the model again.

    Raises:
        GdfqError: whatever the model, the settings or the files can have wrong, in words.
        gdfq.Stopped: Ctrl-C or SIGTERM.
    """
    config = config or Config.load(default_preset(model))
    _check_real_images(config.method, calibrate_on, train_on)
    device = device_named(config.run.device)
    check_finite(model)
    captured = capture(model, config.model.image_size, config.model.channels, device)
    _check_classes(captured, config)
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        run_folder.open_run(folder, config, device, resume, source)

    teacher = build_teacher(captured)
    if config.method == "dfq":
        captured = replace_relu6(captured)
    student, account = build_quantized(captured, config.quantizer)
    task = _Task(captured, teacher, student, config, device, folder, resume, progress, calibrate_on, train_on)
    outcome = _METHODS[config.method](task)

    held_out = list(outcome.held_out if held_out_images is None else held_out_images)
    report = _report(task, account, outcome, agreement(teacher, student, held_out))
    if evaluate_on is not None:
        report.top1 = _top1(task, outcome, evaluate_on)
    result = Result(student, report, outcome.generator, held_out, outcome.choice_state or None)
    if folder is not None:
        _write(folder, result, captured)
    return result


def default_preset(model: nn.Module, image_size: int | None = None) -> str:
    """The preset for images of the given size, or of the size that the model says of itself."""
    timm_size = (getattr(model, "default_cfg", None) or {}).get("input_size", (0,))
    size = image_size or getattr(model, "in_size", None) or timm_size[-1]
    return "cifar" if max(size if isinstance(size, tuple) else (size,)) <= 64 else "imagenet"


# --- the methods, behind one interface ---------------------------------------------------------------------------


@dataclass
class _Task:
    """What a method is given; it calibrates or trains the student in place."""

    captured: CapturedModel
    teacher: Teacher
    student: nn.Module
    config: Config
    device: torch.device
    folder: Path | None
    resume: bool
    progress: bool
    calibrate_on: Any
    train_on: Any


@dataclass
class _Outcome:
    """What a method leaves behind besides the student."""

    held_out: Iterable[Tensor]
    seconds: float
    generator: Generator | None = None
    kept: str = "calibrated"
    choice: tuple[int, Agreement] | None = None
    choice_state: dict[str, Tensor] | None = None
    execution: str = "eager"


def _gdfq(task: _Task) -> _Outcome:
    trainer = Trainer(task.teacher, task.student, task.captured, task.config)
    seconds = _train(task, trainer)
    kept = "calibrated" if _calibration_is_better(task, trainer) else "trained"
    return _Outcome(
        trainer.held_out_images(), seconds, trainer.generator, kept, trainer.best, trainer.best_student,
        trainer.execution.description,
    )  # fmt: skip


def _train(task: _Task, trainer: Trainer) -> float:
    """Train to the end, resumed where the task says so; returns the seconds it took."""
    run = TrainingRun(trainer, task.folder, _identity(task.captured, trainer.config))
    if task.resume:
        run.resume()
    run.train(task.progress)
    return run.seconds


def _calibration_is_better(task: _Task, trainer: Trainer) -> bool:
    """Take plain calibration over where it is better by a data-free criterion.

    From 6 bits on published GDFQ can fall below it (ResNet-18 at W8A8); the criterion is the KL on held-out images.
    """
    quantizer, schedule = task.config.quantizer, task.config.schedule
    if not schedule.compare_with_calibration or min(quantizer.weight_bits, quantizer.activation_bits) < 6:
        return False
    calibrated, _ = build_quantized(task.captured, quantizer)
    calibrate(calibrated, trainer.fresh_images(schedule.range_batches))
    trained = trainer.held_out_agreement()
    if agreement(task.teacher, calibrated, trainer.held_out_images()).kl >= trained.kl:
        return False
    task.student.load_state_dict(calibrated.state_dict())
    return True


def _finetune(task: _Task) -> _Outcome:
    shape, classes = task.captured.image_shape, task.captured.num_classes
    images = TrainingImages(task.train_on, shape, classes, task.config, task.device)
    trainer = FineTuner(task.teacher, task.student, task.captured, task.config, images)
    seconds = _train(task, trainer)
    return _Outcome(
        trainer.held_out_images(), seconds, kept="trained", choice=trainer.best, choice_state=trainer.best_student
    )


def _calibrated(task: _Task, images: SyntheticImages) -> None:
    calibrate(task.student, images.calibration)


def _baseline(method: Callable[[_Task, SyntheticImages], None], source: str | None = None) -> Callable:
    """A method without training: what it does with images, and which ones; default: the user's, or made as set."""

    def run(task: _Task) -> _Outcome:
        start = time.monotonic()
        if source is None and task.calibrate_on is not None:
            real = calibration_batches(task.calibrate_on, task.captured.image_shape, task.config, task.device)
            images = _images(task, "gaussian")._replace(calibration=real)
        else:
            images = _images(task, source or task.config.calibration.images)
        method(task, images)
        return _Outcome(images.held_out, time.monotonic() - start)

    return run


def _images(task: _Task, source: str) -> SyntheticImages:
    shape, config, device = task.captured.image_shape, task.config, task.device
    if source == "zeroq":
        return zeroq(task.teacher, shape, config, device, task.progress)
    if source == "generator":
        trainer = Trainer(task.teacher, task.student, task.captured, warm_up_only(config))
        _train(task, trainer)
        return generated(trainer)
    return gaussian(shape, config, device)


def _clipped(rule: str) -> Callable[[_Task], _Outcome]:
    return _baseline(lambda task, images: clip(task.student, list(images.calibration), rule))


_METHODS: dict[str, Callable[[_Task], _Outcome]] = {
    "gdfq": _gdfq,
    "zeroq": _baseline(_calibrated, "zeroq"),
    "dfq": _baseline(lambda task, images: dfq(task.student, images.calibration), "gaussian"),
    "minmax": _baseline(_calibrated, "gaussian"),
    "calibrated": _baseline(_calibrated),
    **{rule: _clipped(rule) for rule in RULES},
    "finetune": _finetune,
}
_CALIBRATED_ON_REAL_IMAGES = ("calibrated", *RULES)


# --- report and files --------------------------------------------------------------------------------------------


def _report(task: _Task, account: Account, outcome: _Outcome, data_free: Agreement) -> Report:
    float_bytes, quantized_bytes = size_in_bytes(task.captured, account)
    return Report(
        config=task.config,
        account=account,
        data_free=data_free,
        data_free_choice=outcome.choice,
        float_bytes=float_bytes,
        quantized_bytes=quantized_bytes,
        seconds=outcome.seconds,
        kept=outcome.kept,
        execution=outcome.execution,
        versions=versions(task.device),
    )


def _top1(task: _Task, outcome: _Outcome, dataset: Any) -> dict[str, float]:
    models = {"float": task.teacher, "quantized": task.student}
    if outcome.choice_state:
        models["data_free_choice"] = copy.deepcopy(task.student)
        models["data_free_choice"].load_state_dict(outcome.choice_state)
    return {
        name: evaluate(model, dataset, device=task.device, progress=task.progress).top1
        for name, model in models.items()
    }


def _write(folder: Path, result: Result, captured: CapturedModel) -> None:
    run_folder.save_quantized(
        folder / run_folder.MODEL, result.model, result.report.config.quantizer, captured.image_shape
    )
    if result.generator is not None:
        save_tensors(folder / run_folder.GENERATOR, result.generator.state_dict())
        rows = images_per_class(result.generator, min(captured.num_classes, 10), count=10)
        save_picture(folder / run_folder.PICTURE, rows, [f"class {label}" for label in range(len(rows))])
    write_text(folder / run_folder.REPORT, result.report.to_json())


# --- checks ------------------------------------------------------------------------------------------------------


def device_named(name: str) -> torch.device:
    """The device of the setting `run.device`; raises `GdfqError` where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GdfqError(f"setting 'run.device' = '{name}' cannot be used here: {error}") from None
    return device


def _check_real_images(method: str, calibrate_on: Any, train_on: Any) -> None:
    if method == "finetune" and train_on is None:
        raise GdfqError(
            "method 'finetune' trains on real labelled images: give them as `train_on` (`--training-data` on the "
            "command line), or take a method that needs none, as 'gdfq'"
        )
    if method != "finetune" and train_on is not None:
        raise GdfqError(
            f"`train_on` (`--training-data`) is for method 'finetune', but the method is '{method}': leave it out"
        )
    if method not in _CALIBRATED_ON_REAL_IMAGES and calibrate_on is not None:
        raise GdfqError(
            f"`calibrate_on` (`--calibration-data`) is for the methods {', '.join(_CALIBRATED_ON_REAL_IMAGES)}, but "
            f"the method is '{method}': leave it out or choose one of these"
        )


def _check_classes(captured: CapturedModel, config: Config) -> None:
    if config.model.num_classes not in (None, captured.num_classes):
        raise GdfqError(
            f"setting 'model.num_classes' = {config.model.num_classes}, but the model returns {captured.num_classes} "
            "logits; leave it out or correct it"
        )


def _identity(captured: CapturedModel, config: Config) -> dict[str, Any]:
    """What a checkpoint belongs to: the weights, and every setting that changes what is computed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(captured.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    identity = {"weights": digest.hexdigest()[:16], "image_shape": list(captured.image_shape)}
    for section in ("quantizer", "generator", "student", "schedule"):
        values = getattr(config, section).model_dump(mode="json")
        identity |= {f"{section}.{key}": value for key, value in values.items()}
    run = config.run
    return identity | {"seed": run.seed, "precision": run.precision, "held_out_images": run.held_out_images}
