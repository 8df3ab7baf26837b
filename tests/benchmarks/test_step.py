"""The step benchmark compares the same mathematics, and says what it was measured on."""

import json
from dataclasses import replace

import pytest
import torch
from pytorchcv.models.vgg import VGG
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import step, step_providers
from benchmarks.parts import PARTS
from benchmarks.step_providers import Floor, Gdfq, PlainPyTorch, Task, Variant
from gdfq.errors import GdfqError

TINY = Task(model="benchmarks.memory:SmallNet", image_size=8, batch=4)


@pytest.mark.slow
def test_a_run_with_its_processes(tmp_path, capsys):
    out = tmp_path / "step.json"
    providers = ["released", "reference", "ours"]
    sizes = ["--image-size", "8", "--batch", "4", "--iterations", "2", "--threads", "1", "--repeat", "1"]
    assert step.main(["--model", TINY.model, *sizes, "--out", str(out), "--providers", *providers]) == 0
    result = json.loads(out.read_text())
    assert {"machine", "threads", "torch", "gdfq_commit", "arguments", "command"} <= result.keys()
    assert result["machine"]["cpu"]
    assert result["torch"] == torch.__version__
    assert result["gdfq_commit"].keys() == {"hash", "dirty"}
    assert result["arguments"]["batch"] == 4
    assert list(result["providers"]) == providers
    for row in result["providers"].values():
        assert len(row["samples_ms"]) == 2
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["images_per_second"] > 0
        assert row["peak_memory_mb"] > 0
        assert row["launches"]["leaf operator calls"] > 0
        assert tuple(row["parts_ms"]) == PARTS
    assert "GDFQ_EXT=reference" in result["providers"]["reference"]["backend"]
    assert result["ratio_to_ours"]["ours"] == 1
    assert "released" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["cifar", "imagenet"])
def test_two_iterations_agree_in_losses_and_gradients(preset):
    task = replace(TINY, preset=preset)
    variants = [Variant(), step_providers.RELEASED, Variant(observe_ranges=True)]
    subjects = [Gdfq(task), *(PlainPyTorch(task, variant) for variant in variants)]
    for _ in range(2):
        for subject in subjects:
            subject.step()
        step.check_agreement({str(i): subject.evidence() for i, subject in enumerate(subjects)}, 0.01, 0.02)


@pytest.mark.parametrize("preset", ["cifar", "imagenet"])
def test_plain_pytorch_uses_nothing_of_gdfq_ext(preset):
    task = replace(TINY, preset=preset)
    used = []
    for subject in (Gdfq(task), PlainPyTorch(task, Variant())):
        subject.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            subject.step()
        used.append(any("gdfq_ext" in event.name for event in profiler.events()))
    assert used == [True, False]


@pytest.mark.parametrize("variant", [Variant(), step_providers.RELEASED])
def test_providers_agree_in_bfloat16_and_use_it(variant):
    task = replace(TINY, precision="bfloat16", bits=8)
    subjects = [Gdfq(task), PlainPyTorch(task, variant)]
    types = []
    for subject in subjects:
        for network in (subject.networks.generator, subject.networks.student):
            network.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
        subject.step()
    assert types == [torch.bfloat16] * 4
    ours, plain = (subject.evidence() for subject in subjects)
    step.check_agreement({"ours": ours, "plain": plain}, 0.05, 0.05)


def test_a_provider_has_settings_of_its_own():
    assert Gdfq(TINY, {"student.learning_rate": 0.5}).trainer.student_optimizer.param_groups[0]["lr"] == 0.5
    assert Gdfq(TINY).networks is not None
    # Hooks would break the graph that was compiled.
    assert step_providers.PROVIDERS["ours-compile"](TINY).networks is None
    assert PlainPyTorch(TINY, Variant(compile=True)).networks is None


def test_no_graph_is_measured_where_there_is_none():
    assert Gdfq(TINY).backend().endswith("; execution: eager")
    subject = step_providers.PROVIDERS["ours-graph"](TINY)
    subject.trainer.execution.description = "eager: CUDA graphs need a CUDA device"
    with pytest.raises(GdfqError, match="must be a CUDA graph, but execution is 'eager: CUDA graphs need"):
        subject.backend()
    subject.trainer.execution.description = "graph"
    assert subject.backend().endswith("; execution: graph")


