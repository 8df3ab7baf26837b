"""What does not fit in memory is said with the settings that would make it fit, and a run goes on with them."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from short_run import SHORT
from small_models import Plain, randomize_batch_norm
from torch.utils.data import TensorDataset

import gdfq as package
from gdfq.config import Config, parse_override
from gdfq.errors import GdfqError
from gdfq.memory import OutOfMemory, explained, images_at_once, is_out_of_memory
from gdfq.run import folder as run_folder
from gdfq.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
MODEL = f"{Path(__file__).parent / 'small_models.py'}:Plain"


def failing(error: Exception, *arguments) -> None:
    with explained("trying", *arguments):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_errors_of_memory_become_words(error):
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemory, match=r"for trying, with a = 8, b = x: lower a \(") as caught:
        failing(error, {"a": 8, "b": "x"})
    with pytest.raises(OutOfMemory, match=r"for trying, with a = 8.*gdfq quantize --resume runs/x"):
        failing(caught.value, {"c": 1}, Path("runs/x"))
    rejected = GdfqError("the model rejects images")
    rejected.__cause__ = error
    with pytest.raises(OutOfMemory, match="for trying"):
        failing(rejected, {"c": 1})


def test_numpys_error_is_one():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, np.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("out of memory"), GdfqError("no")])
def test_other_errors_stay(error):
    with pytest.raises(type(error), match=re.escape(str(error))):
        failing(error, {"a": 8})


@pytest.mark.parametrize(("size", "count"), [((32, 32), 256), ((224, 224), 256), ((448, 224), 128), ((9000, 9000), 1)])
def test_images_at_once(size, count):
    assert images_at_once(*size) == count


# --- on the CPU, really

LIMITED = """
import contextlib, io, json, resource, sys
import gdfq.api
from torch.utils.tensorboard import SummaryWriter
from gdfq import cli

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 1000 * 2**20,) * 2)
for command in json.loads(sys.argv[1]):
    sys.argv = ["gdfq", *command]
    code, err = 0, io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, err.getvalue()]), flush=True)
"""


def limited(folder: Path, cases: list) -> list:
    """Exit code and standard error of each command, in one process that has 1,000 MiB more than importing takes."""
    command = [sys.executable, "-c", LIMITED, json.dumps([arguments for arguments, _ in cases])]
    paths = {"PYTHONPATH": f"{ROOT / 'python'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, env={**os.environ, **paths})
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases), (done.returncode, done.stderr)
    return answers


@pytest.mark.long
def test_on_the_cpu(tmp_path):
    quantize = ["quantize", "--model", MODEL, *SHORT, "--out"]
    refused = [
        (
            [*quantize, "a", "--image-size=64", "--set=schedule.batch_size=4096"],
            ["schedule.batch_size = 4096", "model.image_size = 64 x 64", "--resume a --set schedule.batch_size=2048"],
        ),
        (
            [*quantize, "b", "--method=zeroq", "--set=zeroq.images=30000", "--image-size=64"],
            ["ZeroQ's images, with zeroq.images = 30000", "--resume b --set zeroq.images=15000"],
        ),
        (
            [*quantize, "c", "--method=minmax", "--image-size=64", "--set=schedule.batch_size=30000"],
            ["schedule.batch_size = 30000", "calibration.count = 30000"],
        ),
        (
            ["evaluate", "--model=gdfq.demo:teacher", "--data=fashion-mnist", "--batch-size=10000", "--image-size=112"],
            ["for evaluating, with the batch size = 10000"],
        ),
    ]
    resumed = [
        (["quantize", "--resume", "a", "--set", "schedule.batch_size=2"], []),
        (["quantize", "--resume", "b", "--set", "zeroq.images=2", "--set", "zeroq.iterations=2"], []),
    ]
    # In a process of their own, as who reads the message resumes: an address space that was full once is in pieces.
    answers = limited(tmp_path, refused) + limited(tmp_path, resumed)
    for (_, words), (code, err) in zip(refused + resumed, answers, strict=True):
        assert code == (2 if words else 0), err
        assert "Traceback" not in err
        assert all(word in err for word in (*words, *(["not enough memory"] if words else []))), err


# --- as CUDA says it


@pytest.fixture
def run(tmp_path):
    save_file(randomize_batch_norm(Plain()).state_dict(), tmp_path / "plain.safetensors")
    source = ["--model", MODEL, "--weights", tmp_path / "plain.safetensors"]
    return ["quantize", *source, "--out", tmp_path / "run", *SHORT]


def fails_at(iteration: int):
    step = Trainer.step

    def failing(trainer: Trainer) -> None:
        if trainer.iteration == iteration and trainer.config.schedule.batch_size == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        step(trainer)

    return failing


@pytest.mark.parametrize("iteration", [0, 4])
def test_a_run_goes_on_with_smaller_batches(gdfq, run, tmp_path, monkeypatch, iteration):
    folder = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", fails_at(iteration))
    code, _, err = gdfq(*run)
    assert code == 2
    assert "not enough memory for the run, with schedule.batch_size = 8, run.held_out_images = 16" in err
    assert "run.held_out_images, or take run.precision=bfloat16, or set run.checkpointing=true, which takes" in err
    assert f"gdfq quantize --resume {folder} --set schedule.batch_size=4 (CUDA out of memory" in err
    assert (folder / run_folder.CHECKPOINT).exists() == bool(iteration)
    before = (folder / run_folder.CONFIG).read_text()
    if iteration:
        code, _, err = gdfq("quantize", "--resume", folder, "--weight-bits", 5)
        assert (code, "quantizer.weight_bits: 4 there, 5 now" in err, "What may change is" in err) == (2, True, True)
        assert (folder / run_folder.CONFIG).read_text() == before
    with warnings.catch_warnings(record=True) as caught:
        code, _, err = gdfq("quantize", "--resume", folder, "--set", "schedule.batch_size=4")
    assert code == 0, err
    said = ["schedule.batch_size: 8 there, 4 now" in str(warning.message) for warning in caught]
    assert any(said) == bool(iteration)
    assert run_folder.read_run(folder)[0].schedule.batch_size == 4
    assert (folder / run_folder.MODEL).exists()


def test_what_a_run_was_started_with_cannot_be_given_again(gdfq, run, tmp_path):
    assert gdfq(*run)[0] == 0
    code, _, err = gdfq("quantize", "--resume", tmp_path / "run", "--model", MODEL, "--training-data", "x")
    assert (code, "leave out --model, --training-data" in err) == (2, True)


def test_comparing_and_evaluating_name_their_own_settings(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    config = Config.load("cifar", dict(parse_override(setting.removeprefix("--set=")) for setting in SHORT))
    monkeypatch.setattr("gdfq.train.trainer.agreement", fail)
    with pytest.raises(OutOfMemory, match=r"comparing Q with P on held-out images, with run.held_out_images = 16"):
        package.quantize(randomize_batch_norm(Plain()), config, progress=False)
    model = Plain()
    model.forward = fail
    dataset = TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(OutOfMemory, match=r"evaluating, with the batch size = 256: lower the batch size"):
        package.evaluate(model, dataset)
