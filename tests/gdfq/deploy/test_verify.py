"""A file that is right, and files that were broken on purpose: verification names the layer."""

import json
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from integer_network import integer_network
from onnx import numpy_helper
from small_models import Plain, Residual, randomize_batch_norm
from torch import nn

from gdfq.calibrate import end_pass
from gdfq.config import QuantizerConfig
from gdfq.deploy import Normalization, QuantizedTensor, WrittenLayer, write
from gdfq.deploy.grids import Grid
from gdfq.deploy.levels import EPSILON, GIVEN, LayerCheck, Simulation, compare, cut, layers_before
from gdfq.deploy.runtime import operators, session
from gdfq.deploy.verify import LEVELS_OF, verify
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, capture
from gdfq.nn import observing


def images(count: int = 24, channels: int = 3, size: int = 8):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def check(tmp_path):
    """Verify a network against what was written."""

    def checked(student, written, **options):
        path = tmp_path / "model.onnx"
        onnx.save(written.model, path)
        batches = options.pop("images", images(48).split(24))
        return verify(student, written, path, batches, threads=1, seconds=0.0, **options)

    return checked


def change(written, name, change) -> None:
    """Replace a constant of the file."""
    (tensor,) = (tensor for tensor in written.model.graph.initializer if tensor.name == name)
    value = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(change(value).astype(value.dtype), name))


def at(index, amount):
    def changed(value):
        value[index] += amount
        return value

    return changed


@pytest.mark.parametrize(("top", "largest"), [(15, 7), (15, 15), (255, 127)])
def test_a_sound_file(check, top, largest):
    student, written = integer_network(top=top, largest=largest)
    found = check(student, written, real_images=[images(10)])
    assert found.failed == []
    total = sum(found.layers.values(), LayerCheck(""))
    assert total.codes == LEVELS_OF * (3 * 64 + 3 * 8 * 64 + 8)
    assert total.boundary <= 1e-5 * total.codes
    assert found.argmax["synthetic"].images == 48
    assert found.argmax["real"].images == 10
    assert found.argmax["synthetic"].equal >= 47
    assert not found.saturated or largest == 127  # the latter on x64 without VNNI
    assert found.notes == []


@pytest.mark.parametrize(
    ("constant", "changed", "failed"),
    [
        ("conv2", at((0, 0, 1, 1), 1), "conv2"),
        ("conv2.bias", at(3, 1), "conv2"),
        ("conv1.bias", at(0, -1), "conv1"),
        ("fc.bias", at(2, 1), "fc"),
        ("fc", at((1, 1), 1), "fc"),
        ("conv1.step", lambda step: step * np.float32(1.01), "conv1"),
        ("sum_step", lambda step: step * np.float32(1.01), "quantizers.sum"),
        ("second_zero", lambda zero: zero + 1, "conv2"),
        ("image_step", lambda step: step * np.float32(1.01), "quantizers.image"),
    ],
)
def test_a_broken_constant_names_the_layer(check, constant, changed, failed):
    student, written = integer_network()
    change(written, constant, changed)
    found = check(student, written)
    assert failed in found.failed
    assert any(line.split()[:2] == ["WRONG", f"{failed}:"] for line in str(found).splitlines())
    # A step is read by the layer that follows, too; nothing else is.
    assert len(found.failed) <= (3 if "step" in constant or "zero" in constant else 1)


def test_a_missing_clip_names_the_layer(check):
    student, written = integer_network()
    (clip,) = (node for node in written.model.graph.node if node.output[0] == "first_codes")
    written.model.graph.node.remove(clip)
    (quantize,) = (node for node in written.model.graph.node if node.output[0] == clip.input[0])
    quantize.output[0] = "first_codes"
    assert check(student, written).failed == ["conv1"]


def test_an_error_hides_no_later_one(check):
    student, written = integer_network()
    change(written, "conv1.bias", lambda bias: bias + 200)
    change(written, "conv2.bias", at(0, 5))
    assert check(student, written).failed == ["conv1", "conv2"]


def test_layers_of_each_quantizer():
    _, written = integer_network()
    assert layers_before(written.model, written.codes) == {
        "quantizers.image": "quantizers.image",
        "quantizers.first": "conv1",
        "quantizers.second": "conv2",
        "quantizers.sum": "quantizers.sum",
        "quantizers.pool": "quantizers.pool",
        "logits": "fc",
    }


def test_the_cut_model_runs_in_the_same_operators():
    _, written = integer_network()
    assert operators(cut(written.model, written.codes)).integers == operators(written.model).integers


