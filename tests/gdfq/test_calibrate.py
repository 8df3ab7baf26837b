"""Calibration: whose observer looks how often, that it is put back, and a learned step that begins where it ended."""

import pytest
import torch
from small_models import Plain, Residual, capture_once, randomize_batch_norm

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import Config, QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized
from gdfq.nn import activation_quantizers
from gdfq.observers import Histogram, LearnedStep
from gdfq.registry import METHODS

BATCHES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def new_student(make=Residual, **quantizer):
    torch.manual_seed(0)
    return build_quantized(capture_once(make), QuantizerConfig(**quantizer))[0]


def ranges(student) -> torch.Tensor:
    return torch.stack([quantizer.range for quantizer in activation_quantizers(student).values()])


def test_a_moving_average_sees_every_batch_once_and_parameters_stay():
    student = new_student()
    before = {name: value.clone() for name, value in student.named_parameters()}
    calibrate(student, iter(BATCHES))
    image = ranges(student)[0]
    low, high = ([part(batch).item() for batch in BATCHES] for part in (torch.min, torch.max))
    weighted = [(0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2) for first, second in (low, high)]
    assert image.tolist() == pytest.approx(weighted)
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert not any(quantizer.observing for quantizer in activation_quantizers(student).values())


def test_calibrating_again_forgets_what_was_seen():
    student, fresh = new_student(), new_student()
    calibrate(student, [100 * BATCHES[0]])
    for each in (student, fresh):
        calibrate(each, BATCHES)
    assert torch.equal(ranges(student), ranges(fresh))


def test_another_observer_looks_for_this_once_and_batches_that_come_once_will_do():
    student = new_student()
    own = [quantizer.observer for quantizer in activation_quantizers(student).values()]
    calibrate(student, iter(BATCHES), lambda quantizer: Histogram(None))
    assert [quantizer.observer for quantizer in activation_quantizers(student).values()] == own
    images = torch.cat(BATCHES)
    assert torch.equal(ranges(student)[0], torch.stack([images.min(), images.max()]))


def test_observers_are_put_back_where_an_activation_overflows():
    student = new_student()
    own = [quantizer.observer for quantizer in activation_quantizers(student).values()]
    with pytest.raises(GdfqError, match="NaN or Inf"):
        calibrate(student, [BATCHES[0] * torch.inf], lambda quantizer: Histogram(None))
    assert [quantizer.observer for quantizer in activation_quantizers(student).values()] == own


def test_a_learned_step_sees_the_ranges_that_a_moving_average_sees():
    learned, fixed = new_student(observer="learned_step"), new_student()
    for _ in range(2):  # the second time with a step already there
        for student in (learned, fixed):
            calibrate(student, BATCHES)
        assert torch.equal(ranges(learned), ranges(fixed))
    for quantizer in activation_quantizers(learned).values():
        low, high = quantizer.range.tolist()
        assert quantizer.observer.step.item() == pytest.approx((high - low) / (2**quantizer.bits - 1), rel=1e-5)
    with torch.no_grad():
        error = (learned(BATCHES[0]) - fixed(BATCHES[0])).abs().max()
        assert error < 0.5 * fixed(BATCHES[0]).abs().max()


@pytest.mark.parametrize("observer", [None, lambda quantizer: Histogram(None)])
def test_a_learned_step_begins_at_the_range_whoever_found_it(observer):
    student = new_student(observer="learned_step")
    calibrate(student, BATCHES, observer)
    for quantizer in activation_quantizers(student).values():
        assert isinstance(quantizer.observer, LearnedStep)
        low, high = quantizer.range.tolist()
        assert quantizer.observer.step.item() == pytest.approx((high - low) / (2**quantizer.bits - 1), rel=1e-5)


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if not method.data.value.startswith("lab")]
)
def test_every_method_without_data_works_with_a_learned_step(method):
    settings = {
        "schedule.epochs": 3, "schedule.iterations": 2, "schedule.batch_size": 8, "schedule.range_epochs": 1,
        "schedule.warmup_epochs": 1, "schedule.range_batches": 2, "run.held_out_images": 16, "zeroq.iterations": 2,
        "zeroq.images": 8, "quantizer.observer": "learned_step", "quantizer.activation_bits": 8,
        "quantizer.weight_bits": 8, "method": method,
    }  # fmt: skip
    model = randomize_batch_norm(Plain())
    result = gdfq.quantize(model, Config.load("cifar", settings), progress=False)
    x = torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        assert (result.model(x) - model(x)).abs().max() < 0.5 * model(x).abs().max()
