"""What methods that train have in common."""

import hashlib
from typing import Any

import torch

from gdfq.config import Config
from gdfq.graph import CapturedModel
from gdfq.images import ImageSource
from gdfq.methods.method import Task
from gdfq.registry import SOURCES
from gdfq.run.folder import deciding_settings
from gdfq.run.training_run import TrainingRun
from gdfq.train.trainer import Trainer


def source_of(task: Task, name: str) -> ImageSource:
    """The image source of that name, for the task's model."""
    return SOURCES[name](task.teacher, task.captured, task.config, task.device, task.progress)


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
    digest = hashlib.sha256()
    for name, tensor in sorted(captured.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    identity: dict[str, Any] = {"weights": digest.hexdigest()[:16], "image_shape": list(captured.image_shape)}
    return identity | deciding_settings(config)
