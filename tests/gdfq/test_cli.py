"""The command line as a user meets it: what it writes, and one clear message for everything that is wrong."""

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from short_run import SHORT
from small_models import Plain, Residual, randomize_batch_norm

from gdfq.config import Config
from gdfq.methods.reconstruction import Reconstruction
from gdfq.run import folder as run_folder
from gdfq.run.files import load_tensors

MODELS = Path(__file__).parent / "small_models.py"


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
    assert code == 0
    first, second = err.splitlines()
    assert first.startswith("gdfq: Plain, images 3 x 8 x 8, 5 classes, to W4A4 for target 'onnx', on cpu, ")
    assert first.endswith(f"files in {tmp_path / 'run'}")
    assert second.startswith("gdfq: method 'gdfq': Q trained on images of a generator that learns along with it; ")
    assert second.endswith("images from 'generator', 3 epochs of 2 iterations of 8 images")
    for words in ("gdfq, W4A4, target 'onnx'", "2 layers at 4 bits", "3 at 4/8 bits", "top-1", "held-out"):
        assert words in out
    assert "stayed float" not in out
    report = json.loads((tmp_path / "run" / run_folder.REPORT).read_text())

    code, out, _ = gdfq("evaluate", tmp_path / "run", "--json")
    figures = json.loads(out)
    assert (code, figures["images"]) == (0, 15)
    assert figures["top1"] == pytest.approx(report["top1"]["quantized"])
    code, out, _ = gdfq("evaluate", *source, *data, "--json")
    assert json.loads(out)["top1"] == pytest.approx(report["top1"]["float"])

    code, out, err = gdfq("quantize", "--resume", tmp_path / "run", "--json")
    again = json.loads(out)
    assert (code, err) == (0, "")
    assert {**again, "seconds": 0} == {**report, "seconds": 0}


def test_the_default_method_goes_on_behind_the_last_block(gdfq, tmp_path, monkeypatch):
    weights = tmp_path / "residual.safetensors"
    save_file(randomize_batch_norm(Residual()).state_dict(), weights)
    short = ["--effort=fast", "--set=inversion.images=8", "--set=reconstruction.iterations=2"]
    source = ["--model", f"{MODELS}:Residual", "--weights", weights, *short]
    code, whole, err = gdfq("quantize", *source, "--out", tmp_path / "whole")
    assert code == 0
    assert Config.load(tmp_path / "whole" / run_folder.CONFIG).inversion == (
        Config.load("cifar", {"inversion.images": 8}, "fast").inversion
    )
    assert err.splitlines()[1] == (
        "gdfq: method 'reconstruction': roundings and steps trained block by block, on images optimized to fit the "
        "network; images from 'inverted', a bank of 8, 2 iterations of 32 images for each block"
    )
    train = Reconstruction._train

    def interrupted(self, block, number, *args):
        if number == 1:
            raise KeyboardInterrupt
        train(self, block, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "_train", interrupted)
        code, _, err = gdfq("quantize", *source, "--out", tmp_path / "run")
        assert (code, err.splitlines()[2:]) == (130, ["gdfq: interrupted"])
    code, _, err = gdfq("quantize", "--resume", tmp_path / "run", "--effort", "best")
    assert (code, "leave out --effort" in err) == (2, True)
    code, out, err = gdfq("quantize", "--resume", tmp_path / "run")
    assert (code, err.splitlines()[2:]) == (0, ["gdfq: goes on behind block 1 of 5"])
    assert out.split("size")[1].split("written")[0] == whole.split("size")[1].split("written")[0]


def test_export_verifies_and_the_file_is_as_good_as_the_model(gdfq, weights, images, tmp_path):
    data = ["--data", images, "--data-arg", "resize=8", "--data-arg", "crop=8"]
    source = ["--model", f"{MODELS}:Plain", "--weights", weights, "--method", "minmax"]
    assert gdfq("quantize", *source, "--out", tmp_path / "run", *SHORT, *data)[0] == 0
    code, out, _ = gdfq("export", tmp_path / "run", "--input", "uint8", "--images", 32, "--integer-only")
    assert code == 0
    for words in ("0 wrong", "synthetic images 32 of 32 equal", "real images 15 of 15 equal", "1 of 1 convolutions"):
        assert words in out
    file = tmp_path / "run" / "model.onnx"
    assert json.loads(file.with_suffix(".json").read_text())["verification"]["failed"] == []
    pixels = ["--data", images, "--data-arg", "resize=8", "--data-arg", "crop=8"]
    figures = [json.loads(gdfq("evaluate", *of, "--json")[1]) for of in ([file, *pixels], [tmp_path / "run"])]
    assert figures[0]["top1"] == figures[1]["top1"]
    code, _, err = gdfq("export", tmp_path / "run")
    assert (code, "there already" in err, "Traceback" in err) == (2, True, False)


def test_targets_are_listed_with_what_each_means(gdfq):
    code, out, _ = gdfq("targets", "--json")
    assert code == 0
    known = json.loads(out)
    assert known["int4-symmetric"]["weight_scheme"] == "symmetric"
    assert known["paper"]["quantized"] == ["relu_outputs"]
    _, out, _ = gdfq("targets")
    for words in ("onnx: ", "int4-symmetric: ", "paper: ", "rounds_bias", "whether biases are multiples"):
        assert words in out


SIZES = """
import sys
sys.path.insert(0, {tests!r})
from small_models import *

class Silent(Plain):
    in_size = None

class OfTimm(Silent):
    default_cfg = {{"input_size": (3, 80, 80), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 0.8,
                    "interpolation": "bicubic"}}

def gray():
    model = Plain()
    model.conv = nn.Conv2d(1, 8, 3)
    return model.eval()

def five_channels():
    model = Plain()
    model.conv = nn.Conv2d(5, 8, 3)
    return model.eval()
"""


