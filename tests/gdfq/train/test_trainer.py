"""Algorithm 1: who is trained when, ranges, and a resumed run that equals one that never stopped, bit for bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import Plain, Residual, Unusual, capture_once, randomize_batch_norm

import gdfq
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher
from gdfq.nn import activation_quantizers
from gdfq.registry import SOURCES
from gdfq.run import folder as run_folder
from gdfq.run.checkpoint import load_checkpoint, save_checkpoint
from gdfq.run.files import load_tensors, save_tensors
from gdfq.train.trainer import Trainer

SHORT = {
    "method": "gdfq",
    "schedule.epochs": 5,
    "schedule.iterations": 3,
    "schedule.batch_size": 8,
    "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2,
    "schedule.range_batches": 2,
    "schedule.milestones": [4],
    "run.held_out_images": 16,
    "run.log_every": 1,
    "run.checkpoint_every": 2,
    "student.learning_rate": 1e-2,
}


CPU = torch.device("cpu")
NAME = "activation_quantizers.bn1.quantizer"


def short_config(**changes) -> Config:
    return Config.load("cifar", {**SHORT, **{key.replace("__", "."): value for key, value in changes.items()}})


def new_trainer(make=Residual, device="cpu", **changes) -> Trainer:
    torch.manual_seed(0)
    captured = capture_once(make, device=device)
    config = short_config(**changes)
    teacher, student = build_teacher(captured), build_quantized(captured, config.quantizer)[0]
    source = SOURCES[config.images.source or "generator"](teacher, captured, config, torch.device(device))
    return Trainer(teacher, student, source, config)


def run_until(trainer: Trainer, iteration: int) -> None:
    """Train until so many iterations are done, and stop there."""

    class Enough(Exception):  # noqa: N818
        pass

    def stop() -> None:
        if trainer.iteration == iteration:
            raise Enough

    with pytest.raises(Enough):
        trainer.run(stop)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict, after: dict, pick=lambda name: True) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items() if pick(name))


def is_range(name: str) -> bool:
    return name.startswith("activation_quantizers.")


def test_phases_train_what_algorithm_1_says():
    trainer = new_trainer(schedule__reestimate_ranges=False)
    teacher = snapshot(trainer.teacher)
    history = [(trainer.phase, snapshot(trainer.student), snapshot(trainer.source.generator))]
    trainer.run(lambda: history.append((trainer.phase, snapshot(trainer.student), snapshot(trainer.source.generator))))
    assert [phase for phase, _, _ in history[:-1]] == ["ranges"] * 3 + ["warm-up"] * 3 + ["training"] * 9
    for (phase, student, generator), (_, next_student, next_generator) in itertools.pairwise(history):
        assert changed(generator, next_generator)
        assert changed(student, next_student, is_range) == (phase == "ranges")
        assert changed(student, next_student, lambda name: not is_range(name)) == (phase == "training")
    assert not changed(teacher, snapshot(trainer.teacher))


def test_channels_last_is_for_weights_of_convolutions_in_two_dimensions():
    trainer = new_trainer(Unusual)
    weights = {value.dim(): value for value in trainer.student.parameters()}
    assert weights[4].is_contiguous(memory_format=torch.channels_last)
    assert weights[5].is_contiguous()
    trainer.run()
    assert trainer.read_metrics()["student/kl"] is not None


@pytest.mark.parametrize("again", [False, True])
def test_ranges_are_estimated_again_when_warm_up_ends_only_if_asked(again):
    trainer = new_trainer(schedule__reestimate_ranges=again)
    ranges = [snapshot(activation_quantizers(trainer.student)[NAME])]
    trainer.run(lambda: ranges.append(snapshot(activation_quantizers(trainer.student)[NAME])))
    assert changed(ranges[6], ranges[7]) == again
    assert not changed(ranges[3], ranges[6])
    assert not changed(ranges[7], ranges[15])


def test_learning_rates_fall_at_the_milestones():
    trainer = new_trainer()
    rates = []
    trainer.run(
        lambda: rates.append([o.param_groups[0]["lr"].item() for o in (trainer.source.optimizer, trainer.optimizer)])
    )
    assert rates[:12] == [pytest.approx([1e-3, 1e-2])] * 12
    assert rates[12:] == [pytest.approx([1e-4, 1e-3])] * 3


@pytest.mark.parametrize(
    ("changes", "trained_iterations"),
    [
        ({"schedule__generator_epochs": 3}, 9),  # separate training: G first, then Q
        ({"generator__stop_accuracy": 0.0}, 3),  # met at the end of the first epoch
        ({"generator__stop_accuracy": 100.0}, 15),  # more than all cannot be
    ],
)
def test_a_generator_that_is_trained_no_more_stays_as_it_is_and_q_goes_on(changes, trained_iterations):
    trainer = new_trainer(schedule__reestimate_ranges=False, **changes)
    history = []

    def look() -> None:
        names = {name for name, _ in trainer.source.generator.named_parameters()}
        weights = {name: value for name, value in snapshot(trainer.source.generator).items() if name in names}
        history.append((weights, snapshot(trainer.student), trainer.read_metrics()))

    trainer.run(look)
    moves = [changed(before[0], after[0]) for before, after in itertools.pairwise(history)]
    assert moves == [True] * (trained_iterations - 1) + [False] * (15 - trained_iterations)
    assert [metrics["generator/bns"] is not None for *_, metrics in history] == [True] * trained_iterations + [
        False
    ] * (15 - trained_iterations)
    assert changed(history[-2][1], history[-1][1])
    resumed = new_trainer(**changes)
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.source.learns == trainer.source.learns


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_bns_keeps_the_teachers_statistics_in_q(fixed):
    trainer = new_trainer(student__fixed_bns=fixed)
    before = snapshot(trainer.student)
    trainer.run()
    moved = changed(before, snapshot(trainer.student), lambda name: "running" in name)
    assert moved != fixed


@pytest.mark.parametrize("stop_at", [5, *(pytest.param(at, marks=pytest.mark.long) for at in (2, 6, 9, 13))])
def test_resumed_training_is_bit_for_bit_the_same(stop_at, tmp_path):
    whole = new_trainer()
    whole.run()

    first = new_trainer()
    run_until(first, stop_at)
    save_checkpoint(tmp_path / "c.safetensors", first.state_dict(), {})
    second = new_trainer()
    second.load_state_dict(load_checkpoint(tmp_path / "c.safetensors", {}))
    second.run()
    assert not changed(snapshot(whole.student), snapshot(second.student))
    assert not changed(snapshot(whole.source.generator), snapshot(second.source.generator))
    assert whole.choice == second.choice
    assert whole.read_metrics() == second.read_metrics()


def test_no_loss_is_logged_as_nan_and_a_diverged_run_says_so():
    trainer = new_trainer(generator__learning_rate=1e30)
    with pytest.raises(GdfqError, match="NaN or Inf"):
        trainer.run(trainer.read_metrics)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"x": 1}, {"quantizer.weight_bits": 4, "weights": "abc"})
    with pytest.raises(GdfqError, match=r"quantizer.weight_bits: 4 there, 3 now"):
        load_checkpoint(path, {"quantizer.weight_bits": 3, "weights": "abc"})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(GdfqError, match=r"truncated|not a safetensors"):
        load_checkpoint(path, {})


def test_a_checkpoint_of_an_older_form_is_refused_in_words(tmp_path):
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"x": torch.zeros(1)}, {"state": "{}", "identity": "{}"})
    with pytest.raises(GdfqError, match=r"checkpoint in an older form.*start the run anew"):
        load_checkpoint(path, {})


def test_a_run_folder_holds_what_is_promised_and_the_model_can_be_read_back(tmp_path):
    model = randomize_batch_norm(Residual())
    result = gdfq.quantize(model, short_config(), run_dir=tmp_path / "run", progress=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        run_folder.CONFIG, run_folder.VERSIONS, run_folder.CHECKPOINT, run_folder.LOG, run_folder.EVENTS,
        run_folder.MODEL, run_folder.GENERATOR, run_folder.PICTURE, run_folder.REPORT,
    }  # fmt: skip
    entries = [json.loads(line) for line in (tmp_path / "run" / run_folder.LOG).read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == list(range(1, 16))
    assert "student/kl" not in entries[0]
    assert "student/kl" in entries[-1]
    assert list((tmp_path / "run" / run_folder.EVENTS).iterdir())
    x = torch.randn(4, 3, 8, 8)
    read = gdfq.load_quantized(tmp_path / "run" / run_folder.MODEL, Residual().eval())
    assert torch.equal(read(x), result.model(x))
    report = json.loads((tmp_path / "run" / run_folder.REPORT).read_text())
    assert report["data_free"]["images"] == 16
    assert len(report["summary"]["weights"]) == 5
    with pytest.raises(GdfqError, match="already holds a run"):
        gdfq.quantize(model, short_config(), run_dir=tmp_path / "run", progress=False)
    with pytest.raises(GdfqError, match=r"another run.*quantizer.weight_bits: 4 there, 5 now"):
        gdfq.quantize(
            model, short_config(quantizer__weight_bits=5), run_dir=tmp_path / "run", resume=True, progress=False
        )


@pytest.mark.parametrize("method", ["zeroq", "minmax"])
def test_baselines_have_the_same_interface(method):
    config = short_config(method=method, zeroq__iterations=5)
    result = gdfq.quantize(randomize_batch_norm(Plain()), config, progress=False)
    assert result.generator is None
    assert result.model(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert f"method       {method}, W4A4" in str(result.report)


def test_from_six_bits_on_calibration_is_kept_where_it_is_better():
    bits = {"quantizer__weight_bits": 8, "quantizer__activation_bits": 8}
    ruined = {"student__learning_rate": 10.0, "student__distillation_weight": 0.0}
    model = randomize_batch_norm(Plain())
    result = gdfq.quantize(model, short_config(**bits, **ruined), progress=False)
    assert result.report.selected == "calibrated"
    assert torch.equal(result.model.conv.weight, model.conv.weight)
    result = gdfq.quantize(
        model, short_config(**bits, **ruined, schedule__compare_with_calibration=False), progress=False
    )
    assert result.report.selected == "trained"
    of_one = {"quantizer__layers": {"fc": {"weights": 8, "activations": 5}}}
    result = gdfq.quantize(model, short_config(**bits, **ruined, **of_one), progress=False)
    assert result.report.selected == "trained"


SCRIPT = """
import sys, torch
sys.path[:0] = {tests!r}
from small_models import Residual, randomize_batch_norm
from test_trainer import short_config
import gdfq
torch.manual_seed(0)
model = randomize_batch_norm(Residual())
resume = sys.argv[2] == "resume"
try:
    gdfq.quantize(model, short_config(schedule__iterations=20), run_dir=sys.argv[1], resume=resume, progress=False)
