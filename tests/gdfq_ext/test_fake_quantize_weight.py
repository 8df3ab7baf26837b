"""Per-channel weight quantization with ranges taken anew, single and list form."""

import numpy as np
import pytest
import quantizer_oracle as oracle
import torch

import gdfq_ext


def sample(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(weight, bits):
    w = oracle.to_numpy(weight).reshape(weight.shape[0], -1)
    return oracle.quantize(w, w.min(1, keepdims=True), w.max(1, keepdims=True), bits).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
def test_each_channel_is_quantized_with_its_own_range(bits, dtype, straight_through):
    weight = sample((6, 5, 3, 3), dtype).requires_grad_()
    quantized = gdfq_ext.fake_quantize_weight(weight, bits, straight_through=straight_through)
    assert quantized.dtype == dtype
    oracle.exactly(quantized, expected(weight, bits))


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 11), (5, 1, 3, 3), (4, 3, 2, 2, 2), (0, 3, 3, 3), (4, 0)])
@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
def test_any_weight_shape(shape, straight_through):
    weight = sample(shape).requires_grad_()
    quantized = gdfq_ext.fake_quantize_weight(weight, 4, straight_through=straight_through)
    assert quantized.shape == weight.shape
    if weight.numel():
        oracle.exactly(quantized, expected(weight, 4))
    quantized.sum().backward()
    assert weight.grad.shape == weight.shape


def test_channels_last_weights_stay_so():
    weight = sample((6, 5, 3, 3)).contiguous(memory_format=torch.channels_last)
    quantized = gdfq_ext.fake_quantize_weight(weight, 4)
    oracle.exactly(quantized, expected(weight, 4))
    assert quantized.is_contiguous(memory_format=torch.channels_last)


def test_extremes_of_a_channel_move_by_less_than_a_step():
    weight = sample((4, 100))
    quantized = gdfq_ext.fake_quantize_weight(weight, 3)
    step = (weight.amax(1) - weight.amin(1)) / 7
    assert ((weight - quantized).abs().amax(1) <= 1.001 * step).all()
    assert [row.unique().numel() <= 8 for row in quantized] == [True] * 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_channel_with_nan_or_infinity_becomes_nan(bad):
    weight = sample((3, 8))
    weight[1, 2] = bad
    quantized = gdfq_ext.fake_quantize_weight(weight, 4)
    assert quantized.isnan().all(dim=1).tolist() == [False, True, False]
    assert quantized.isnan().any(dim=1).tolist() == [False, True, False]


def test_a_constant_channel_keeps_its_value():
    weight = torch.tensor([[0.25, 0.25], [0.0, 0.0], [-3.0, -3.0]])
    torch.testing.assert_close(gdfq_ext.fake_quantize_weight(weight, 4), weight, rtol=1e-6, atol=0)


def test_identity_gradient_passes_unchanged():
    weight, gradient = sample((4, 5)).requires_grad_(), sample((4, 5), seed=1)
    gdfq_ext.fake_quantize_weight(weight, 2).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_clipped_gradient_is_zero_where_the_maximum_rounds_past_the_top():
    # scale 1, zero = round(0.5) + 2 = 2 (half to even), so 3.5 becomes level round(1.5) = 2 > 1.
    weight = torch.tensor([[0.5, 1.0, 2.0, 3.5]], requires_grad=True)
    gdfq_ext.fake_quantize_weight(weight, 2, straight_through="clipped").sum().backward()
    passes = oracle.inside(oracle.to_numpy(weight), 0.5, 3.5, 2)
    assert passes.tolist() == [[True, True, True, False]]
    assert weight.grad.tolist() == [[1, 1, 1, 0]]


@pytest.mark.parametrize("straight_through", ["identity", "clipped"])
@pytest.mark.parametrize("bits", [4, [2, 5, 8]])
def test_the_list_form_equals_one_call_per_weight(bits, straight_through):
    weights = [sample((6, 5, 3, 3)), sample((3, 7), torch.float16), sample((4,), torch.bfloat16)]
    weights = [weight.requires_grad_() for weight in weights]
    together = gdfq_ext.fake_quantize_weights(weights, bits, straight_through=straight_through)
    for quantized, weight, k in zip(together, weights, [bits] * 3 if isinstance(bits, int) else bits, strict=True):
        alone = gdfq_ext.fake_quantize_weight(weight, k, straight_through=straight_through)
        assert quantized.dtype == weight.dtype
        assert torch.equal(quantized, alone)
        gradients = [torch.autograd.grad((q * q.detach()).sum(), weight)[0] for q in (quantized, alone)]
        assert torch.equal(*gradients)


def test_the_list_form_differentiates_one_of_several():
    first, second = sample((3, 4)).requires_grad_(), sample((2, 5)).requires_grad_()
    quantized = gdfq_ext.fake_quantize_weights([first, second], 4)
    quantized[0].sum().backward()
    assert np.all(first.grad.numpy() == 1)
    assert second.grad is None or np.all(second.grad.numpy() == 0)


def test_no_weights_give_no_results():
    assert gdfq_ext.fake_quantize_weights([], 4) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gdfq_ext.fake_quantize_weight(torch.tensor(1.0), 4), ValueError, r"weights\[0\] has no dimensions"),
        (lambda: gdfq_ext.fake_quantize_weight(torch.ones(2, 2), 16), ValueError, "bits is 16"),
        (lambda: gdfq_ext.fake_quantize_weight(torch.ones(2).double(), 4), TypeError, r"weights\[0\] is torch.float64"),
        (lambda: gdfq_ext.fake_quantize_weights([torch.ones(2)], [4, 4]), ValueError, "2 values for 1 weights"),
        (lambda: gdfq_ext.fake_quantize_weights([torch.ones(2)] * 2, [4, 1]), ValueError, "bits is 1"),
        (lambda: gdfq_ext.fake_quantize_weights([torch.ones(2).int()], 4), TypeError, r"weights\[0\] is torch.int32"),
        (
            lambda: gdfq_ext.fake_quantize_weights([torch.ones(2)], 4, straight_through="x"),
            ValueError,
            "straight_through is 'x'",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
