"""Every operation of gdfq_ext by several providers, on the same inputs.

    released   one PyTorch call for each operation sign of the equations, as published GDFQ code runs them
    eager      PyTorch's own fused operation, where it has one
    compile    torch.compile of the released sequence
    brevitas, torchao, modelopt   their quantizer, behind PyTorch's batch normalization where one belongs to it
    ours       gdfq_ext with the backend that is loaded

Scales, zero points and ranges are prepared outside what is measured. All compute in float32 and return the type of x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F

import gdfq_ext
from benchmarks.ops import peers
from benchmarks.ops.case import DIRECTIONS, Call, Case, Problem, as_list
from benchmarks.ops.peers import Affine
from benchmarks.ops.shapes import RESNET18_BATCH_NORMS, RESNET18_WEIGHTS

PROVIDERS = ("released", "eager", "compile", *peers.LIBRARIES, "ours")

BITS = 4
EPS = 1e-5
TEMPERATURE = 20.0
CLASSES = 1000
SLOPE = 0.2
CLIPS = "clips the gradient, ours passes it"


def with_compile(released: Call, **others: Call) -> dict[str, Call]:
    return {"released": released, **others, "compile": compiled(released)}


def compiled(call: Call) -> Call:
    # Dynamo keeps what it compiled by the function's code, of which the closures of all cases share one: without the
    # reset it gives up after eight shapes and runs the Python function as it is.
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # its backward could run once only
    return torch.compile(call, dynamic=False)


class SeparateQuantizer(torch.autograd.Function):
    """Eq. 6, one tensor operation per operation sign, with the identity gradient or the clipped one."""

    @staticmethod
    def forward(ctx, x: Tensor, lower: Tensor, upper: Tensor, bits: int, clipped: bool) -> Tensor:
        half = 2 ** (bits - 1)
        scale = (2**bits - 1) / torch.clamp(upper - lower, min=1e-8)
        zero = torch.round(scale * lower) + half
        level = torch.round(scale * x - zero)
        if clipped:
            ctx.save_for_backward((level >= -half) & (level <= half - 1))
        y = (torch.clamp(level, -half, half - 1) + zero) / scale
        # torch.compile of PyTorch 2.11 takes a result of a `to` that changes nothing for one without a gradient.
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient, None, None, None, None


def quantizers(
    problem: Problem, x: Tensor, source: Callable[[], Tensor], affine: Affine, clipped: bool = False
) -> tuple[dict[str, Call], dict[str, str]]:
    """All providers but ours of the quantizer behind `source`, which gives tensors like `x`; whose gradient differs."""
    lower, upper = affine.along(affine.lower, x), affine.along(affine.upper, x)
    scale, zero_point, top = affine.scale, affine.zero_points(), affine.levels - 1

    def released():
        return SeparateQuantizer.apply(source(), lower, upper, BITS, clipped)

    def eager():
        if affine.axis is None:
            return torch.fake_quantize_per_tensor_affine(source(), scale, zero_point, 0, top)
        return torch.fake_quantize_per_channel_affine(source(), scale, zero_point, affine.axis, 0, top)

    # Published GDFQ code has no clipped gradient.
    providers: dict[str, Call] = {} if clipped else {"released": released}
    providers |= {"eager": eager, "compile": compiled(released)}
    for library in problem.libraries:
        quantize = peers.quantizer(library, affine, x, clipped)
        providers[library] = lambda quantize=quantize: quantize(source())
    if clipped:
        return providers, {"modelopt": "clips the gradient by |x| <= maximum, ours where the level is clamped"}
    return providers, dict.fromkeys(("eager", "torchao", "modelopt"), CLIPS)


def fake_quantize(problem: Problem, axis: int | None = None, clipped: bool = False, scheme: str = "eq6") -> Case:
    x = problem.x()
    affine = Affine(0.3 * problem.channel(1 if axis is None else problem.shape[axis]), 2 ** (BITS - 1), BITS, axis)
    lower, upper, straight_through = affine.lower, affine.upper, "clipped" if clipped else "identity"
    providers, other_gradient = quantizers(problem, x, lambda: x, affine, clipped)
    providers["ours"] = lambda: gdfq_ext.fake_quantize(
        x, lower, upper, BITS, axis=axis, scheme=scheme, straight_through=straight_through
    )
    moved = 2 * x.nbytes + (x.numel() // 8 if clipped else 0)
    return Case(
        providers, [x], x.nbytes, moved, moved if clipped else 0, affine.scale.max().item(), other_gradient
    )  # fmt: skip


def fake_quantize_per_channel(problem: Problem) -> Case:
    return fake_quantize(problem, axis=1)


def fake_quantize_clipped(problem: Problem) -> Case:
    return fake_quantize(problem, clipped=True)


def fake_quantize_affine(problem: Problem) -> Case:
    """Against the same providers: the range is a whole number of steps, where Eq. 6 has the same values."""
    return fake_quantize(problem, scheme="affine")


def weights_case(problem: Problem, shapes: list[tuple[int, ...]], ours: Callable[[list[Tensor]], Call]) -> Case:
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(torch.randn(shape, device=problem.device).to(problem.dtype)) for shape in shapes
    ]  # fmt: skip
    state = [(torch.zeros(0), torch.zeros(0), torch.ones(0), torch.zeros(0, dtype=torch.int32)) for _ in shapes]
    state = [tuple(tensor.to(problem.device) for tensor in tensors) for tensors in state]
    on = torch.ones(1, dtype=torch.long, device=problem.device)

    def released():
        return [separate(weight) for weight in weights]

    def separate(weight: Tensor) -> Tensor:
        flat, shape = weight.detach().flatten(1), [-1] + [1] * (weight.dim() - 1)
        lower, upper = flat.min(1).values.view(shape).float(), flat.max(1).values.view(shape).float()
        return SeparateQuantizer.apply(weight, lower, upper, BITS, False)

    def eager():
        return [
            torch.fused_moving_avg_obs_fake_quant(weight, on, on, *tensors, 1.0, 0, 2**BITS - 1, 0, True, False)
            for weight, tensors in zip(weights, state, strict=True)
        ]

    providers = with_compile(released, eager=eager)
    for library in problem.libraries:
        calls = [peers.weight_quantizer(library, weight, BITS) for weight in weights]
        if None not in calls:
            providers[library] = lambda calls=calls: [call() for call in calls]
    size = sum(weight.nbytes for weight in weights)
    other_gradient = {"eager": CLIPS, "torchao": CLIPS, "brevitas": "differentiates the range as well"}
    return Case(providers | {"ours": ours(weights)}, weights, size, 2 * size, 0, 1.0, other_gradient)


def fake_quantize_weight(problem: Problem) -> Case:
    """A 3x3 convolution's weight with as many channels in and out as x has."""
    channels = problem.shape[1]
    return weights_case(
        problem, [(channels, channels, 3, 3)], lambda weights: lambda: gdfq_ext.fake_quantize_weight(weights[0], BITS)
    )