except gdfq.Stopped as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(130)
"""


def _start(folder: Path, how: str) -> subprocess.Popen:
    script = SCRIPT.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    return subprocess.Popen([sys.executable, "-c", script, str(folder), how], stderr=subprocess.PIPE, text=True)


def _wait_for_iteration(process: subprocess.Popen, folder: Path, iteration: int) -> None:
    log = folder / run_folder.LOG
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= iteration):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_and_ends_as_one_that_never_stopped(number, tmp_path):
    whole = _start(tmp_path / "whole", "start")
    assert whole.wait(timeout=240) == 0, whole.stderr.read()
    process = _start(tmp_path / "run", "start")
    for iteration in (15, 70):
        _wait_for_iteration(process, tmp_path / "run", iteration)
        os.kill(process.pid, number)
        code = process.wait(timeout=60)
        if number == signal.SIGINT:
            assert code == 130
            assert f"gdfq quantize --resume {tmp_path / 'run'}" in process.stderr.read()
        assert not (tmp_path / "run" / run_folder.MODEL).exists()
        (tmp_path / "run" / f".{run_folder.LOG}.1.tmp").touch()  # what a kill in the middle of a write leaves
        process = _start(tmp_path / "run", "resume")
    assert process.wait(timeout=240) == 0, process.stderr.read()
    for name in (run_folder.MODEL, run_folder.GENERATOR):
        one, _ = load_tensors(tmp_path / "whole" / name)
        other, _ = load_tensors(tmp_path / "run" / name)
        assert not changed(one, other), name
    logs = [(tmp_path / name / run_folder.LOG).read_text().splitlines() for name in ("whole", "run")]
    one, other = ([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log] for log in logs)
    assert one == other
    assert not list((tmp_path / "run").glob("*.tmp")) + list((tmp_path / "run").glob(".*.tmp"))
