"""The methods `mse`, `aciq` and `kl` on a network: weights clamped to clip values, ranges from histograms."""

import time

import numpy as np
import pytest
import torch
from small_models import Plain, Residual, capture_once
from torch.nn import functional as F

import gdfq_ext
from gdfq.calibrate import calibrate
from gdfq.clip_values import RULES, mse
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture, quantized_layers
from gdfq.methods.clipping import clip
from gdfq.models import load_model
from gdfq.nn import activation_quantizers
from gdfq.observers import Histogram, MovingAverage

BATCHES = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def new_student(make=Plain, **quantizer):
    captured = capture_once(make)
    return build_quantized(captured, QuantizerConfig(**quantizer))[0]


@pytest.mark.parametrize("rule", RULES)
def test_a_clipped_weights_range_is_the_clip_value(rule):
    student = new_student(Residual, weight_bits=3)
    before = {layer.weight: student.get_parameter(layer.weight).detach().clone() for layer in quantized_layers(student)}
    with torch.no_grad():
        before["conv2.weight"][3, 2, 1, 1] = 4.0
        student.get_parameter("conv2.weight").copy_(before["conv2.weight"])
    clip(student, BATCHES, rule)
    for name, weight in before.items():
        rows = weight.reshape(1, -1) if rule == "kl" else weight.flatten(1)
        lower, upper = RULES[rule](rows, None, 3, "affine")
        expected = weight.flatten(1).clamp(lower[:, None], upper[:, None])
        assert torch.equal(student.get_parameter(name).detach().flatten(1), expected)
    assert student.get_parameter("conv2.weight").max() < 4.0


@pytest.mark.parametrize("target", ["onnx", "int4-symmetric", "paper"])
def test_mse_clipping_of_weights_brings_them_nearer_to_float(target):
    student = new_student(Residual, weight_bits=3, target=target)
    layers = quantized_layers(student)
    weights = {layer: student.get_parameter(layer.weight).detach().clone() for layer in layers}
    clip(student, BATCHES, "mse")
    for layer, weight in weights.items():
        now = student.get_parameter(layer.weight).detach()
        plain, clipped = (
            (gdfq_ext.fake_quantize_weight(value, 3, scheme=layer.scheme) - weight).square().flatten(1).sum(1)
            for value in (weight, now)
        )
        assert (clipped <= plain * (1 + 1e-5)).all(), layer.weight
        if layer.weight != "depthwise.weight":  # whose nine weights a channel are better left alone
            assert clipped.sum() < plain.sum()


def float_activations(student) -> torch.Tensor:
    """What the quantizer behind `Plain`'s ReLU gets: weights quantized, the image and the biases not."""
    images = torch.cat(BATCHES)
    (layer, _) = quantized_layers(student)
    weight = gdfq_ext.fake_quantize_weight(student.get_parameter("conv.weight").detach(), 4, scheme=layer.scheme)
    x = F.conv2d(images, weight, padding=1)
    parts = [getattr(student.bn, name).detach() for name in ("running_mean", "running_var", "weight", "bias")]
    return F.relu(F.batch_norm(x, *parts))


def histograms(student) -> dict:
    """Of every activation of `student` on all batches: minimum, maximum, and the histogram."""
    found = {}

    def observer(quantizer):
        return found.setdefault(quantizer, Histogram(mse))

    calibrate(student, BATCHES, observer)
    return {quantizer: (*seen.bounds, seen.values_and_counts()) for quantizer, seen in found.items()}


def test_histograms_hold_every_activation_of_all_batches():
    student = new_student(target="paper")
    (quantizer,) = activation_quantizers(student).values()
    with torch.no_grad():
        low, high, (values, counts) = histograms(student)[quantizer]
        expected = float_activations(student).double().numpy()
    assert (low.item(), high.item()) == pytest.approx((expected.min(), expected.max()), abs=1e-6)
    assert counts.sum() == expected.size
    width = expected.max() / 2048
    bins = np.rint(values[0].numpy() / width - 0.5).astype(int)
    histogram = np.bincount(np.minimum((expected / width).astype(int), 2047).ravel(), minlength=2048)
    moved = np.abs(np.bincount(bins, counts[0].numpy(), 2048) - histogram).sum() / 2
    assert moved <= 1e-3 * expected.size  # float32 rounding at the edge of a bin
    assert isinstance(quantizer.observer, MovingAverage)


def test_histograms_are_those_of_activations_that_nothing_has_quantized():
    student = new_student(activation_bits=2, input_bits=2)
    _, *quantizers = activation_quantizers(student).values()
    with torch.no_grad():
        found, activations = histograms(student), float_activations(student)
    for quantizer, expected in zip(quantizers, (activations, activations.mean((2, 3))), strict=True):
        low, high, _ = found[quantizer]
        torch.testing.assert_close(torch.stack([low, high]), torch.stack(expected.aminmax()))


@pytest.mark.parametrize("rule", RULES)
def test_activation_ranges_are_the_rules(rule):
    student = new_student(target="paper")
    clip(student, BATCHES, rule)
    (activation,) = activation_quantizers(student).values()
    with torch.no_grad():
        seen = float_activations(student).reshape(1, -1)
    _, upper = RULES[rule](seen, torch.ones_like(seen), 4)
    assert activation.range[0] == 0
    assert activation.range[1].item() == pytest.approx(min(upper.item(), seen.max().item()), rel=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_the_image_keeps_its_minimum_and_maximum(rule):
    student = new_student()
    clip(student, BATCHES, rule)
    image, *_ = activation_quantizers(student).values()
    images = torch.cat(BATCHES)
    assert torch.equal(image.range, torch.stack([images.min(), images.max()]))
    assert student(images).isfinite().all()


def test_activations_that_overflow_are_named():
    student = new_student()
    with torch.no_grad():
        student.bn.running_var.fill_(1e-36)
        student.bn.weight.fill_(1e30)
    with pytest.raises(GdfqError, match="NaN or Inf"):
        clip(student, [images * 1e10 for images in BATCHES], "mse")


@pytest.mark.long
def test_searches_for_resnet18_take_seconds():
    """Below the promised 10 s on a CPU; two images will do, since a search sees only histograms of them."""
    captured = capture(load_model("pytorchcv:resnet18"))
    images = torch.randn(2, 3, 224, 224)
    for rule in RULES:
        student = build_quantized(captured, QuantizerConfig())[0]
        start = time.process_time()  # of all threads: what else the machine does is not counted
        clip(student, [images], rule)
        assert time.process_time() - start < 10, rule
