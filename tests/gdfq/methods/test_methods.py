"""Every baseline through `gdfq.quantize`: the same result and report, its own images, and words for what it lacks."""

import json

import pytest
import torch
from small_models import Plain, randomize_batch_norm

import gdfq
from gdfq.clip_values import RULES
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.nn import activation_quantizers
from gdfq.run import folder as run_folder

SHORT = {
    "schedule.epochs": 4,
    "schedule.iterations": 2,
    "schedule.batch_size": 8,
    "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2,
    "schedule.range_batches": 2,
    "zeroq.iterations": 3,
    "zeroq.images": 4,
    "run.held_out_images": 16,
}
MADE = ["dfq", "calibrated", "mse", "aciq", "kl", "minmax"]
REAL = [(30 + torch.randn(3, 8, 8), number % 5) for number in range(16)]


def quantize(method: str, changes: dict | None = None, **arguments) -> gdfq.Result:
    torch.manual_seed(0)
    config = Config.load("cifar", {**SHORT, "method": method, **(changes or {})})
    return gdfq.quantize(randomize_batch_norm(Plain()), config, progress=False, **arguments)


def image_range(result: gdfq.Result) -> list[float]:
    return next(iter(activation_quantizers(result.model).values())).range.tolist()


@pytest.mark.parametrize("method", MADE)
def test_a_method_without_data_or_training(method, tmp_path):
    result = quantize(method, run_dir=tmp_path / "run")
    assert result.generator is None
    x = torch.randn(4, 3, 8, 8)
    assert result.model(x).isfinite().all()
    assert f"method       {method}, W4A4" in str(result.report)
    assert "better than training" not in str(result.report)
    report = json.loads((tmp_path / "run" / run_folder.REPORT).read_text())
    assert (report["selected"], report["data_free"]["images"]) == ("calibrated", 16)
    read = gdfq.load_quantized(tmp_path / "run" / run_folder.MODEL, Plain().eval())
    assert torch.equal(read(x), result.model(x))


@pytest.mark.parametrize("method", ["calibrated", *RULES])
def test_real_images_take_the_place_of_made_ones(method):
    made, real = image_range(quantize(method)), image_range(quantize(method, calibrate_on=REAL))
    assert made[1] < 15 < real[1]


def test_calibration_is_minmax_on_other_images():
    assert image_range(quantize("calibrated")) == image_range(quantize("minmax"))
    distilled = quantize("calibrated", {"calibration.images": "zeroq"})
    assert image_range(distilled) == image_range(quantize("zeroq"))
    assert image_range(distilled) != image_range(quantize("minmax"))


def test_a_generator_makes_the_calibration_images(tmp_path):
    settings = {"calibration.images": "generator", "calibration.count": 24}
    result = quantize("mse", settings, run_dir=tmp_path / "run")
    # It ends in a BN, so that its images are about N(0, 1); tanh before it bounds them well below noise.
    assert image_range(result) != image_range(quantize("mse"))
    log = [json.loads(line) for line in (tmp_path / "run" / run_folder.LOG).read_text().splitlines()]
    assert log[-1]["iteration"] == 4
    again = quantize("mse", settings, run_dir=tmp_path / "run", resume=True)
    assert image_range(again) == image_range(result)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("finetune", {}, ["'finetune'", "`train_on`", "--training-data"]),
        ("gdfq", {"train_on": REAL}, ["`train_on`", "methods finetune", "'gdfq'"]),
        ("dfq", {"calibrate_on": REAL}, ["`calibrate_on`", "calibrated, mse, aciq, kl", "'dfq'"]),
        ("gdfq", {"calibrate_on": REAL}, ["`calibrate_on`", "'gdfq'"]),
        ("mse", {"calibrate_on": []}, ["`calibrate_on` holds no images"]),
        ("kl", {"calibrate_on": [torch.zeros(1, 8, 8)]}, ["(1, 8, 8)", "(3, 8, 8)"]),
    ],
)
def test_what_is_missing_or_too_much_is_said(method, arguments, words):
    with pytest.raises(GdfqError) as error:
        quantize(method, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
