"""Iterations as a graph: a recorded one stands in for CUDA's, which tests/gpu has. Only the time may change."""

import json

import pytest
import torch
from recorded_graph import RecordedGraph
from small_models import Residual
from test_trainer import changed, new_trainer, run_until, short_config, snapshot

import gdfq
from gdfq.objective import Distillation
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import load_checkpoint, save_checkpoint
from gdfq.train import cuda_graph
from gdfq.train.trainer import Trainer

# Every phase is longer than its warm-up; the milestone lies inside the last, whose graph must take the new rate over.
PHASES = {
    "schedule__iterations": cuda_graph.WARMUP + 2, "schedule__epochs": 10, "schedule__range_epochs": 2,
    "schedule__warmup_epochs": 4, "schedule__milestones": [6],
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, in order."""
    monkeypatch.setattr(cuda_graph, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    return RecordedGraph.made


def trained(**changes) -> Trainer:
    result = new_trainer(**{**PHASES, **changes})
    result.run()
    return result


@pytest.fixture(scope="module")
def eager() -> Trainer:
    return trained(run__cuda_graph=False)


def assert_same(one: Trainer, other: Trainer) -> None:
    assert not changed(snapshot(one.student), snapshot(other.student))
    assert not changed(snapshot(one.source.generator), snapshot(other.source.generator))
    for averages in (one.averages, other.averages), (one.source.averages, other.source.averages):
        assert torch.equal(*(each.sums for each in averages))
    assert one.choice == other.choice


LONG = [
    {},
    {"generator__architecture": "conditional", "quantizer__straight_through": "clipped"},
    {"student__fixed_bns": False, "quantizer__target": "paper", "student__momentum": 0.0},
    {"schedule__generator_epochs": 4},
    {"images__transforms": {"low_pass": {"cutoff": 3.0}}, "quantizer__observer": "learned_step"},
]


@pytest.mark.parametrize(
    "changes",
    [
        {"run__precision": "bfloat16", "schedule__reestimate_ranges": False},
        {"student__optimizer": "ait", "images__source": "qimera"},
        *(pytest.param(changes, marks=pytest.mark.long) for changes in LONG),
    ],
)
def test_replayed_iterations_equal_eager_ones_bit_for_bit(graphs, changes):
    eager = trained(run__cuda_graph=False, **changes)
    assert graphs == []
    replayed = trained(run__cuda_graph=True, **changes)
    # ranges, warm-up, training; the first iterations of each run eagerly
    iterations = PHASES["schedule__iterations"]
    assert [graph.replays for graph in graphs] == [epochs * iterations - cuda_graph.WARMUP for epochs in (2, 2, 6)]
    assert replayed.runner.description == "graph"
    assert_same(eager, replayed)


@pytest.mark.parametrize("stop_at", [28, *(pytest.param(at, marks=pytest.mark.long) for at in (4, 41))])
def test_a_resumed_run_captures_anew_and_ends_the_same(graphs, eager, stop_at, tmp_path):
    first = new_trainer(**PHASES, run__cuda_graph=True)
    run_until(first, stop_at)
    save_checkpoint(tmp_path / "c.safetensors", first.state_dict(), {})
    second = first if stop_at == 28 else new_trainer(**PHASES, run__cuda_graph=True)
    second.load_state_dict(load_checkpoint(tmp_path / "c.safetensors", {}))
    second.run()
    assert second.runner.description == "graph"
    assert_same(eager, second)


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_an_iteration_that_waits_for_the_device_runs_eagerly_and_says_why(graphs, eager, monkeypatch, wait):
    real = Distillation.__call__

    def waiting(*args):
        loss = real(*args)
        wait(loss[0].detach())
        return loss

    monkeypatch.setattr(Distillation, "__call__", waiting)
    fallen_back = trained(run__cuda_graph=True)
    assert fallen_back.runner.description.startswith(
        "eager: the iteration cannot be captured as a CUDA graph: operation not permitted when stream is capturing"
    )
    assert_same(eager, fallen_back)


def test_a_graph_on_a_cpu_is_refused_with_the_reason_and_auto_is_not():
    assert new_trainer(run__cuda_graph=True).runner.description == (
        "eager: CUDA graphs need a CUDA device, and this run is on 'cpu'"
    )
    assert new_trainer().runner.description == "eager"


def test_log_and_report_say_how_iterations_were_carried_out(tmp_path):
    settings = {"schedule.epochs": 2, "schedule.warmup_epochs": 1, "run.cuda_graph": True}
    result = gdfq.quantize(Residual(), short_config(**settings), run_dir=tmp_path, progress=False)
    reason = "eager: CUDA graphs need a CUDA device, and this run is on 'cpu'"
    entries = [json.loads(line) for line in (tmp_path / run_folder.LOG).read_text().splitlines()]
    assert {entry["iterations"] for entry in entries} == {reason}
    assert f"iterations   {reason}" in str(result.report)
    assert result.report.to_dict()["iterations"] == reason


@pytest.mark.long
def test_compiled_iterations_compute_the_same(monkeypatch):
    compiled_functions = []

    def compile_quickly(function, **options):
        compiled_functions.append(function.__name__)
        return real(function, backend="aot_eager", fullgraph=True, **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    compiled = new_trainer(run__compile=True, schedule__epochs=3)
    compiled.run()
    assert compiled_functions == ["_forward", "_forward"]
    eager = new_trainer(schedule__epochs=3)
    eager.run()
    one, other = compiled.read_metrics() | {"student/kl": 0}, eager.read_metrics() | {"student/kl": 0}
    assert one == pytest.approx(other, rel=1e-4)
