"""FT: real images and labels train Q and nothing else; the loss falls; a resumed run equals one that never stopped."""

import itertools
import json

import pytest
import torch
from small_models import Plain, randomize_batch_norm
from torch.nn import functional as F

import gdfq
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.methods import Task
from gdfq.nn import activation_quantizers
from gdfq.registry import METHODS
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import load_checkpoint, save_checkpoint
from gdfq.train.trainer import Trainer

SHORT = {
    "method": "finetune",
    "schedule.epochs": 5,
    "schedule.iterations": 8,
    "schedule.batch_size": 16,
    "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2,
    "schedule.milestones": [4],
    "run.held_out_images": 16,
    "run.checkpoint_every": 1,
    "student.learning_rate": 1e-2,
}


@pytest.fixture
def labeled():
    """Images whose label is the teacher's opinion, so that there is something to learn."""
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        return list(zip(images, make()(images).argmax(1).tolist(), strict=True))


def make():
    torch.manual_seed(0)
    return randomize_batch_norm(Plain())


def new_trainer(dataset, **changes) -> Trainer:
    """What the method trains Q with, before it does."""
    config = Config.load("cifar", SHORT | {key.replace("__", "."): value for key, value in changes.items()})
    captured = capture(make())
    student = build_quantized(captured, config.quantizer)[0]
    made = []

    def train(task, source, config):
        made.append(Trainer(task.teacher, task.student, source, config))
        return made[0], 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gdfq.methods.finetune.train", train)
        cpu, teacher = torch.device("cpu"), build_teacher(captured)
        METHODS["finetune"].run(Task(captured, teacher, student, config, cpu, None, False, False, None, dataset))
    return made[0]


def snapshot(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, after) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def loss(trainer: Trainer, dataset) -> float:
    """Eq. 10 over all images, written out."""
    images, labels = torch.stack([image for image, _ in dataset]), torch.tensor([label for _, label in dataset])
    with torch.no_grad():
        z_p, z_q = trainer.teacher(images), trainer.student(images)
    p, q = (F.softmax(logits.double() / 20, 1) for logits in (z_p, z_q))
    return (F.cross_entropy(z_q, labels) + 20**2 * (p * (p / q).log()).mean()).item()


def test_the_loss_on_real_images_falls(labeled):
    trainer = new_trainer(labeled, quantizer__weight_bits=3, quantizer__activation_bits=3)
    losses = []
    trainer.run(lambda: losses.append(loss(trainer, labeled)) if trainer.iteration % 8 == 0 else None)
    assert losses[-1] < 0.8 * losses[0]


def test_ranges_first_then_only_q_is_trained(labeled):
    trainer = new_trainer(labeled)
    teacher, source = snapshot(trainer.teacher), trainer.source
    draw, asked_for = source.draw, []
    source.draw = lambda count: asked_for.append((source.drawn, count)) or draw(count)
    history = [(trainer.phase, snapshot(trainer.student))]
    trainer.run(lambda: history.append((trainer.phase, snapshot(trainer.student))))
    assert [phase for phase, _ in history[:-1]] == ["ranges"] * 8 + ["training"] * 32
    assert asked_for == [(iteration, 16) for iteration in range(40)]
    for (phase, before), (_, after) in itertools.pairwise(history):
        ranges = {name for name in changed(before, after) if name.startswith("activation_quantizers.")}
        weights = changed(before, after) - ranges
        assert (bool(ranges), bool(weights)) == (phase == "ranges", phase == "training")
    assert not changed(teacher, snapshot(trainer.teacher))
    assert not source.learns


def test_ranges_are_those_of_the_real_images(labeled):
    trainer = new_trainer([(4 + image, label) for image, label in labeled])
    trainer.run()
    image, *_ = activation_quantizers(trainer.student).values()
    assert image.range[0] > 4 - 5
    assert image.range[1] > 4 + 2


def test_a_resumed_run_sees_the_images_that_it_would_have_seen(labeled, tmp_path):
    whole = new_trainer(labeled)
    whole.run()

    first = new_trainer(labeled)

    def save() -> None:
        if first.iteration == 19:
            save_checkpoint(tmp_path / "c.safetensors", first.state_dict(), {})

    first.run(save)
    second = new_trainer(labeled)
    second.load_state_dict(load_checkpoint(tmp_path / "c.safetensors", {}))
    second.run()
    assert not changed(snapshot(whole.student), snapshot(second.student))
    assert whole.choice == second.choice


def test_the_run_logs_the_students_losses_alone(labeled, tmp_path):
    config = Config.load("cifar", {**SHORT, "run.log_every": 8})
    result = gdfq.quantize(make(), config, run_dir=tmp_path / "run", train_on=labeled, progress=False)
    entries = [json.loads(line) for line in (tmp_path / "run" / run_folder.LOG).read_text().splitlines()]
    assert [entry["phase"] for entry in entries][1:] == ["training"] * 4
    assert {name for name in entries[-1] if "/" in name} == {"student/cross_entropy", "student/kl"}
    assert (result.generator, result.report.selected) == (None, "trained")
    x = torch.randn(4, 3, 8, 8)
    read = gdfq.load_quantized(tmp_path / "run" / run_folder.MODEL, Plain().eval())
    assert torch.equal(read(x), result.model(x))


def test_labels_that_do_not_fit_stop_the_run_before_anything_is_written(labeled, tmp_path):
    wrong = [(image, label + 5) for image, label in labeled]
    with pytest.raises(GdfqError, match="the model knows 5 classes"):
        gdfq.quantize(make(), Config.load("cifar", SHORT), run_dir=tmp_path / "run", train_on=wrong, progress=False)
    assert not (tmp_path / "run" / run_folder.MODEL).exists()
