"""AdaRound's soft weights and their penalty against float64, with the gradients of both."""

import pytest
import torch

import gdfq_ext

SHAPES = [(6, 5, 3, 3), (40, 1, 3, 3), (3, 7), (5,), (4, 3, 2, 3, 2)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def case(shape, bits=4, scheme="affine", layout=torch.contiguous_format):
    """base, v, step, zero_point; some of the codes lie beyond the bounds, some of h at its own."""
    g = generator(len(shape))
    lowest, highest = gdfq_ext.code_bounds(bits, scheme)
    zero_point = torch.randint(lowest, highest + 1, shape[:1], generator=g).float()
    if scheme == "symmetric":
        zero_point.zero_()
    code = torch.randint(lowest - 2, highest + 2, shape, generator=g).float()
    base = code - zero_point.view(-1, *[1] * (len(shape) - 1))
    v = torch.randn(shape, generator=g) * 2
    step = torch.rand(shape[:1], generator=g) + 0.05
    if len(shape) == 4:
        base, v = base.contiguous(memory_format=layout), v.contiguous(memory_format=layout)
    return base, v, step, zero_point


def in_float64(base, v, step, zero_point, sharpness, bits, scheme):
    """The same as a differentiable expression: codes are clamped, not levels."""
    h = (v.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    per_channel = (-1, *[1] * (v.dim() - 1))
    zero_point = zero_point.double().view(per_channel)
    code = (base.double() + zero_point + h).clamp(*gdfq_ext.code_bounds(bits, scheme))
    return (code - zero_point) * step.view(per_channel), (1 - (2 * h - 1).abs().pow(sharpness)).sum()


@pytest.mark.parametrize("sharpness", [1.0, 2.4, 20.0])
@pytest.mark.parametrize("scheme", ["eq6", "affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "layout"), [*((shape, torch.contiguous_format) for shape in SHAPES), (SHAPES[0], torch.channels_last)]
)
def test_values_and_gradients_are_those_of_float64(shape, bits, scheme, layout, sharpness):
    base, v, step, zero_point = case(shape, bits, scheme, layout)
    leaves = [v.requires_grad_(), step.requires_grad_()]
    y, penalty = gdfq_ext.round_learned(base, *leaves, zero_point, torch.tensor(sharpness), bits, scheme=scheme)
    assert y.dtype == penalty.dtype == torch.float32
    assert y.stride() == base.stride()
    assert penalty.shape == ()
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = in_float64(base, *leaves64, zero_point, sharpness, bits, scheme)
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(penalty.double(), expected[1], rtol=1e-5, atol=1e-5)

    upstream = torch.randn(shape, generator=generator(9))
    actual = torch.autograd.grad((y * upstream).sum() - 0.7 * penalty, leaves)
    of_y, of_penalty = expected
    exact = torch.autograd.grad((of_y * upstream.double()).sum() - 0.7 * of_penalty, leaves64)
    assert actual[0].stride() == base.stride()
    torch.testing.assert_close(actual[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1].double(), exact[1], rtol=1e-5, atol=1e-4)


def one_weight(v, base=0.0, sharpness=2.0, bits=2):
    """Of a weight of one element with step 3 and codes 0 to 2^bits - 1: y, penalty and their gradients of v."""
    v, one = torch.tensor([v], requires_grad=True), torch.ones(1)
    y, penalty = gdfq_ext.round_learned(one * base, v, 3 * one, 0 * one, one * sharpness, bits)
    gradients = [torch.autograd.grad(result, v, retain_graph=True)[0].item() for result in (y, penalty)]
    return y.item(), penalty.item(), *gradients


def test_halfway():
    assert one_weight(0.0) == pytest.approx((1.5, 1.0, 3 * 1.2 / 4, 0.0))


@pytest.mark.parametrize("sharpness", [1.0, 1.5, 20.0])
def test_there_is_no_slope_halfway_whatever_the_sharpness(sharpness):
    assert one_weight(0.0, sharpness=sharpness)[1:] == pytest.approx((1.0, 0.9, 0.0))


@pytest.mark.parametrize(("v", "y"), [(-2.41, 0), (2.41, 3), (-50.0, 0), (200.0, 3)])
def test_beyond_up_or_down_nothing_moves(v, y):
    assert one_weight(v) == (y, 0, 0, 0)


@pytest.mark.parametrize("v", [-2.39, 2.39])
def test_up_to_there_it_does(v):
    _, penalty, of_y, of_penalty = one_weight(v)
    assert penalty > 0
    assert of_y > 0.2
    assert of_penalty * v < 0


@pytest.mark.parametrize(("base", "y"), [(-2.0, 0), (3.0, 9), (5.0, 9)])
def test_beyond_the_codes_the_penalty_alone_moves(base, y):
    value, penalty, of_y, of_penalty = one_weight(1.0, base)
    assert (value, of_y) == (y, 0)
    assert (penalty, of_penalty) == one_weight(1.0)[1::2]


def test_a_weight_that_is_learned_to_be_up_or_down_is_the_nearest_of_both():
    base, _, step, zero_point = case((8, 40))
    up = torch.rand(base.shape, generator=generator(3)) < 0.5
    y, penalty = gdfq_ext.round_learned(base, torch.where(up, 9.0, -9.0), step, zero_point, torch.tensor([20.0]), 4)
    low = -zero_point.unsqueeze(1)
    assert torch.equal(y, (base + up).clamp(low, low + 15) * step.unsqueeze(1))
    assert penalty == 0


@pytest.mark.parametrize("step", [0.0, -1.0, torch.nan])
def test_a_bad_step_gives_nan_in_its_channel(step):
    base, v, steps, zero_point = case((3, 7))
    steps[1] = step
    y, penalty = gdfq_ext.round_learned(base, v, steps, zero_point, torch.tensor(2.0), 4)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert not y[::2].isnan().any()
    assert penalty.isfinite()


def test_nan_is_not_hidden():
    base, v, step, zero_point = case((3, 7))
    v[1, 2] = torch.nan
    v.requires_grad_()
    y, penalty = gdfq_ext.round_learned(base, v, step, zero_point, torch.tensor(2.0), 4)
    (y.sum() + penalty).backward()
    assert torch.equal(y.isnan(), v.isnan())
    assert penalty.isnan()
    assert torch.equal(v.grad.isnan(), v.isnan())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)])
