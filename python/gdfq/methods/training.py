"""What methods have in common: which images they take, and training."""

from typing import Any

from torch import Tensor

from gdfq.config import Config
from gdfq.graph import CapturedModel
from gdfq.images import ImageSource
from gdfq.images.bank import Bank, seed_of_part
from gdfq.images.transforms import build_transform
from gdfq.memory import images_at_once
from gdfq.methods.method import Task, source_name
from gdfq.random_state import RandomState
from gdfq.registry import SOURCES
from gdfq.run.bank import keep, stored_bank
from gdfq.run.folder import deciding_settings
from gdfq.run.monitor import stopping_at_once
from gdfq.run.training_run import Stopped, TrainingRun
from gdfq.train.trainer import Trainer


def images_of(task: Task) -> ImageSource:
    """The images that the settings choose: a bank from the file `images.file`, or those of a source."""
    if task.config.images.file is not None:
        return stored_bank(task.config.images.file, task.teacher, task.captured, task.config, task.device)
    return source_of(task, source_name(task.config))


def bank_of(task: Task) -> Bank:
    """A fixed bank, as the settings choose it: from the file `images.file`, or of a source that makes one; of any other
    source `images.bank` images, drawn when it has learned what it learns before Q is trained."""
    source = images_of(task)
    if isinstance(source, Bank):
        return source
    source = learned(task, source)
    source.transform = build_transform({})  # the bank has it

    def make(count: int, part: int) -> Tensor:
        source.random = RandomState(seed_of_part(task.config, part), task.device)
        return source.images(count)[0]

    shape, settings = task.captured.image_shape, deciding_settings(task.config)
    most = images_at_once(*shape[1:])
    bank = Bank.in_parts(task.teacher, shape, task.config, task.device, make, task.config.images.bank, most, settings)
    return _kept(task, bank, source_name(task.config))


def source_of(task: Task, name: str) -> ImageSource:
    """The image source of that name, for the task's model. A bank is kept in the run's folder, and can be stopped."""
    source = SOURCES[name](task.teacher, task.captured, task.config, task.device, task.progress)
    return _kept(task, source, name) if isinstance(source, Bank) else source


def _kept(task: Task, bank: Bank, source: str) -> Bank:
    if task.folder is not None:
        keep(bank, task.folder, task.captured, source)
    bank.while_made = lambda: stopping_at_once(lambda: Stopped(_how_to_go_on(task)))
    return bank


def _how_to_go_on(task: Task) -> str:
    where = "stopped while a bank of images was made"
    if task.folder is None:
        return where
    return f"{where}; its finished parts are saved. To go on: gdfq quantize --resume {task.folder}"


def learned(task: Task, source: ImageSource) -> ImageSource:
    """A source that has learned what it learns before Q is trained."""
    if source.learns:
        train(task, source, warm_up_only(task.config))
    return source


def warm_up_only(config: Config) -> Config:
    """The configuration of a run that ends where Q would first be stepped."""
    schedule = config.schedule.model_copy(update={"epochs": config.schedule.warmup_epochs})
    return config.model_copy(update={"schedule": schedule})


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