def fake_quantize_weights(problem: Problem) -> Case:
    shapes = [(outputs, inputs, kernel, kernel) for outputs, inputs, kernel in RESNET18_WEIGHTS]
    return weights_case(problem, shapes, lambda weights: lambda: gdfq_ext.fake_quantize_weights(weights, BITS))


def count_changed_codes(problem: Problem) -> Case:
    """Every weight of a ResNet-18 in steps of 16 sizes; all layers together, as a code may depend on the last bit."""
    torch.manual_seed(0)
    shapes = [(outputs, inputs, kernel, kernel) for outputs, inputs, kernel in RESNET18_WEIGHTS]
    weights, directions = ([torch.randn(shape, device=problem.device) for shape in shapes] for _ in range(2))
    rate = torch.tensor(1e-3, device=problem.device)
    kappas = torch.arange(1.0, 17.0, device=problem.device)

    def codes(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        scale = (2**BITS - 1) / torch.clamp(upper - lower, min=1e-8)
        zero = torch.round(scale * lower) + 2 ** (BITS - 1)
        return torch.clamp(torch.round(scale * x - zero), -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)

    def released():
        return sum(separate(*pair) for pair in zip(weights, directions, strict=True))

    def separate(weight: Tensor, direction: Tensor) -> Tensor:
        limits = [limit.view(-1, 1, 1, 1) for limit in weight.flatten(1).aminmax(dim=1)]
        before = codes(weight, *limits)
        return torch.stack([(codes(weight - kappa * rate * direction, *limits) != before).sum() for kappa in kappas])

    def ours():
        return gdfq_ext.count_changed_codes(weights, directions, BITS, rate, kappas).sum(0)

    size = sum(weight.nbytes for weight in weights)
    return Case(with_compile(released, ours=ours), [], size, 2 * size)


def fake_quantize_learned(problem: Problem) -> Case:
    """As QDrop trains activations: one half is quantized, by a step that takes a gradient."""
    x = problem.x()
    step = torch.full((1,), 0.25, device=problem.device, requires_grad=True)
    zero_point, top = torch.full((1,), 7.0, device=problem.device), 2**BITS - 1
    choice = torch.randint_like(x, 256, dtype=torch.uint8)

    def released():
        steps = x / step
        code = (steps.round() - steps).detach() + steps + zero_point
        quantized = (torch.clamp(code, 0, top) - zero_point) * step
        return torch.where(choice < 128, x, quantized.to(x.dtype))

    def eager():
        quantized = torch._fake_quantize_learnable_per_tensor_affine(x.float(), step, zero_point, 0, top, 1.0)
        return torch.where(choice < 128, x, quantized.to(x.dtype))

    def ours():
        return gdfq_ext.fake_quantize_learned(x, step, zero_point, BITS, choice=choice, step_gradient_scale=1.0)

    providers, levels = with_compile(released, eager=eager, ours=ours), step.item()
    return Case(providers, [x, step], x.nbytes, 2 * x.nbytes + x.numel(), 3 * x.nbytes + x.numel(), levels)


def round_learned(problem: Problem) -> Case:
    """AdaRound's weight of the largest layer of a ResNet-18, and its penalty."""
    torch.manual_seed(0)
    outputs, inputs, kernel = max(RESNET18_WEIGHTS, key=math.prod)
    base, v = (torch.randn(outputs, inputs, kernel, kernel, device=problem.device) for _ in range(2))
    base, step = (4 * base).floor(), problem.channel(outputs).requires_grad_()
    zero_point, sharpness = torch.full((outputs,), 8.0, device=problem.device), torch.tensor(7.0, device=problem.device)

    def released():
        per_channel = [parameter.view(-1, 1, 1, 1) for parameter in (step, zero_point)]
        h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
        code = torch.clamp(base + h + per_channel[1], 0, 2**BITS - 1)
        return (code - per_channel[1]) * per_channel[0], (1 - (2 * h - 1).abs().pow(sharpness)).sum()

    def ours():
        return gdfq_ext.round_learned(base, v, step, zero_point, sharpness, BITS)

    leaves = [v.requires_grad_(), step]
    return Case(with_compile(released, ours=ours), leaves, v.nbytes, 3 * v.nbytes, 4 * v.nbytes)


def observe_range(problem: Problem) -> Case:
    """The averages start where they end: at the range of x."""
    x = problem.x().detach()
    running = torch.stack(x.aminmax()).float()
    state = torch.cat([running, running.new_ones(1)])

    def released():
        running[0].mul_(0.9).add_(x.min() * 0.1)
        running[1].mul_(0.9).add_(x.max() * 0.1)
        return running.clone()

    def eager():
        return running.lerp_(torch.stack(x.aminmax()).float(), 0.1).clone()

    providers = with_compile(released, eager=eager, ours=lambda: gdfq_ext.observe_range(x, state))
    return Case(providers, [], x.nbytes, x.nbytes)


def batch_norm_act_fake_quantize(problem: Problem) -> Case:
    x, affine = problem.x(), Affine(0.15 * problem.channel(1), 0, BITS)
    mean, var, weight, bias = (problem.channel() for _ in range(4))
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    lower, upper = affine.lower, affine.upper

    def activation():
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=EPS))

    providers, other_gradient = quantizers(problem, x, activation, affine)
    providers["ours"] = lambda: gdfq_ext.batch_norm_act_fake_quantize(
        x, mean, var, weight, bias, lower, upper, BITS, eps=EPS, act="relu"
    )
    step = affine.scale.max().item()
    return Case(providers, leaves, x.nbytes, 2 * x.nbytes, 3 * x.nbytes, step, other_gradient)


