"""Stored weight quantizers: Eq. 6's step gives Eq. 6's codes, rounding changes them as said, files bring them back."""

import numpy as np
import pytest
import torch
from quantizer_oracle import quantize
from small_models import Plain, Residual, capture_once

import gdfq_ext
from gdfq.config import QuantizerConfig
from gdfq.graph import build_quantized, quantized_layers
from gdfq.nn import StoredQuantizer, WeightFakeQuantize
from gdfq.run import folder as run_folder

SHAPES = [(6, 3, 3, 3), (4, 9), (5, 1, 2, 2)]


def weights() -> list[torch.Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in SHAPES]


def step_and_zero_point(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What Eq. 6 takes anew from every channel's minimum and maximum, codes counted from 0."""
    rows = weight.detach().flatten(1)
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    return step, -(rows.amin(1) / step).round()


def per_channel(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_of_eq_6_gives_its_codes(bits, shape):
    weight = torch.randn(shape)
    step, zero_point = step_and_zero_point(weight, bits)
    stored = StoredQuantizer(bits, "identity", step, zero_point)
    rows = weight.flatten(1).numpy()
    anew = quantize(rows, rows.min(1, keepdims=True), rows.max(1, keepdims=True), bits)
    np.testing.assert_allclose(stored(weight).flatten(1).numpy(), anew, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored(weight), gdfq_ext.fake_quantize_weight(weight, bits), rtol=1e-4, atol=1e-5)
    codes = stored.codes(weight)
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)
    back = (codes - per_channel(zero_point, weight)) * per_channel(step, weight)
    torch.testing.assert_close(stored(weight), back, rtol=1e-5, atol=1e-6)


def test_rounding_is_added_to_what_is_below():
    weight = torch.tensor([[-1.2, -0.5, 0.3, 0.9, 2.7]])
    for rounding, codes in (([0, 0, 0, 0, 0], [2, 3, 4, 4, 6]), ([1, 0, 1, 0, 1], [3, 3, 5, 4, 7])):
        stored = StoredQuantizer(
            3, "identity", torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([rounding], dtype=torch.int64)
        )
        assert stored.codes(weight).tolist() == [codes]
        assert stored(weight).tolist() == [[code - 4 for code in codes]]
    nearest = StoredQuantizer(3, "identity", torch.tensor([1.0]), torch.tensor([4.0]))
    assert nearest.codes(weight).tolist() == [[3, 4, 4, 5, 7]]  # half to even


@pytest.mark.parametrize(("straight_through", "passes"), [("identity", [1, 1, 1]), ("clipped", [0, 1, 0])])
def test_the_gradient_passes_where_nothing_was_clamped_or_everywhere(straight_through, passes):
    weight = torch.tensor([[-9.0, 0.4, 9.0]], requires_grad=True)
    stored = StoredQuantizer(3, straight_through, torch.tensor([1.0]), torch.tensor([4.0]))
    quantized = stored(weight)
    assert quantized.tolist() == [[-4, 0, 3]]
    quantized.sum().backward()
    assert weight.grad.tolist() == [passes]


@pytest.mark.parametrize("stored", [[], [1], [0, 2], [2, 0, 1]])
def test_weights_keep_their_places_whichever_of_them_are_stored(stored):
    bits, given = [2, 4, 8], weights()
    quantizer = WeightFakeQuantize(bits)
    expected = [gdfq_ext.fake_quantize_weight(weight, k) for weight, k in zip(given, bits, strict=True)]
    for index in stored:
        step, zero_point = step_and_zero_point(given[index], bits[index])
        quantizer.store(index, 2 * step, zero_point)
        codes = (given[index] / per_channel(2 * step, given[index])).round() + per_channel(zero_point, given[index])
        codes = codes.clamp(0, 2 ** bits[index] - 1) - per_channel(zero_point, given[index])
        expected[index] = codes * per_channel(2 * step, given[index])
    for result, wanted in zip(quantizer(given), expected, strict=True):
        torch.testing.assert_close(result, wanted)


def stored_student():
    student = new_student()
    for layer in quantized_layers(student)[1:]:
        weight = student.get_parameter(layer.weight)
        rounding = torch.randint(0, 2, weight.shape) if layer.index % 2 else None
        layer.quantizer.store(layer.index, *step_and_zero_point(1.3 * weight, layer.bits), rounding)
    for name, value in student.state_dict().items():
        if name.endswith(".range"):
            value.copy_(torch.tensor([-4.0, 4.0]))
    return student


def new_student(make=Residual):
    return build_quantized(capture_once(make), QuantizerConfig())[0]


def test_a_state_dict_with_stored_weights_loads_into_a_fresh_student(tmp_path):
    student, fresh = stored_student(), new_student()
    x = torch.randn(4, 3, 8, 8)
    assert fresh.load_state_dict(student.state_dict()) == ([], [])
    assert torch.equal(fresh(x), student(x))
    assert fresh.state_dict().keys() == student.state_dict().keys()
    # And into one that has other values stored.
    other = stored_student()
    other.load_state_dict(student.state_dict())
    assert torch.equal(other(x), student(x))
    run_folder.save_quantized(tmp_path / "q.safetensors", student, QuantizerConfig(), (3, 8, 8))
    read = run_folder.load_quantized(tmp_path / "q.safetensors", Residual().eval())
    assert torch.equal(read(x), student(x))


def test_what_was_stored_is_a_copy():
    step, zero_point = torch.ones(2), torch.zeros(2)
    stored = StoredQuantizer(4, "identity", step, zero_point)
    step.zero_()
    assert stored(torch.tensor([[1.2], [3.0]])).tolist() == [[1], [3]]


def test_stored_weights_train_with_the_rest():
    student = stored_student()
    student(torch.randn(4, 3, 8, 8)).square().mean().backward()
    for layer in quantized_layers(student):
        assert student.get_parameter(layer.weight).grad.abs().max() > 0


def test_a_student_without_stored_weights_has_the_state_of_before():
    keys = new_student(Plain).state_dict().keys()
    assert not any("weight_quantizers" in key for key in keys)
