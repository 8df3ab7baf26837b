"""The step benchmark compares the same mathematics, and says what it was measured on."""

import json

import pytest
import torch
from torch import nn

from benchmarks import step, step_providers
from benchmarks.step_providers import Floor, Gdfq, PlainPyTorch, Task, Variant

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
    assert "GDFQ_EXT=reference" in result["providers"]["reference"]["backend"]
    assert result["ratio_to_ours"]["ours"] == 1
    assert "released" in capsys.readouterr().out


def test_two_iterations_agree_in_losses_and_gradients():
    variants = [Variant(), step_providers.RELEASED, Variant(observe_ranges=True)]
    subjects = [Gdfq(TINY), *(PlainPyTorch(TINY, variant) for variant in variants)]
    for _ in range(2):
        for subject in subjects:
            subject.step()
        step.check_agreement({str(i): subject.evidence() for i, subject in enumerate(subjects)}, 0.01, 0.02)


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
