"""Bits of single layers: which a pattern fits, what an activation with several readers takes, who knows of it."""

import pytest
import torch
from small_models import Plain, Residual, capture_once, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

import gdfq_ext
from gdfq.calibrate import calibrate
from gdfq.config import Config, LayerBits, QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture, quantized_layers, size_in_bytes
from gdfq.nn import activation_quantizers
from gdfq.registry import TARGETS
from gdfq.run import folder as run_folder
from gdfq.target import Target

LAYERS = ["conv1", "conv2", "depthwise", "grouped", "fc"]  # of Residual


class Fork(nn.Module):
    """One activation that two layers read, one of them through a flip."""

    in_size = (8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        x = torch.cat([self.left(x), self.right(x.flip(3))], 1)
        return self.fc(x.mean((2, 3)))


def quantized(layers: dict, make=Residual, **changes):
    captured = capture_once(make)
    config = Config.load("cifar", {"quantizer.layers": layers, **changes}).quantizer
    return captured, *build_quantized(captured, config)


def weight_bits(summary) -> list[int | None]:
    """Of the layers of `Residual`; None: float."""
    bits = {entry.name: entry.bits for entry in summary.weights}
    return [bits.get(name) for name in LAYERS]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, [4, 4, 4, 4, 4]),
        ({"conv2": 8}, [4, 8, 4, 4, 4]),
        ({"conv*": 6}, [6, 6, 4, 4, 4]),
        ({"conv?": 6, "conv1": 3}, [3, 6, 4, 4, 4]),
        ({"conv1": 3, "conv?": 6}, [6, 6, 4, 4, 4]),
        ({"<first>": 8, "<last>": 7}, [8, 4, 4, 4, 7]),
        ({"*": "float", "fc": 2}, [None, None, None, None, 2]),
        ({"conv1": {"weights": 8, "activations": 4}}, [8, 4, 4, 4, 4]),
        ({"conv1": {"weights": "float", "activations": 4}}, [None, 4, 4, 4, 4]),
    ],
)
def test_the_last_pattern_that_fits_counts(layers, expected):
    captured, student, summary = quantized(layers)
    assert weight_bits(summary) == expected
    parts = {layer.weight: layer.bits for layer in quantized_layers(student)}
    assert [parts.get(f"{name}.weight") for name in LAYERS] == expected
    sizes = {name: captured.module.get_parameter(f"{name}.weight").numel() for name in LAYERS}
    packed = sum(sizes[name] * (bits or 32) for name, bits in zip(LAYERS, expected, strict=True))
    others = sum(parameter.numel() for parameter in captured.module.parameters()) - sum(sizes.values())
    assert size_in_bytes(captured, summary)[1] == -(-(packed + 32 * others) // 8)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({}, 4),
        ({"left": 6}, 6),
        ({"right": 7}, 7),  # through the flip
        ({"left": 6, "right": 3}, 6),
        ({"left": 2}, 4),  # `right` wants the default
        ({"left": 2, "right": 3}, 3),
        ({"left": {"weights": 8, "activations": 2}, "right": 3}, 3),
        ({"left": "float", "right": 3}, 3),
        ({"left": "float", "right": "float"}, None),
    ],
)
def test_an_activation_takes_the_most_bits_that_a_reader_wants(layers, expected):
    _, student, summary = quantized(layers, Fork)
    assert {entry.name: entry.bits for entry in summary.activations}.get("bn") == expected
    of_bn = [quantizer.bits for name, quantizer in activation_quantizers(student).items() if ".bn." in name]
    assert of_bn == ([] if expected is None else [expected])
    wants_float = [name for name, bits in layers.items() if bits == "float"]
    assert summary.overruled == (wants_float if expected else [])
    assert ("set to float: another layer reads it in bits (left)" in str(summary)) == bool(summary.overruled)


def test_the_image_takes_the_bits_of_the_layer_that_reads_it():
    assert quantized({}, Plain)[2].activations[0].bits == 8
    assert quantized({"conv": 3}, Plain)[2].activations[0].bits == 3


