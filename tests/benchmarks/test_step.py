"""The step benchmark compares the same mathematics, and says what it was measured on."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorchcv.models.vgg import VGG
from torch.profiler import ProfilerActivity, profile

from benchmarks import step, step_providers, step_table
from benchmarks.parts import PARTS
from benchmarks.step_providers import Gdfq, PlainPyTorch, Task, Variant, new_provider, parse_provider
from gdfq.errors import GdfqError

TINY = Task(model="benchmarks.memory:SmallNet", image_size=8, batch=4)


@pytest.mark.long
def test_a_run_with_its_processes(tmp_path, capsys):
    out = tmp_path / "step.json"
    providers = ["released", "reference@bfloat16", "ours"]
    sizes = ["--image-size", "8", "--batch", "4", "--iterations", "2", "--threads", "1", "--repeat", "1"]
    assert step.main(["--model", TINY.model, *sizes, "--out", str(out), "--providers", *providers]) == 0
    result = json.loads(out.read_text())
    assert {"machine", "threads", "torch", "gdfq_commit", "arguments", "command"} <= result.keys()
    assert result["machine"]["cpu"]
    assert result["torch"] == torch.__version__
    assert result["gdfq_commit"].keys() == {"hash", "dirty"}
    assert result["arguments"]["batch"] == 4
    assert result["finished"]
    assert result["disagreements"] == []
    assert list(result["providers"]) == providers
    for row in result["providers"].values():
        assert len(row["samples_ms"]) == 2
        assert 0 < row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]
        assert row["images_per_second"] > 0
        assert row["peak_memory_mb"] > 0
        assert row["launches"]["leaf operator calls"] > 0
        assert tuple(row["parts_ms"]) == PARTS
    low, ours = (result["providers"][name] for name in ("reference@bfloat16", "ours"))
    assert "GDFQ_EXT=reference" in low["backend"]
    # In float32 they differ by a millionth.
    assert abs(low["first_iteration"]["generator/bns"] / ours["first_iteration"]["generator/bns"] - 1) > 1e-4
    assert result["ratio_to_ours"]["ours"] == 1
    assert "released" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("preset", "bits"),
    [("cifar", 4), ("imagenet", 4), ("cifar", 8), ("paper-cifar", 4)],  # 8: symmetric weights; paper: Eq. 6
)
def test_two_iterations_agree_in_losses_and_gradients(preset, bits):
    task = replace(TINY, preset=preset, bits=bits)
    variants = [Variant(), step_providers.RELEASED, Variant(observe_ranges=True)]
    subjects = [Gdfq(task), *(PlainPyTorch(task, variant) for variant in variants)]
    for _ in range(2):
        for subject in subjects:
            subject.step()
        assert not step.disagreements({str(i): subject.evidence() for i, subject in enumerate(subjects)}, 0.01, 0.02)


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
    assert not step.disagreements({"ours": ours, "plain": plain}, 0.05, 0.05)


def test_a_provider_has_settings_of_its_own():
    assert Gdfq(TINY, {"student.learning_rate": 0.5}).trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert Gdfq(TINY).networks is not None
    # Hooks would break the graph that was compiled.
    assert step_providers.PROVIDERS["ours-compile"](TINY).networks is None
    assert PlainPyTorch(TINY, Variant(compile="default")).networks is None


def test_a_name_says_what_its_provider_changes():
    assert parse_provider("ours-eager") == ("ours-eager", {})
    assert parse_provider("ours@tf32@contiguous") == ("ours", {"precision": "tf32", "channels_last": False})
    run = new_provider("ours@bfloat16@contiguous", TINY).trainer.config.run
    assert (run.precision, run.channels_last) == ("bfloat16", False)
    assert new_provider("ours", TINY).trainer.config.run.channels_last
    for name, layout in (("eager", torch.channels_last), ("eager@contiguous", torch.contiguous_format)):
        weights = [p for p in new_provider(name, TINY).student.parameters() if p.dim() == 4 and p.shape[2] == 3]
        assert weights
        assert all(weight.is_contiguous(memory_format=layout) for weight in weights)


@pytest.mark.parametrize("name", ["tensorrt", "ours@int8", "ours@", "ours@tf32@bfloat16", "@tf32"])
def test_wrong_names_of_providers(capsys, name):
    with pytest.raises(SystemExit):
        step.main(["--providers", "eager", name])
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --providers: {name} is not known; allowed are released-observing, released," in message
    assert "each also with @float32, @tf32, @bfloat16 (one of them) and @contiguous behind it" in message


@pytest.mark.long
def test_both_compiled_providers_agree_with_ours_again_and_again():
    """Of the iterations, the second runs what the first compiled, with gradients left from before."""
    subjects = {name: new_provider(name, TINY) for name in ("ours", "compile", "compile-reduce-overhead")}
    for _ in range(3):
        for subject in subjects.values():
            subject.step()
        assert not step.disagreements({name: subject.evidence() for name, subject in subjects.items()}, 0.01, 0.02)
    assert subjects["compile-reduce-overhead"].backend().endswith("compiled functions without a CUDA graph: 2")


def test_cuda_graphs_of_torch_compile_are_told_where_an_iteration_begins(monkeypatch):
    """Before anything else of it runs, and with no gradient of the last iteration left."""

    def begin():
        events.append("begin")

    def compile_nothing(function, dynamic, mode):
        def call(*args):
            models = (subject.generator, subject.student)
            left = [p.grad for model in models for p in model.parameters() if p.grad is not None]
            events.append((function.__name__, mode, bool(left)))
            return function(*args)

        return call

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin)
    monkeypatch.setattr(torch, "compile", compile_nothing)
    for mode in ("reduce-overhead", "default"):
        subject = PlainPyTorch(TINY, Variant(compile=mode))
        for _ in range(2):
            events = []
            subject.step()
            # Between the two functions there are G's gradients, of this iteration.
            functions = [("_generator_loss", mode, False), ("_student_loss", mode, True)]
            assert events == (["begin"] if mode == "reduce-overhead" else []) + functions


def test_no_graph_is_measured_where_there_is_none():
    assert Gdfq(TINY).backend().endswith("; iterations: eager")
    subject = step_providers.PROVIDERS["ours-graph"](TINY)
    subject.trainer.runner.description = "eager: CUDA graphs need a CUDA device"
    with pytest.raises(GdfqError, match="must be a CUDA graph, but they are 'eager: CUDA graphs need"):
        subject.backend()
    subject.trainer.runner.description = "graph"
    assert subject.backend().endswith("; iterations: graph")


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
    """Answers without a process. `FakeWorker.errors`: (provider, question) -> error; the first question is `start`.
    `FakeWorker.log`: what happened, in order."""

    errors: dict[tuple[str, str], str]
    bns: dict[str, float]
    log: list[tuple[str, str]]

    def __init__(self, provider, task, warmup, threads):
        self.provider = provider
        self.log.append((provider, "new"))

    def answer(self, deadline=None):
        return self.ask("start")

    def ask(self, question):
        values = {
            "start": {"evidence": {"generator/bns": self.bns.get(self.provider, 1.0)}, "backend": "none"},
            "run 1": {"seconds": 2.0 if self.provider == "eager" else 1.0},
            "memory": {"peak_mb": 3.0},
            "profile": {"profiled_ms": 1.0, "parts_ms": None, "launches": None},
        }[question]
        self.log.append((self.provider, question))
        return step.checked(self.provider, {"error": self.errors.get((self.provider, question)), **values})

    def close(self, patience=30):
        self.log.append((self.provider, "close"))


@pytest.fixture
def fake_workers(monkeypatch):
    monkeypatch.setattr(step, "Worker", FakeWorker)
    for name, value in {"errors": {}, "bns": {}, "log": []}.items():
        monkeypatch.setattr(FakeWorker, name, value, raising=False)
    return FakeWorker


PLAN = step.Plan(
    ("released", "eager", "compile", "ours"), iterations=2, repeat=1, warmup=1, threads=1, tolerance=0.01,
    student_tolerance=0.1,
)  # fmt: skip


def test_providers_that_lack_something_are_left_out_with_the_reason(fake_workers):
    fake_workers.errors["released", "run 1"] = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    fake_workers.errors["compile", "start"] = "InvalidCxxCompiler: no working C++ compiler"
    result = step.measure(TINY, PLAN)
    assert result["failed"] == {}
    assert list(result["providers"]) == ["eager", "ours"]
    assert result["ratio_to_ours"] == {"eager": 2.0, "ours": 1.0}
    assert result["skipped"] == {
        "released": "released: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "compile": "compile: InvalidCxxCompiler: no working C++ compiler",
    }
    assert "skipped: compile: InvalidCxxCompiler" in step.table(result)


def test_a_provider_that_fails_is_named_and_the_others_are_measured(fake_workers, capsys):
    fake_workers.errors["eager@tf32", "run 1"] = "ValueError: wrong"
    arguments = ["--model", TINY.model, "--image-size", "8", "--repeat", "1", "--providers"]
    assert step.main([*arguments, "eager@tf32", "compile@tf32", "ours"]) == 1
    assert "failed: eager@tf32: ValueError: wrong" in capsys.readouterr().out
    fake_workers.errors["compile@tf32", "run 1"] = "ValueError: wrong"  # it is optional
    assert step.main([*arguments, "compile@tf32", "ours"]) == 0
    assert "skipped: compile@tf32: ValueError: wrong" in capsys.readouterr().out


def test_there_is_no_result_without_providers(fake_workers):
    fake_workers.errors |= {(provider, "start"): "OutOfMemoryError" for provider in PLAN.providers}
    with pytest.raises(RuntimeError, match="released: OutOfMemoryError; eager: OutOfMemoryError"):
        step.measure(TINY, PLAN)


def test_providers_warm_up_one_after_the_other_or_together(fake_workers):
    step.measure(TINY, PLAN)
    assert fake_workers.log[:4] == [("released", "new"), ("released", "start"), ("eager", "new"), ("eager", "start")]
    assert [what for _, what in fake_workers.log[-4:]] == ["close"] * 4
    fake_workers.log.clear()
    step.measure(TINY, replace(PLAN, together=True))
    assert fake_workers.log[:8] == [(name, what) for what in ("new", "start") for name in PLAN.providers]


def test_who_is_not_warmed_up_in_time_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="released: not warmed up in time; eager: not warmed up in time"):
        step.measure(TINY, replace(PLAN, providers=("released", "eager"), together=True, patience=0.2))
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("value", [1.02, float("nan")])
def test_disagreement_is_reported_and_measured(fake_workers, tmp_path, capsys, value):
    fake_workers.bns["eager"] = value
    arguments = ["--model", TINY.model, "--image-size", "8", "--repeat", "1", "--out", str(tmp_path / "step.json")]
    assert step.main([*arguments, "--providers", "ours", "eager"]) == 0
    assert f"disagrees: eager with ours: generator/bns {value:.4g} for 1 (tolerance 0.01)" in capsys.readouterr().out
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["ratio_to_ours"] == {"ours": 1.0, "eager": 2.0}
    (found,) = result["disagreements"]
    assert found.pop("value") == pytest.approx(value, nan_ok=True)
    assert found == {
        "provider": "eager",
        "first": "ours",
        "figure": "generator/bns",
        "expected": 1.0,
        "tolerance": 0.01,
    }


def test_quantized_model_and_low_precision_may_differ_by_more():
    def found(figure, value, *low_precision):
        evidence = {"ours": {figure: 1.0}, "floor": {}, "eager": {figure: value}}
        return [item["tolerance"] for item in step.disagreements(evidence, 0.01, 0.1, low_precision)]

    assert found("generator/bns", 1.02) == [0.01]
    assert found("student/kl", 1.02) == []
    assert found("student/kl", 1.2) == [0.1]
    for provider in ("ours", "eager"):
        assert found("generator/bns", 1.02, provider) == []
        assert found("generator/bns", 1.2, provider) == [0.1]


def test_another_precision_than_the_first_providers_may_differ_by_more(fake_workers):
    fake_workers.bns |= {"ours@tf32": 1.02, "eager@contiguous": 1.02}
    result = step.measure(TINY, replace(PLAN, providers=("ours", "ours@tf32", "eager@contiguous")))
    assert [item["provider"] for item in result["disagreements"]] == ["eager@contiguous"]


def test_rounds_are_written_as_they_come(fake_workers, monkeypatch, tmp_path):
    path = tmp_path / "step.json"
    written = []

    def write(path, text):
        written.append(json.loads(text))

    monkeypatch.setattr(step, "write_text", write)
    fake_workers.errors["ours", "memory"] = "RuntimeError: it broke"
    arguments = ["--model", TINY.model, "--image-size", "8", "--repeat", "1", "--iterations", "2", "--out", str(path)]
    assert step.main([*arguments, "--providers", "eager", "ours"]) == 1
    rounds = [{name: len(row["samples_ms"]) for name, row in result["providers"].items()} for result in written]
    assert rounds == [{"eager": 1, "ours": 1}, {"eager": 2, "ours": 2}, {"eager": 2}]
    assert [result["finished"] for result in written] == [False, False, True]
    assert written[0]["ratio_to_ours"] == {"eager": 2.0, "ours": 1.0}
    assert "2 rounds of 1, unfinished: 1 of them" in step_table.table(written[0])
    assert "unfinished" not in step_table.table(written[2])


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_is_ended_leaves_its_rounds_and_no_process(tmp_path):
    out = tmp_path / "step.json"
    sizes = ["--model", TINY.model, "--image-size", "8", "--batch", "4", "--threads", "1", "--iterations", "100000"]
    command = [sys.executable, "-m", "benchmarks.step", *sizes, "--providers", "eager", "ours", "--out", str(out)]
    process = subprocess.Popen(command)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        end = time.monotonic() + 120
        while not out.exists() and time.monotonic() < end:
            time.sleep(0.1)
        workers = [Path("/proc", number) for number in children.read_text().split()]
        assert len(workers) == 2
        process.terminate()
        assert process.wait(timeout=5) == 143
    finally:
        process.kill()
    assert not any(worker.exists() for worker in workers)
    result = json.loads(out.read_text())
    assert not result["finished"]
    assert len(result["providers"]["ours"]["samples_ms"]) > 0


def test_teacher_gradients_are_computed_only_where_released_code_does():
    released, eager = (PlainPyTorch(TINY, variant) for variant in (step_providers.RELEASED, Variant()))
    released.step()
    eager.step()
    assert all(p.grad is not None for p in released.teacher.parameters())
    assert all(p.grad is None for p in eager.teacher.parameters())


def test_failing_provider_is_named(capsys):
    arguments = ["--model", "benchmarks.memory:Absent", "--image-size", "8", "--providers", "ours"]
    assert step.main(arguments) == 1
    assert "no result: ours: GdfqError" in capsys.readouterr().err