@pytest.fixture
def sizes(tmp_path):
    (tmp_path / "sizes.py").write_text(SIZES.format(tests=str(MODELS.parent)))
    return tmp_path / "sizes.py"


@pytest.mark.parametrize(
    ("factory", "options", "shape", "words"),
    [
        ("Plain", [], [3, 8, 8], "short side resized to 8 (bilinear), center 8 x 8 cut, RGB, mean 0.485"),
        ("Silent", ["--image-size", 96], [3, 96, 96], "short side resized to 110"),
        ("Plain", ["--image-size", 64], [3, 64, 64], "short side resized to 64"),
        ("Plain", ["--data-arg", "crop=30", "--data-arg", "resize=40"], [3, 30, 30], "short side resized to 40"),
        ("Silent", ["--data-arg", "crop=96"], [3, 96, 96], "short side resized to 110"),
        ("OfTimm", [], [3, 80, 80], "short side resized to 100 (bicubic), center 80 x 80 cut, RGB, mean 0.5 0.5 0.5"),
        ("gray", [], [1, 8, 8], "gray, mean 0.449, std 0.226"),
    ],
)
def test_images_are_prepared_for_the_model_and_it_is_said(gdfq, sizes, images, factory, options, shape, words):
    arguments = ["evaluate", "--model", f"{sizes}:{factory}", "--data", images, *options]
    code, out, _ = gdfq(*arguments)
    assert code == 0
    assert words in out
    assert json.loads(gdfq(*arguments, "--json")[1])["preparation"]["shape"] == shape


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        ("Silent", [], ["the one that the model takes is not known", "--image-size"]),
        ("five_channels", [], ["the model takes 5 channels"]),
        ("Plain", ["--image-size", 0], ["--image-size"]),
    ],
)
def test_images_that_cannot_be_prepared(gdfq, sizes, images, factory, options, words):
    code, _, err = gdfq("evaluate", "--model", f"{sizes}:{factory}", "--data", images, *options)
    assert code == 2
    assert all(word in err for word in words), err


def test_images_of_a_run_have_the_size_of_the_run(gdfq, sizes, images, tmp_path):
    data = ["--data", images, "--calibration-data", images / "class0", "--method", "mse"]
    run = ["quantize", "--model", f"{sizes}:Silent", "--image-size", 16, "--out", tmp_path / "run", *SHORT, *data]
    code, out, err = gdfq(*run)
    assert code == 0, err
    prepared = "3 x 16 x 16, short side resized to 16 (bilinear), center 16 x 16 cut"
    assert f"for calibration: {prepared}" in out
    assert f"for top-1: {prepared}" in out
    assert prepared in gdfq("evaluate", tmp_path / "run")[1]
    assert prepared in gdfq("evaluate", tmp_path / "run", "--image-size", 16)[1]
    code, _, err = gdfq("evaluate", tmp_path / "run", "--image-size", 32)
    assert (code, "takes images of 16 x 16 pixels: leave out --image-size" in err) == (2, True)
    code, _, err = gdfq("evaluate", tmp_path / "run", "--data", images / "class0")
    assert (code, "3 images lie directly in" in err) == (2, True)


@pytest.mark.parametrize("entry", ["state_dict", "state_dict_ema", None])
def test_the_weights_that_were_chosen_are_those_of_the_whole_run(gdfq, images, tmp_path, entry):
    raw, ema = randomize_batch_norm(Plain()).state_dict(), randomize_batch_norm(Plain()).state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / "both.pth")
    save_file(raw if entry == "state_dict" else ema, tmp_path / "one.safetensors")
    both = ["--weights", tmp_path / "both.pth", *(["--weights-entry", entry] if entry else [])]
    models = []
    for source in (both, ["--weights", tmp_path / "one.safetensors"]):
        folder = tmp_path / f"run{len(models)}"
        with warnings.catch_warnings(record=True) as caught:
            assert gdfq("quantize", "--model", f"{MODELS}:Plain", *source, "--out", folder, *SHORT)[0] == 0
            (folder / run_folder.MODEL).unlink()
            assert gdfq("quantize", "--resume", folder)[0] == 0  # of other weights the checkpoint would be refused
        said = [str(warning.message) for warning in caught]
        assert len(said) == (2 if source is both and entry is None else 0), said
        models.append(load_tensors(folder / run_folder.MODEL)[0])
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize(
    ("method", "option"),
    [("mse", "--calibration-data"), ("calibrated", "--calibration-data"), ("finetune", "--training-data")],
)
def test_real_images_for_the_baselines_that_take_some(gdfq, weights, images, tmp_path, method, option):
    source = ["--model", f"{MODELS}:Plain", "--weights", weights, "--method", method]
    data = [option, images, *(f"{option}-arg={value}" for value in ("resize=8", "crop=8", "mean=-9"))]
    code, out, err = gdfq("quantize", *source, "--out", tmp_path / "run", *SHORT, *data)
    assert (code, len(err.splitlines())) == (0, 2)
    assert f"{method}, W4A4" in out
    model, _ = load_tensors(tmp_path / "run" / run_folder.MODEL)
    assert model["activation_quantizers.x.range"][1] > 30  # where the mean has moved these images; noise is far below
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
        ("Plain", ["--effort", "fast"], ["'cifar'", "'fast'", "'gdfq'; it has: default"]),
        ("Plain", ["--effort", "slow", "--method", "reconstruction"], ["'slow'", "it has: default, fast, best"]),
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
    command = [sys.executable, "-m", "gdfq", "quantize", "--model", f"{MODELS}:Plain", "--weights", str(weights)]
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