def test_a_layer_in_float_computes_in_float_and_the_others_as_before():
    model = randomize_batch_norm(Plain())
    config = QuantizerConfig(layers={"<first>": "float"}, weight_bits=3)
    student, summary = build_quantized(capture(model), config)
    x = torch.randn(8, 3, 8, 8)
    calibrate(student, [x])
    features, pooled = (quantizer.range for quantizer in activation_quantizers(student).values())
    weight = model.fc.weight.detach()
    with torch.no_grad():
        y = F.relu(model.bn(model.conv(x)))  # the bias as it is
        y = gdfq_ext.fake_quantize(y, *features, 8, scheme="affine").mean((2, 3))  # which the pool alone reads
        y = gdfq_ext.fake_quantize(y, *pooled, 4, scheme="affine")
        unit = gdfq_ext.quantizer_grid(*pooled, 4, "affine").step
        unit = unit * gdfq_ext.quantizer_grid(weight.amin(1), weight.amax(1), 3, "affine").step
        bias = (model.fc.bias / unit).round() * unit
        expected = F.linear(y, gdfq_ext.fake_quantize_weight(weight, 3, scheme="affine"), bias)
        torch.testing.assert_close(student(x), expected, rtol=1e-4, atol=1e-5)
    reasons = {(entry.name, entry.op): entry.reason for entry in summary.stayed_float}
    assert "quantizer.layers" in reasons["conv", "weight of conv2d"]
    assert "quantizer.layers" in reasons["conv", "input image of conv2d"]
    assert "at 3 bits" in str(summary)
    assert "stayed float" in str(summary)


def test_the_summary_shows_all_bits():
    text = str(quantized({"conv1": 8, "fc": 2})[2])
    assert "5 layers at 2/4/8 bits" in text


@pytest.mark.parametrize(
    ("target", "schemes"),
    [("paper", ["eq6"] * 5), ("onnx", ["affine", "symmetric", "affine", "affine", "affine"])],  # symmetric at 8 bits
)
def test_weights_are_quantized_to_the_bits_of_their_layer(target, schemes):
    _, student, _ = quantized({"conv1": 2, "conv2": 8}, **{"quantizer.target": target})
    weights = [student.get_parameter(layer.weight).detach() for layer in quantized_layers(student)]
    (quantizer,) = {layer.quantizer for layer in quantized_layers(student)}
    for weight, result, bits, scheme in zip(weights, quantizer(weights), (2, 8, 4, 4, 4), schemes, strict=True):
        assert torch.equal(result, gdfq_ext.fake_quantize_weight(weight, bits, scheme=scheme))


def test_a_stored_model_knows_the_bits_of_its_layers(tmp_path):
    layers = {"<first>": {"weights": 8, "activations": 6}, "<last>": "float"}
    config = Config.load("cifar", {"quantizer.layers": layers}).quantizer
    student, _ = build_quantized(capture_once(Residual), config)
    x = torch.randn(8, 3, 8, 8)
    calibrate(student, [x])
    run_folder.save_quantized(tmp_path / "q.safetensors", student, config, (3, 8, 8))
    read = run_folder.load_quantized(tmp_path / "q.safetensors", Residual().eval())
    assert torch.equal(read(x), student(x))
    assert [layer.bits for layer in quantized_layers(read)] == [8, 4, 4, 4]


def test_a_pattern_that_fits_nothing_is_an_error_that_names_layers():
    with pytest.raises(GdfqError) as error:
        quantized({"conv9": 8})
    assert all(word in str(error.value) for word in ["quantizer.layers", "'conv9'", *LAYERS]), str(error.value)


@pytest.mark.parametrize("bits", [1, 9, "double", {"weights": 8}, {"weights": 8, "activations": 4, "bias": 8}])
def test_bits_that_there_are_not_are_refused(bits):
    with pytest.raises(GdfqError, match=r"quantizer\.layers"):
        Config.load("cifar", {"quantizer.layers": {"conv1": bits}})


def test_what_the_target_says_of_layers_gives_way_to_the_setting(monkeypatch):
    both = LayerBits(weights=8, activations=8)
    layers = {"<first>": both, "<last>": both, "head.*": both}
    monkeypatch.setitem(TARGETS, "ours", Target(name="ours", layers=layers))
    assert weight_bits(quantized({"fc": 3}, **{"quantizer.target": "ours"})[2]) == [8, 4, 4, 4, 3]


def test_layers_survive_the_way_to_a_file_and_back(tmp_path):
    layers = {"<first>": 8, "a.*": "float", "b": {"weights": 8, "activations": "float"}}
    config = Config.load("cifar", {"quantizer.layers": layers})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert Config.load(tmp_path / "config.toml") == config


class Halves(Plain):
    """A layer whose weight is a part of a parameter."""

    def forward(self, x):
        left, _ = self.conv.weight.split([4, 4])
        return self.fc(F.relu(self.bn(torch.cat([F.conv2d(x, left, padding=1)] * 2, 1))).mean((2, 3)))


def test_a_part_of_a_parameter_stays_float_where_that_is_set():
    captured = capture_once(Halves)
    layers = {"conv2d*": {"weights": "float", "activations": 8}}
    student, summary = build_quantized(captured, Config.load("cifar", {"quantizer.layers": layers}).quantizer)
    assert [entry.name for entry in summary.weights] == ["fc"]
    assert [layer.weight for layer in quantized_layers(student)] == ["fc.weight"]