def batch_norm_act_moments(problem: Problem) -> Case:
    x, dims = problem.x(), (0, 2, 3)
    mean, var, weight, bias = (problem.channel() for _ in range(4))

    def activation():
        return F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=EPS))

    def eager():
        batch_var, batch_mean = torch.var_mean(x, dims, correction=0)
        return activation(), batch_mean, batch_var

    providers = with_compile(
        lambda: (activation(), x.mean(dims), x.var(dims, correction=0)),
        eager=eager,
        ours=lambda: gdfq_ext.batch_norm_act_moments(x, mean, var, weight, bias, eps=EPS, act="relu"),
    )
    return Case(providers, [x], x.nbytes, 2 * x.nbytes, 3 * x.nbytes)


def bns_loss(problem: Problem) -> Case:
    means, variances, running_means, running_vars = (
        [problem.channel(count) for count in RESNET18_BATCH_NORMS] for _ in range(4)
    )
    leaves = [layer.requires_grad_() for layer in means + variances]

    def released():
        layers = zip(means, variances, running_means, running_vars, strict=True)
        return sum(F.mse_loss(m, rm) + F.mse_loss(v, rv) for m, v, rm, rv in layers) / len(means)

    providers = with_compile(released, ours=lambda: gdfq_ext.bns_loss(means, variances, running_means, running_vars))
    size = sum(layer.nbytes for layer in leaves)
    return Case(providers, leaves, size, 2 * size, size)


