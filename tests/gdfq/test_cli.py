"""The command line as a user meets it: what it writes, and one clear message for everything that is wrong."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_models import Plain, randomize_batch_norm

from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors

MODELS = Path(__file__).parent / "small_models.py"
SHORT = [
    f"--set={setting}"
    for setting in (
        "schedule.epochs=3", "schedule.iterations=2", "schedule.batch_size=8", "schedule.range_epochs=1",
        "schedule.warmup_epochs=1", "schedule.range_batches=1", "run.held_out_images=16", "run.checkpoint_every=1",
    )
]  # fmt: skip


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file(randomize_batch_norm(Plain()).state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path):
    """A folder of images for five classes."""
    random = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{label}" / f"{index}.png")
    return tmp_path / "images"


def test_quantize_evaluate_and_resume(gdfq, weights, images, tmp_path):
    data = ["--data", images, "--data-arg", "resize=8", "--data-arg", "crop=8"]
    source = ["--model", f"{MODELS}:Plain", "--weights", weights]
    code, out, err = gdfq("quantize", *source, "--out", tmp_path / "run", *SHORT, *data)
    assert (code, err) == (0, "")
    for words in ("gdfq, W4A4, target 'onnx'", "2 layers at 4 bits", "stayed float", "top-1", "held-out"):
        assert words in out
    report = json.loads((tmp_path / "run" / run_folder.REPORT).read_text())

    code, out, _ = gdfq("evaluate", tmp_path / "run", "--json")
    figures = json.loads(out)
    assert (code, figures["images"]) == (0, 15)
    assert figures["top1"] == pytest.approx(report["top1"]["quantized"])
    code, out, _ = gdfq("evaluate", *source, *data, "--json")
    assert json.loads(out)["top1"] == pytest.approx(report["top1"]["float"])

    code, out, _ = gdfq("quantize", "--resume", tmp_path / "run", "--json")
    again = json.loads(out)
    assert code == 0
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


@pytest.mark.parametrize(
    ("method", "option"),
    [("mse", "--calibration-data"), ("calibrated", "--calibration-data"), ("finetune", "--training-data")],
)
def test_real_images_for_the_baselines_that_take_some(gdfq, weights, images, tmp_path, method, option):
    source = ["--model", f"{MODELS}:Plain", "--weights", weights, "--method", method]
    data = [option, images, *(f"{option}-arg={value}" for value in ("resize=8", "crop=8", "mean=-9"))]
    code, out, err = gdfq("quantize", *source, "--out", tmp_path / "run", *SHORT, *data)
    assert (code, err) == (0, "")
    assert f"{method}, W4A4" in out
    model, _ = load_tensors(tmp_path / "run" / run_folder.MODEL)
    assert model["activation_quantizers.x.range"][0] > 9  # where the mean has moved these images; noise is below 6
    code, again, _ = gdfq("quantize", "--resume", tmp_path / "run")
    assert (code, again.split("size")[1]) == (0, out.split("size")[1])


def test_options_reach_the_configuration(gdfq, weights, tmp_path):
    options = ["--weight-bits", 3, "--activation-bits", 5, "--target", "paper", "--method", "minmax", "--seed", 7]
    code, out, _ = gdfq(
        "quantize", "--model", f"{MODELS}:Plain", "--weights", weights, "--out", tmp_path / "run", *SHORT, *options,
        "--json",
    )  # fmt: skip
    config = json.loads(out)["config"]
    assert code == 0
    assert config["quantizer"]["weight_bits"] == 3
    assert config["quantizer"]["activation_bits"] == 5
    assert (config["quantizer"]["target"], config["method"], config["run"]["seed"]) == ("paper", "minmax", 7)


def test_doctor_says_what_is_used_and_why(gdfq):
    code, out, _ = gdfq("doctor")
    assert code == 0
    assert torch.__version__ in out
    assert "fake_quantize" in out
    assert "GDFQ_EXT" in out
    code, out, _ = gdfq("doctor", "--json")
    report = json.loads(out)
    assert {"versions", "build", "backends"} == set(report)
    assert report["backends"]["ops"]["observe_range"]["cpu"]["backend"] in ("native", "reference")


WRONG_MODELS = """
import sys
sys.path.insert(0, {tests!r})
from small_models import *

class NoBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Branches(Plain):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

def overflowing():
    model = randomize_batch_norm(Plain())
    model.conv.weight.data.mul_(1e30)
    model.bn.running_var.fill_(1e-30)
    return model
