"""Points and files of the growth benchmark; and that nothing but tables and logits grows with the number of classes."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from benchmarks import growth, step
from benchmarks.step_providers import Gdfq, Task, new_model
from gdfq.errors import GdfqError
from gdfq.models import load_model

FEW, MANY = 10, 1000
BATCH = 4
FEATURES = 32  # of SmallNet's classifier
TABLES = {"embedding": [100], "conditional": [128, 128, 128, 128, 64, 64]}  # widths: latents, or gammas and betas


def trainer_of(architecture: str, classes: int):
    task = Task("benchmarks.memory:SmallNet", 8, (("num_classes", classes),), batch=BATCH)
    return Gdfq(task, {"generator.architecture": architecture}).trainer


def persistent(trainer) -> dict[str, torch.Tensor]:
    """Everything that stays from one iteration to the next, by name."""
    models = {"generator": trainer.source.generator, "student": trainer.student}
    gradients = {
        f"{model}.{name}": parameter.grad
        for model, network in models.items()
        for name, parameter in network.named_parameters()
    }
    state = {"trainer": trainer.state_dict(), "teacher": trainer.teacher.state_dict(), "gradients": gradients}
    return {str(path): leaf for path, leaf in tree_flatten_with_path(state)[0] if isinstance(leaf, torch.Tensor)}


class ShapeRecorder(TorchDispatchMode):
    """Names of the operators that run inside, with the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shapes = [tuple(leaf.shape) for leaf in tree_flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        self.calls.append((str(func), shapes))
        return result


@pytest.mark.parametrize("architecture", TABLES)
def test_only_tables_and_logits_grow_with_the_classes(architecture):
    states, calls = [], []
    for classes in (FEW, MANY):
        trainer = trainer_of(architecture, classes)
        trainer.step()
        with ShapeRecorder() as recorder:
            trainer.step()
        states.append(persistent(trainer))
        calls.append(recorder.calls)

    # What stays: a table has its gradient and two moments of Adam; the classifier the teacher's copy, its gradient and
    # one moment of SGD.
    few, many = states
    assert few.keys() == many.keys()
    grown = sum(many[name].numel() - few[name].numel() for name in few)
    assert grown == (MANY - FEW) * 4 * (sum(TABLES[architecture]) + FEATURES + 1)
    for name, tensor in many.items():
        assert few[name].shape == tensor.shape or few[name].shape == (FEW, *tensor.shape[1:]), name

    # What comes and goes: logits, tables, the classifier's weight and bias (whose gradient is summed as a row), each
    # as it is or transposed.
    widths = {BATCH, *TABLES[architecture], FEATURES, 1}
    allowed = {(MANY,)} | {shape for width in widths for shape in ((MANY, width), (width, MANY))}
    assert [name for name, _ in calls[0]] == [name for name, _ in calls[1]]
    differing = {
        large
        for (_, before), (_, after) in zip(*calls, strict=True)
        for small, large in zip(before, after, strict=True)
        if small != large
    }
    assert differing <= allowed
    assert (BATCH, MANY) in differing


def test_axes_meet_in_one_point():
    axes = growth.tasks(batch=4, image_size=16, depths=(8, 14), classes=(10, 1000))
    assert {axis: list(points) for axis, points in axes.items()} == {
        "batch": [2, 4, 8, 16], "image size": [8, 16, 32], "depth": [8, 14], "classes": [10, 1000],
    }  # fmt: skip
    start = axes["batch"][4]
    assert start == axes["image size"][16] == axes["depth"][8] == axes["classes"][10]
    assert len({task for points in axes.values() for task in points.values()}) == 4 + 3 + 2 + 2 - 3
    model = new_model(axes["classes"][1000])
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 1000)
    # He et al., 2015: 6n + 2 layers with weights, the shortcuts' two not counted.
    weights = [module for module in model.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weights) == 8 + 2
    assert new_model(axes["image size"][32])(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_wrong_depth():
    with pytest.raises(GdfqError, match="depth is 21; allowed are 8, 14, 20"):
        load_model("benchmarks.growth:resnet", depth=21, num_classes=10, image_size=32)


@pytest.mark.parametrize(("option", "least"), [("--batch", 4), ("--image-size", 16), ("--iterations", 1)])
def test_values_too_small_for_their_points(tmp_path, capsys, option, least):
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--out", str(tmp_path), option, str(least - 1)])
    assert f"{option} is {least - 1}; allowed is {least} or more" in capsys.readouterr().err


def test_files_and_table(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(task, plan):
        measured.append(task)
        row = {**step.summary([task.batch / 1e3] * 3, task.batch), "peak_memory_mb": 200.0}
        return {"arguments": step.arguments_of(task, plan), "providers": {"ours": row}}

    monkeypatch.setattr(step, "measure", measure)
    arguments = ["--out", str(tmp_path), "--batch", "4", "--image-size", "16", "--depths", "8", "14"]
    assert growth.main([*arguments, "--classes", "10", "100"]) == 0
    result = json.loads((tmp_path / "growth.json").read_text())
    assert {"machine", "torch", "gdfq_commit", "command"} <= result.keys()
    assert len(measured) == len(set(measured)) == 8
    assert [point["ms"]["median"] for point in result["axes"]["batch"]] == pytest.approx([2, 4, 8, 16])
    assert [point["arguments"]["batch"] for point in result["axes"]["classes"]] == [4, 4]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "image size" in capsys.readouterr().out

    def broken(task, plan):
        raise RuntimeError("ours: OutOfMemoryError")

    monkeypatch.setattr(step, "measure", broken)
    assert growth.main(arguments) == 1
    assert "ours: OutOfMemoryError" in capsys.readouterr().err