def distillation_loss(problem: Problem) -> Case:
    torch.manual_seed(0)
    shape = (64, CLASSES)
    student = torch.randn(shape, device=problem.device, requires_grad=True)
    teacher = torch.randn(shape, device=problem.device)
    labels = torch.randint(CLASSES, shape[:1], device=problem.device)

    def released():
        soft_student = F.log_softmax(student / TEMPERATURE, 1)
        soft_teacher = F.softmax(teacher / TEMPERATURE, 1)
        kl = F.kl_div(soft_student, soft_teacher, reduction="sum") / student.numel()
        return F.cross_entropy(student, labels) + TEMPERATURE**2 * kl

    def ours():
        return gdfq_ext.distillation_loss(student, teacher, labels, temperature=TEMPERATURE)[0]

    return Case(
        with_compile(released, ours=ours), [student], student.nbytes, 2 * student.nbytes, student.nbytes
    )  # fmt: skip


def conditional_batch_norm_act(problem: Problem) -> Case:
    """The forward reads x twice: its statistics must be whole before the first result. So does the backward."""
    x = problem.x()
    channels = problem.shape[1]
    weight, bias = (torch.rand(CLASSES, channels, device=problem.device, requires_grad=True) for _ in range(2))
    labels = torch.randint(CLASSES, problem.shape[:1], device=problem.device)
    # A pair for each provider: autograd keeps PyTorch's for the backward, and nobody else may update them.
    pairs = [(problem.channel(), problem.channel()) for _ in range(3)]

    def released(running_mean: Tensor, running_var: Tensor) -> Call:
        def call():  # F.batch_norm is PyTorch's own fused operation: there is no other eager way
            normalised = F.batch_norm(x, running_mean, running_var, training=True, momentum=0.1, eps=EPS)
            gamma, beta = F.embedding(labels, weight)[..., None, None], F.embedding(labels, bias)[..., None, None]
            return F.leaky_relu(gamma * normalised + beta, SLOPE).to(x.dtype)

        return call

    def ours():
        return gdfq_ext.conditional_batch_norm_act(
            x, weight, bias, labels, *pairs[0], momentum=0.1, eps=EPS, negative_slope=SLOPE
        )

    providers = {"released": released(*pairs[1]), "compile": compiled(released(*pairs[2])), "ours": ours}
    return Case(providers, [x, weight, bias], x.nbytes, 3 * x.nbytes, 5 * x.nbytes)