def test_nothing(shape):
    v, step = torch.empty(shape, requires_grad=True), torch.ones(shape[0], requires_grad=True)
    y, penalty = gdfq_ext.round_learned(torch.empty(shape), v, step, torch.zeros(shape[0]), torch.tensor(2.0), 4)
    (y.sum() + penalty).backward()
    assert y.shape == v.grad.shape == shape
    assert penalty == 0
    assert step.grad.tolist() == [0] * shape[0]


def test_it_refuses_a_second_derivative():
    base, v, step, zero_point = case((3, 7))
    y, _ = gdfq_ext.round_learned(base, v.requires_grad_(), step, zero_point, torch.tensor(2.0), 4)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(y.square().sum(), v, create_graph=True)


def test_compiles_without_graph_breaks():
    base, _, _, zero_point = case((6, 5, 3, 3))

    def run(v, step, sharpness):
        y, penalty = gdfq_ext.round_learned(base, v, step, zero_point, sharpness, 4)
        return y.square().sum() + penalty

    def gradients(function):
        _, v, step, _ = case((6, 5, 3, 3))
        function(v.requires_grad_(), step.requires_grad_(), torch.tensor(7.0)).backward()
        return v.grad, step.grad

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(run), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": torch.ones(2, 3).half()}, TypeError, "base is torch.float16; allowed is float32"),
        ({"base": torch.tensor(1.0)}, ValueError, "base has no dimensions"),
        ({"v": torch.ones(2, 3).bfloat16()}, TypeError, "v is torch.bfloat16; allowed is float32"),
        ({"v": torch.ones(3, 2)}, ValueError, r"v has shape \(3, 2\); allowed is \(2, 3\)"),
        ({"v": torch.ones(2, 3, device="meta")}, ValueError, "v is on meta"),
        ({"step": torch.ones(3)}, ValueError, r"step has shape \(3,\); allowed is \(2,\)"),
        ({"zero_point": torch.ones(1)}, ValueError, r"zero_point has shape \(1,\); allowed is \(2,\)"),
        ({"sharpness": torch.ones(2)}, ValueError, r"sharpness has shape \(2,\); allowed is \(1,\)"),
        ({"bits": 1}, ValueError, "bits is 1; allowed is an integer from 2 to 8"),
        ({"scheme": "x"}, ValueError, "scheme is 'x'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    good = {
        "base": torch.ones(2, 3),
        "v": torch.ones(2, 3),
        "step": torch.ones(2),
        "zero_point": torch.zeros(2),
        "sharpness": torch.tensor(2.0),
        "bits": 4,
    }
    with pytest.raises(error, match=message):
        gdfq_ext.round_learned(**(good | changes))
