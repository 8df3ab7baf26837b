"""The floor does the convolutions and matrix products of an iteration, and is a CUDA graph where the trainer is one."""

import pytest
import torch
from recorded_graph import RecordedGraph
from torch import nn

from benchmarks import floor
from benchmarks.floor import Floor
from benchmarks.step_providers import Gdfq, Task, new_model, new_provider
from gdfq.train import cuda_graph

TINY = Task(model="benchmarks.memory:SmallNet", image_size=8, batch=4)


def test_every_layer_forward_and_backward():
    subject = Floor(Gdfq(TINY).trainer)
    generator = Gdfq(TINY).trainer.source.generator
    teacher = student = new_model(TINY)
    convolutions = sum(isinstance(m, nn.Conv2d) for net in (teacher, student, generator) for m in net.modules())
    names = [str(function) for function, _, _ in subject.calls]
    assert names.count("aten.convolution.default") == names.count("aten.convolution_backward.default") == convolutions
    with floor.Recorder() as recorder:
        subject.step()
    assert [str(function) for function, _, _ in recorder.calls] == names
    assert subject.backend() == "PyTorch; iterations: eager"


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, in order."""
    monkeypatch.setattr(cuda_graph, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    return RecordedGraph.made


def test_where_there_are_graphs_it_is_one(graphs):
    subject = new_provider("floor", TINY)
    graphs.clear()  # the trainer's, for one iteration of which the calls were noted
    for _ in range(cuda_graph.WARMUP):
        subject.step()
    assert subject.backend() == "PyTorch; iterations: eager"
    for _ in range(2):
        subject.step()
    (graph,) = graphs
    assert graph.replays == 2
    products = [function for function, *_ in graph.calls if function in floor.ARITHMETIC]
    assert products == [function for function, _, _ in subject.calls]
    assert len(graph.calls) == len(products)
    assert subject.backend() == "PyTorch; iterations: graph"


def test_why_it_is_none(graphs, monkeypatch):
    subject = new_provider("floor", TINY)
    subject.calls.append((torch.Tensor.item, (torch.ones(1),), {}))
    for _ in range(cuda_graph.WARMUP + 1):
        subject.step()
    assert "iterations: eager: the iteration cannot be captured as a CUDA graph: operation" in subject.backend()