@dataclass(frozen=True)
class Operation:
    """An operation and which inputs make a difference to it."""

    build: Callable[[Problem], Case]
    fixed: str | None = None
    """What it is measured on where that is not the layer's activation."""
    layouts: bool = True
    low_precision: bool = True
    gradient: bool = True

    @property
    def directions(self) -> tuple[str, ...]:
        return DIRECTIONS if self.gradient else DIRECTIONS[:1]


# By weight, since a run may be cut off: the bytes of an operation's operands, forward and backward, in an iteration of
# ResNet-18 in a batch of 16 (conditional_batch_norm_act 1,680 MB, fake_quantize_weights 93 MB). Then those that such an
# iteration does not have.
OPERATIONS = {
    "conditional_batch_norm_act": Operation(conditional_batch_norm_act),
    "batch_norm_act_moments": Operation(batch_norm_act_moments),
    "batch_norm_act_fake_quantize": Operation(batch_norm_act_fake_quantize),
    "fake_quantize": Operation(fake_quantize),
    "fake_quantize_weights": Operation(fake_quantize_weights, fixed="resnet18 20 layers", layouts=False),
    "distillation_loss": Operation(distillation_loss, fixed="64 x 1000 logits", layouts=False, low_precision=False),
    "bns_loss": Operation(bns_loss, fixed="resnet18 20 layers", layouts=False, low_precision=False),
    "observe_range": Operation(observe_range, gradient=False),
    "count_changed_codes": Operation(
        count_changed_codes, fixed="resnet18 20 layers", layouts=False, low_precision=False, gradient=False
    ),
    "fake_quantize_learned": Operation(fake_quantize_learned),
    "round_learned": Operation(round_learned, fixed="resnet18's largest layer", layouts=False, low_precision=False),
    "fake_quantize_clipped": Operation(fake_quantize_clipped),
    "fake_quantize_per_channel": Operation(fake_quantize_per_channel),
    "fake_quantize_affine": Operation(fake_quantize_affine),
    "fake_quantize_weight": Operation(fake_quantize_weight, layouts=False),
}


def disagreement(
    case: Case, provider: str, direction: str = "forward", dtype: torch.dtype = torch.float32
) -> str | None:
    """How far `provider`'s results (or gradients, for "both") are from ours where that is too far, else None.

    A value may be one level off where its last bits decide: in one of 500 elements in float32, where arithmetic differs
    by multiplying with a reciprocal, in one of 20 where batch normalization has rounded to bfloat16 first. Other values
    may differ by 1e-4 of the largest one, by 2% where `dtype`, that of x, is bfloat16. A gradient may differ in one of
    10,000 elements, in one of 200 in bfloat16: those that rounding has moved across the kink of an activation.
    """
    if direction != "forward" and provider in case.other_gradient:
        return None
    low, quantized = dtype != torch.float32, case.step > 0 and direction == "forward"
    allowed = 0.0
    if quantized:
        allowed = 0.05 if low else 0.002
    elif direction != "forward":
        allowed = 0.005 if low else 1e-4
    results, expected = (as_list(case.run(name, direction)()) for name in (provider, "ours"))
    for index, (value, ours) in enumerate(zip(results, expected, strict=True)):
        if value.shape != ours.shape:
            return f"result {index} has shape {tuple(value.shape)}, ours {tuple(ours.shape)}"
        largest = max(ours.float().abs().max().item(), 1e-6)
        error = (value.float() - ours.float()).abs()
        far = (~(error <= (2e-2 if low else 1e-4) * largest)).float().mean().item()
        if far > allowed or (quantized and not error.max().item() <= 1.02 * case.step + 2e-2 * low * largest):
            return (
                f"result {index} differs from ours by up to {error.max().item():.3g} of {largest:.3g}, "
                f"{far:.2%} of its elements by more than allowed"
            )
    return None
