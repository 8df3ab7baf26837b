"""The trainer on a GPU: CUDA graphs give what eager iterations give, wait for nothing and allocate nothing."""

import pytest
import torch
from small_models import Residual
from test_cuda_graph import PHASES
from test_reconstruction import run, task_of
from test_trainer import new_trainer, run_until

from gdfq.methods import Task
from gdfq.objective import Distillation
from gdfq.train.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]


def on_the_gpu(**changes) -> Trainer:
    return new_trainer(device="cuda", **{**PHASES, **changes})


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def assert_close(one: Trainer, other: Trainer) -> None:
    for network, same in ((one.student, other.student), (one.source.generator, other.source.generator)):
        pairs = zip(network.state_dict().items(), same.state_dict().values(), strict=True)
        for (key, value), expected in pairs:
            torch.testing.assert_close(
                value, expected, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    assert one.read_metrics() == pytest.approx(other.read_metrics(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"generator__architecture": "conditional", "quantizer__straight_through": "clipped"},
        {"student__fixed_bns": False, "quantizer__target": "paper"},
        {"run__precision": "tf32"},
        {"run__precision": "bfloat16"},
    ],
)
def test_graphs_give_the_weights_of_eager_iterations(deterministic, changes):
    eager, replayed = on_the_gpu(run__cuda_graph=False, **changes), on_the_gpu(run__cuda_graph=True, **changes)
    for trainer in (eager, replayed):
        trainer.run()
    assert replayed.runner.description == "graph"
    assert replayed.iteration == 50
    assert_close(replayed, eager)


@pytest.mark.parametrize("stop_at", [4, 28, 41])
def test_a_resumed_run_captures_anew_and_ends_the_same(deterministic, stop_at):
    whole, first, second = (on_the_gpu(run__cuda_graph=True) for _ in range(3))
    whole.run()
    run_until(first, stop_at)
    second.load_state_dict(first.state_dict())
    second.run()
    assert_close(second, whole)


@pytest.mark.parametrize("graph", [False, True])
def test_iterations_in_training_neither_wait_nor_allocate(graph):
    trainer = on_the_gpu(run__cuda_graph=graph)
    trainer.iteration = 20  # where training begins
    trainer._begin_epoch()
    for _ in range(6):
        trainer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = torch.cuda.memory_stats()
    assert after["num_device_alloc"] == before["num_device_alloc"]
    if graph:
        assert after["allocation.all.allocated"] == before["allocation.all.allocated"]


def test_an_iteration_that_waits_for_the_device_runs_eagerly_and_says_why(monkeypatch):
    real = Distillation.__call__

    def waiting(*args):
        loss = real(*args)
        loss[0].item()
        return loss

    monkeypatch.setattr(Distillation, "__call__", waiting)
    trainer, eager = on_the_gpu(run__cuda_graph=True), on_the_gpu(run__cuda_graph=False)
    trainer.run()
    eager.run()
    assert trainer.runner.description.startswith("eager: the iteration cannot be captured as a CUDA graph")
    assert_close(trainer, eager)


def test_a_reconstruction_by_graphs_is_that_of_eager_iterations(deterministic):
    def reconstructed(graph: bool) -> Task:
        settings = {"run.cuda_graph": graph, "run.device": "cuda", "reconstruction.iterations": 20}
        task, images = task_of(Residual, settings, device="cuda")
        run(task, images)
        return task

    eager, replayed = reconstructed(graph=False), reconstructed(graph=True)
    pairs = zip(eager.student.state_dict().items(), replayed.student.state_dict().values(), strict=True)
    for (name, expected), value in pairs:
        if name.endswith("rounding"):  # one that is undecided may fall on either side
            assert (value != expected).float().mean() < 0.01, name
        else:
            torch.testing.assert_close(
                value, expected, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