@pytest.mark.parametrize(
    ("value", "reach", "ours", "theirs", "boundary"),
    [
        (2.5 + 15 * EPSILON / 2, 15, 3, 2, True),
        (2.5 - 15 * EPSILON / 2, 15, 2, 3, True),
        (2.5 + 15 * EPSILON * 2, 15, 3, 2, False),
        (2.5 + 15 * EPSILON * 2, 60, 3, 2, True),  # where the channel reaches beyond the range
        (2.5, 15, 3, 1, False),  # two levels apart
        (3.4, 15, 3, 4, False),
    ],
)
def test_what_counts_as_a_boundary(value, reach, ours, theirs, boundary):
    class Sees:
        codes: ClassVar = {"first": QuantizedTensor("codes", Grid(0.1, 0, 0, 15))}

        def values(self, images, where):
            return {name: (torch.tensor([value]).double(), torch.tensor([reach])) for name in where}

    levels, computed = ({"first": torch.tensor([code], dtype=torch.uint8)} for code in (ours, theirs))
    (check,) = compare(Sees(), images(1), levels, computed, {"first": "conv1"}).values()
    assert (check.name, check.codes, check.boundary, check.wrong) == ("conv1", 1, int(boundary), int(not boundary))


def test_values_that_are_no_levels():
    student, written = integer_network()
    student.get_submodule("quantizers.first").forward = lambda x: x
    with pytest.raises(GdfqError, match=r"quantizers.first gives values that are no levels"):
        Simulation(student, written.codes).levels(images(2))


def test_without_onnxruntime(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = check(*integer_network())
    assert found.failed == []
    assert found.notes == ["not verified: onnxruntime is not installed: this needs `pip install gdfq[export]`"]
    assert "not verified" in str(found)


def test_a_float_model_that_torch_does_not_write(check):
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("no such thing")

    found = check(*integer_network(), float_model=Odd())
    assert found.time is not None
    assert found.float_bytes is None
    assert "no such thing" in found.notes[0]


def test_no_images(check):
    with pytest.raises(GdfqError, match="no images"):
        check(*integer_network(), images=[])


def quantized(model):
    """Q of a small network, with ranges of several batches."""
    student, _ = build_quantized(capture(randomize_batch_norm(model)), QuantizerConfig())
    with observing(student), torch.no_grad():
        for batch in images(48).split(8):
            student(batch)
    end_pass(student)
    return student


@pytest.mark.parametrize("network", [Plain, Residual])
def test_what_the_writer_writes(check, network):
    model = network()
    student = quantized(model)
    found = check(student, write(student, (3, 8, 8)), float_model=model)
    assert found.failed == []
    assert found.operators.layers.floats == ()
    assert found.float_bytes > 0
    as_json = json.loads(found.to_json())
    assert as_json["argmax"]["synthetic"]["images"] == 48
    assert as_json["operators"]["places"]["convolutions"]["integer"] == found.operators.places["convolutions"].total
    assert "the float model" in str(found)


def test_a_file_that_takes_pixels(check):
    student = quantized(Plain())
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    metadata = {"mean": json.dumps(mean), "std": json.dumps(std)}
    written = write(student, (3, 8, 8), pixels=Normalization(mean, std), metadata=metadata)
    found = check(student, written)
    assert found.failed == []
    assert found.argmax["synthetic"].equal >= 47


def test_what_saturates_is_named(check, monkeypatch):
    """In the place of a CPU whose sums saturate: a session without the option has another model."""
    student, written = integer_network()
    broken = integer_network()[1]
    change(broken, "conv2.bias", at(0, 200))

    def session_of(model, *, x64quantprecision=True, threads=None):
        is_cut = any(value.name.endswith(GIVEN) for value in getattr(model.graph, "input", ()))
        return session(model if x64quantprecision or not is_cut else cut(broken.model, broken.codes), threads=threads)

    monkeypatch.setattr("gdfq.deploy.verify.session", session_of)
    found = check(student, written)
    assert list(found.saturated) == ["conv2"]
    assert found.failed == []
    assert "unless session.x64quantprecision is set to 1" in str(found)


def test_layers_that_can_saturate_are_named(check):
    """Neighbors of 127 each, times 255 each, are beyond 16 bits; of 15 and 15 they are not."""
    student, written = integer_network()
    layers = [WrittenLayer("conv1", "conv1", "", 2 * 127 * 255), WrittenLayer("conv2", "conv2", "", 2 * 15 * 15)]
    assert check(student, replace(written, layers=layers)).saturating == ["conv1"]