"""


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        ("NoBatchNorm", ["--image-size", 8], ["no BatchNorm layer"]),
        ("Branches", [], ["cannot be captured", "wrong_models.py", "x.sum() > 0"]),
        ("Plain", ["--weight-bits", 9], ["quantizer.weight_bits", "9", "8"]),
        ("Plain", ["--activation-bits", 1], ["quantizer.activation_bits", "1", "2"]),
        ("Plain", ["--set", "model.num_classes=7"], ["num_classes", "7", "5 logits"]),
        ("Plain", ["--set", "model.channels=4"], ["rejects images of shape (4, 8, 8)"]),
        ("NoBatchNorm", [], ["image size", "--image-size"]),
        ("Plain", ["--preset", "imagnet"], ["imagnet", "imagenet"]),
        ("Plain", ["--set", "schedule.epocs=3"], ["schedule.epocs", "epochs"]),
        ("Plain", ["--device", "cuda:99"], ["cuda:99"]),
        ("Plain", ["--data", "nowhere"], ["nowhere"]),
        ("Plain", ["--method", "kl", "--calibration-data", "nowhere"], ["nowhere"]),
        ("Plain", ["--method", "finetune"], ["finetune", "--training-data"]),
        ("Plain", ["--method", "zeroq", "--calibration-data", "fashion-mnist"], ["calibrate_on", "zeroq"]),
        ("Plane", [], ["Plane", "Plain"]),
        ("overflowing", [], ["NaN or Inf"]),
    ],
)
def test_what_is_wrong_is_said_in_one_message_and_nothing_is_written(gdfq, factory, options, words, tmp_path):
    (tmp_path / "wrong_models.py").write_text(WRONG_MODELS.format(tests=str(MODELS.parent)))
    model = f"{tmp_path / 'wrong_models.py'}:{factory}"
    code, out, err = gdfq("quantize", "--model", model, "--out", tmp_path / "run", *SHORT, *options)
    assert (code, out) == (2, "")
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / run_folder.MODEL).exists()
    assert not list(tmp_path.glob("run/.*.tmp"))


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(path: Path) -> None:
    torch.save(Plain(), path)


def _with_nan(path: Path) -> None:
    state = randomize_batch_norm(Plain()).state_dict()
    state["conv.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, path)


@pytest.mark.parametrize(
    ("spoil", "name", "words"),
    [
        (_truncated, "plain.safetensors", ["plain.safetensors", "truncated"]),
        (_pickled, "model.pth", ["model.pth", "state_dict"]),
        (_with_nan, "plain.safetensors", ["NaN", "conv.weight"]),
    ],
)
def test_broken_weights(gdfq, weights, spoil, name, words, tmp_path):
    spoil(tmp_path / name)
    source = ["--model", f"{MODELS}:Plain", "--weights", tmp_path / name]
    code, _, err = gdfq("quantize", *source, "--out", tmp_path / "run")
    assert code == 2
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize"], ["--model", "--out"]),
        (["quantize", "--resume", "nowhere"], ["nowhere", "not the folder of a run"]),
        (["evaluate"], ["--model"]),
        (["evaluate", "--model", "pytorchcv:resnet20_cifar10"], ["--data"]),
        (["quantise"], ["quantise"]),
        (["quantize", "--bits", "4"], ["--bits"]),
        (["quantize", "--weight-bits", "four"], ["--weight-bits", "integer"]),
    ],
)
def test_wrong_usage(gdfq, arguments, words):
    code, _, err = gdfq(*arguments)
    assert code == 2
    assert all(word in err for word in words), err


def test_help_names_every_command(gdfq):
    code, out, _ = gdfq("--help")
    assert code == 0
    assert all(command in out for command in ("quantize", "evaluate", "doctor"))


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_nothing_half_written(weights, tmp_path):
    command = [sys.executable, "-m", "gdfq.cli", "quantize", "--model", f"{MODELS}:Plain", "--weights", str(weights)]
    command += ["--out", str(tmp_path / "run"), *SHORT]

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, preexec_fn=small_disk, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "checkpoint.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / run_folder.CHECKPOINT).exists()
    assert not [path for path in (tmp_path / "run").iterdir() if "tmp" in path.name]
    # With room again the run goes on from where it can: here from the start.
    done = subprocess.run(
        [*command[:4], "--resume", str(tmp_path / "run")], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / run_folder.MODEL).exists()
