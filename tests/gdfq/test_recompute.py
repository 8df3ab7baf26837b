"""Activation checkpointing: less is kept for backward, and every bit of every result is what it is without."""

import pytest
import torch
from recorded_graph import RecordedGraph
from small_models import Residual, TwoHeads, Unusual, capture_once, capture_remembering_smooth_images
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from gdfq import recompute
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import CapturedModel, build_quantized, build_teacher
from gdfq.images.inversion import invert
from gdfq.registry import SOURCES
from gdfq.train import cuda_graph
from gdfq.train.trainer import Trainer

SHORT = {
    "method": "gdfq", "schedule.epochs": 2, "schedule.iterations": 5, "schedule.batch_size": 8,
    "schedule.range_epochs": 1, "schedule.warmup_epochs": 1, "schedule.range_batches": 1, "run.held_out_images": 8,
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captured() -> CapturedModel:
    return capture_remembering_smooth_images()


class Made(TorchDispatchMode):
    """What operators make inside, by its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.convolutions += func is torch.ops.aten.convolution.default
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self) -> int:
        """Bytes that are still there."""
        return sum(size for reference, size in self.sizes.items() if not reference.expired())


class Deep(nn.Sequential):
    in_size = (8, 8)

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3, padding=1)]
        for _ in range(16):
            layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def gradient(teacher, images: torch.Tensor) -> tuple[list[torch.Tensor], Made, int]:
    """All that the teacher gives and the images' gradient; what was made, and how much of it was there for backward."""
    images = images.clone().requires_grad_()
    with Made() as made:
        logits, readings = teacher.read(images, ("statistics", "features"))
        statistics = readings["statistics"]
        loss = logits.square().sum() + sum(value.square().sum() for value in statistics.means + statistics.variances)
        del readings
        before = made.alive()
        loss.backward()
    return [logits, *statistics.means, *statistics.variances, images.grad], made, before


@pytest.mark.parametrize("make", [Residual, TwoHeads, Unusual, Deep])
def test_teachers_are_equal(make, monkeypatch):
    torch.manual_seed(0)
    captured = capture_once(make)
    images = torch.randn(4, 3, 8, 8)
    expected, made, kept = gradient(build_teacher(captured), images)
    found, made_again, kept_again = gradient(build_teacher(captured, checkpointing=True), images)
    assert all(map(torch.equal, found, expected))
    if make is Deep:
        assert (made.convolutions, made_again.convolutions) == (17, pytest.approx(34, abs=5))
        assert kept_again < kept / 2.5
    monkeypatch.setattr(recompute, "_ends", set)  # wherever pieces end
    assert all(map(torch.equal, gradient(build_teacher(captured, checkpointing=True), images)[0], expected))


@pytest.mark.parametrize(
    "changes",
    [
        {"run.cuda_graph": False},
        {
            "run.cuda_graph": False,
            "generator.architecture": "conditional",
            "run.precision": "bfloat16",
            "generator.learn_scale": False,
        },
        {"run.cuda_graph": True, "images.source": "qimera"},
    ],
)
def test_runs_are_equal(captured, changes, monkeypatch):
    """Where all of a stage is computed again, too, and not what is needed of it alone."""
    monkeypatch.setattr(cuda_graph, "CudaGraph", RecordedGraph)
    states = []
    for checkpointing in (False, True):
        config = Config.load("cifar", {**SHORT, **changes, "run.checkpointing": checkpointing})
        teacher, (student, _) = build_teacher(captured, checkpointing), build_quantized(captured, config.quantizer)
        source = SOURCES[config.images.source or "generator"](teacher, captured, config, CPU)
        trainer = Trainer(teacher, student, source, config)
        with set_checkpoint_early_stop(config.run.cuda_graph):
            trainer.run()
        assert trainer.runner.description == ("graph" if config.run.cuda_graph else "eager")
        states.append({**student.state_dict(), **source.generator.state_dict(), "sums": source.averages.sums})
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_places_that_are_drawn_are_drawn_once(captured):
    config = Config.load(overrides={"inversion.iterations": 3}).inversion
    images = [
        invert(build_teacher(captured, checkpointing), captured, config, 8, 0, CPU) for checkpointing in (False, True)
    ]
    assert torch.equal(*images)


def test_not_together_with_torch_compile():
    with pytest.raises(GdfqError, match=r"'run.compile' and 'run.checkpointing' are both true"):
        Config.load(overrides={"run.compile": True, "run.checkpointing": True})


def test_what_training_reads_of_the_teacher_is_computed_again():
    deep = capture_once(Deep)
    kept = []
    for checkpointing in (False, True):
        config = Config.load("cifar", SHORT | {"run.checkpointing": checkpointing})
        source = SOURCES["generator"](build_teacher(deep, checkpointing), deep, config, CPU)
        images = torch.randn(8, 3, 8, 8, requires_grad=True)
        with Made() as made:
            result = source.read(images)
        kept.append(made.alive())
        del result
    assert kept[1] < kept[0] / 2