@pytest.mark.parametrize("image_size", [None, 64, 224])
def test_every_image_size_and_layout_fits_a_vgg(image_size):
    model = VGG([[2]] * 5, bias=False, use_bn=True, num_classes=5).eval()
    images = torch.randn(2, 3, image_size or 224, image_size or 224)
    plain = None if image_size == 64 else model(images)
    step_providers.fit_classifier(model, image_size)
    logits = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert logits.shape == (2, 5)
    if plain is not None:
        torch.testing.assert_close(logits, plain)


class FakeWorker:
    """Answers without a process. `FakeWorker.errors`: (provider, question) -> error; the first question is `start`."""

    errors: dict[tuple[str, str], str]

    def __init__(self, provider, task, warmup, threads):
        self.provider = provider

    def answer(self):
        return self.ask("start")

    def ask(self, question):
        values = {
            "start": {"evidence": {"bns": 1.0}, "backend": "none"},
            "run 1": {"seconds": 2.0 if self.provider == "eager" else 1.0},
            "memory": {"peak_mb": 3.0},
            "profile": {"profiled_ms": 1.0, "parts_ms": None, "launches": None},
        }[question]
        return step.checked(self.provider, {"error": self.errors.get((self.provider, question)), **values})

    def close(self):
        pass


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(step, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "errors", {}, raising=False)
    return FakeWorker.errors


PLAN = step.Plan(
    ("released", "eager", "compile", "ours"), iterations=2, repeat=1, warmup=1, threads=1, tolerance=0.01,
    student_tolerance=0.1,
)  # fmt: skip


def test_providers_that_lack_something_are_left_out_with_the_reason(fake_workers):
    fake_workers["released", "run 1"] = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    fake_workers["compile", "start"] = "InvalidCxxCompiler: no working C++ compiler"
    result = step.measure(TINY, PLAN)
    assert list(result["providers"]) == ["eager", "ours"]
    assert result["ratio_to_ours"] == {"eager": 2.0, "ours": 1.0}
    assert result["skipped"] == {
        "released": "released: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "compile": "compile: InvalidCxxCompiler: no working C++ compiler",
    }
    assert "skipped: compile: InvalidCxxCompiler" in step.table(result)


def test_other_failures_are_no_result(fake_workers):
    fake_workers["eager", "run 1"] = "ValueError: wrong"
    with pytest.raises(RuntimeError, match="eager: ValueError: wrong"):
        step.measure(TINY, PLAN)
    fake_workers.update({(provider, "start"): "OutOfMemoryError" for provider in PLAN.providers})
    with pytest.raises(RuntimeError, match="released: OutOfMemoryError; eager: OutOfMemoryError"):
        step.measure(TINY, PLAN)


@pytest.mark.parametrize("value", [1.02, float("nan")])
def test_disagreement_stops_the_run(value):
    with pytest.raises(AssertionError, match="eager does not compute what ours does: bns"):
        step.check_agreement({"ours": {"bns": 1.0}, "floor": {}, "eager": {"bns": value}}, 0.01, 0.1)


def test_quantized_model_may_differ_by_more():
    step.check_agreement({"ours": {"kl": 1.0}, "eager": {"kl": 1.02}}, 0.01, 0.1)
    with pytest.raises(AssertionError, match=r"tolerance 0\.1"):
        step.check_agreement({"ours": {"kl": 1.0}, "eager": {"kl": 1.2}}, 0.01, 0.1)


def test_teacher_gradients_are_computed_only_where_released_code_does():
    released, eager = (PlainPyTorch(TINY, variant) for variant in (step_providers.RELEASED, Variant()))
    released.step()
    eager.step()
    assert all(p.grad is not None for p in released.teacher.parameters())
    assert all(p.grad is None for p in eager.teacher.parameters())


def test_floor_replays_every_layer_forward_and_backward():
    floor = Floor(TINY)
    floor.step()
    model = step_providers.new_model(TINY)
    generator = Gdfq(TINY).trainer.generator
    convolutions = sum(isinstance(m, nn.Conv2d) for module in (model, model, generator) for m in module.modules())
    names = [str(function) for function, _, _ in floor.calls]
    assert names.count("aten.convolution.default") == names.count("aten.convolution_backward.default") == convolutions


def test_failing_provider_is_named(capsys):
    arguments = ["--model", "benchmarks.memory:Absent", "--image-size", "8", "--providers", "ours"]
    assert step.main(arguments) == 1
    assert "no result: ours: GdfqError" in capsys.readouterr().err
