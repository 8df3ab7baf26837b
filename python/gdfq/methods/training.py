"""What methods have in common: which images they take, and training."""

from typing import Any

from gdfq.config import Config
from gdfq.graph import CapturedModel
from gdfq.images import ImageSource
from gdfq.images.bank import Bank
from gdfq.methods.method import Task, source_name
from gdfq.registry import SOURCES
from gdfq.run.bank import keep, stored_bank
from gdfq.run.folder import deciding_settings
from gdfq.run.training_run import TrainingRun
from gdfq.train.trainer import Trainer


def images_of(task: Task) -> ImageSource:
    """The images that the settings choose: a bank from the file `images.file`, or those of a source."""
    if task.config.images.file is not None:
        return stored_bank(task.config.images.file, task.teacher, task.captured, task.config, task.device)
    return source_of(task, source_name(task.config))


def source_of(task: Task, name: str) -> ImageSource:
    """The image source of that name, for the task's model. A bank is kept in the run's folder."""
    source = SOURCES[name](task.teacher, task.captured, task.config, task.device, task.progress)
    if isinstance(source, Bank) and task.folder is not None:
        keep(source, task.folder, task.captured, name)
    return source


def train(task: Task, source: ImageSource, config: Config) -> tuple[Trainer, float]:
    """Train to the end, resumed where the task says so; returns the trainer and the seconds that it took."""
    trainer = Trainer(task.teacher, task.student, source, config)
    run = TrainingRun(trainer, task.folder, identity(task.captured, config))
    if task.resume:
        run.resume()
    run.train(task.progress)
    return trainer, run.seconds


def identity(captured: CapturedModel, config: Config) -> dict[str, Any]:
    """What a checkpoint belongs to: the weights, and every setting that changes what is computed."""
    identity: dict[str, Any] = {"weights": captured.digest, "image_shape": list(captured.image_shape)}
    return identity | deciding_settings(config)
