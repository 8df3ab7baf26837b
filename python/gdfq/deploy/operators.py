"""Operators that compute, in float unless a runtime fuses them with the quantizers around: aten to ONNX."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx

from gdfq.deploy.call import Call
from gdfq.deploy.masks import argmax, differs, gather, logic, masked_fill, where
from gdfq.deploy.moves import pad, sliced
from gdfq.deploy.pools import adaptive_average_pool, average_pool, mean, reduce, spread, variance
from gdfq.deploy.values import Clamped, Computed, Joined, Value

Operator = Callable[[Call], Value | list[Value | None]]


def _unary(operator: str, **attributes: Any) -> Operator:
    return lambda call: call.computed(operator, call.tensor("self"), **attributes)


def _with(operator: str, **names: str) -> Operator:
    """One input, and attributes that are arguments by other names."""
    return lambda call: call.computed(
        operator, call.tensor("self"), **{key: float(call.fixed(name)) for key, name in names.items()}
    )


def _binary(operator: str, first: str = "self", second: str = "other") -> Operator:
    return lambda call: call.computed(operator, call.tensor(first), call.tensor(second))


def _number(call: Call, name: str) -> float | None:
    """An argument that is a number; None where it is a tensor."""
    given = call.arguments[name]
    fixed = given if isinstance(given, (int, float)) else None
    return None if fixed is None else float(fixed)


def _times_alpha(call: Call, name: str = "other") -> str:
    alpha = float(call.fixed("alpha")) if "alpha" in call.arguments else 1.0
    value = call.tensor(name)
    return value if alpha == 1 else call.builder.add("Mul", value, call.builder.constant(alpha, np.float32))


def _add(call: Call) -> Value:
    if _number(call, "other") == 0:
        return call.value("self")
    return call.computed("Add", call.tensor("self"), _times_alpha(call))


def _sub(call: Call) -> Value:
    if _number(call, "other") == 0:
        return call.value("self")
    return call.computed("Sub", call.tensor("self"), _times_alpha(call))


def _rsub(call: Call) -> Value:
    return call.computed("Sub", call.tensor("other"), _times_alpha(call, "self"))


def _scale(operator: str) -> Operator:
    def scale(call: Call) -> Value:
        rounding = call.arguments.get("rounding_mode")
        if rounding:
            quotient = call.builder.add(operator, call.tensor("self"), call.tensor("other"))
            return call.computed("Floor", quotient) if rounding == "floor" else _truncated(call, quotient)
        if _number(call, "other") == 1:
            return call.value("self")
        return call.computed(operator, call.tensor("self"), call.tensor("other"))

    return scale


def _clamp(low: str | float | None, high: str | float | None) -> Operator:
    """Bounds are numbers, or names of arguments."""

    def clamp(call: Call) -> Value:
        if any(isinstance(bound, str) and isinstance(call.arguments[bound], fx.Node) for bound in (low, high)):
            return _between_tensors(call)
        bounds = [call.fixed(bound) if isinstance(bound, str) else bound for bound in (low, high)]
        return Clamped(call.value("self"), *(None if bound is None else float(bound) for bound in bounds))

    return clamp


def _between_tensors(call: Call) -> Value:
    result = call.value("self")
    for operator, bound in (("Max", "min"), ("Min", "max")):
        if call.arguments.get(bound) is not None:
            result = call.computed(operator, result.as_float, call.tensor(bound))
    return result


def _threshold(call: Call) -> Value:
    threshold, value = call.fixed("threshold"), call.fixed("value")
    if threshold == value == 0:
        return Clamped(call.value("self"), 0.0, None)
    x, builder = call.tensor("self"), call.builder
    above = builder.add("Greater", x, builder.constant(threshold, np.float32))
    return call.computed("Where", above, x, builder.constant(value, np.float32))


def _gate(gate: str, **attributes: Any) -> Operator:
    """x times a function of x."""

    def write(call: Call) -> Value:
        x = call.tensor("self")
        return call.computed("Mul", x, call.builder.add(gate, x, **attributes))

    return write


def _elu(call: Call) -> Value:
    alpha, scale, input_scale = (float(call.fixed(name)) for name in ("alpha", "scale", "input_scale"))
    if input_scale != 1:
        raise call.unknown()
    if scale == 1:
        return call.computed("Elu", call.tensor("self"), alpha=alpha)
    return call.computed("Selu", call.tensor("self"), alpha=alpha, gamma=scale)


def _rrelu(call: Call) -> Value:
    slope = (float(call.fixed("lower")) + float(call.fixed("upper"))) / 2
    return call.computed("LeakyRelu", call.tensor("self"), alpha=slope)


def _prelu(call: Call) -> Value:
    slope = call.array("weight")
    rank = len(call.shape("self"))
    slope = slope.reshape(-1, *[1] * (rank - 2)) if rank > 1 else slope
    return call.computed("PRelu", call.tensor("self"), call.builder.constant(slope))


def _softmax(operator: str) -> Operator:
    return lambda call: call.computed(operator, call.tensor("self"), axis=call.fixed("dim"))


def _gelu(call: Call) -> Value:
    return call.computed("Gelu", call.tensor("self"), approximate=call.fixed("approximate"))


def _cat(call: Call) -> Value:
    parts: list[Value] = []
    dim = call.fixed("dim") % len(call.shape())
    only_reader = call.only_reader
    for node in call.arguments["tensors"]:
        part = call.of(node)
        if isinstance(part, Joined) and part.axis == dim:
            parts += part.parts
            only_reader = only_reader and part.only_reader
        else:
            parts.append(part)
    return Joined(parts, dim, only_reader, call.name)


def _slice_scatter(call: Call) -> Value:
    """What is written into a slice, between what is kept in front of it and behind it."""
    dim, start, end = call.fixed("dim"), call.fixed("start") or 0, call.fixed("end")
    dim, step = dim % len(call.shape()), call.fixed("step")
    if start == 0 and step == 1 and (end is None or end >= _ALL):
        return call.value("src")
    size = call.known(call.shape()[dim])
    start, end, _ = slice(start, end).indices(size)
    if step != 1:
        raise call.unknown()
    base = call.value("self")
    kept = [
        base.moved(sliced(call, [dim], [first], [last], [1]), False) if first < last else None
        for first, last in ((0, start), (end, size))
    ]
    parts = [part for part in (kept[0], call.value("src"), kept[1]) if part is not None]
    return Joined(parts, dim, call.only_reader, call.name)


def _stack(call: Call) -> Value:
    dim = call.fixed("dim") % len(call.shape())
    axes = call.builder.constant([dim], np.int64)
    parts = [
        call.of(node).moved(lambda x, zero: call.builder.add("Unsqueeze", x, axes), True)
        for node in call.arguments["tensors"]
    ]
    return Joined(parts, dim, call.only_reader, call.name)


# --- normalization ---


def _layer_norm(call: Call) -> Value:
    shape = call.fixed("normalized_shape")
    weight = call.tensor("weight") or call.builder.constant(np.ones(shape, np.float32))
    inputs = (call.tensor("input"), weight, call.tensor("bias"))
    return call.computed("LayerNormalization", *inputs, axis=-len(shape), epsilon=float(call.fixed("eps")))


def _group_norm(call: Call) -> Value:
    channels = call.known(call.shape("input")[1])
    weight = call.tensor("weight") or call.builder.constant(np.ones(channels, np.float32))
    bias = call.tensor("bias") or call.builder.constant(np.zeros(channels, np.float32))
    groups = call.fixed("num_groups")
    eps = float(call.fixed("eps"))
    return call.computed("GroupNormalization", call.tensor("input"), weight, bias, num_groups=groups, epsilon=eps)


def _instance_norm(call: Call) -> Value:
    channels = call.known(call.shape("input")[1])
    weight = call.tensor("weight") or call.builder.constant(np.ones(channels, np.float32))
    bias = call.tensor("bias") or call.builder.constant(np.zeros(channels, np.float32))
    return call.computed("InstanceNormalization", call.tensor("input"), weight, bias, epsilon=float(call.fixed("eps")))


# --- others ---


def _transposed_convolution(call: Call) -> Value:
    if not call.arguments.get("transposed", True):
        raise call.unknown()
    rank = len(call.shape()) - 2
    padding = spread(call.fixed("padding"), rank)
    extra = spread(call.fixed("output_padding"), rank)
    inputs = (call.tensor("input"), call.tensor("weight"), call.tensor("bias"))
    return call.computed(
        "ConvTranspose", *inputs, strides=spread(call.fixed("stride"), rank), pads=padding * 2,
        dilations=spread(call.fixed("dilation"), rank), output_padding=extra, group=call.fixed("groups"),
    )  # fmt: skip


def _resize(mode: str) -> Operator:
    def resize(call: Call) -> Value:
        sizes = call.shape()[2:]
        axes = list(range(2, 2 + len(sizes)))
        where = "align_corners" if call.fixed("align_corners") else "half_pixel"
        name = call.builder.constant([call.known(size) for size in sizes], np.int64)
        return call.computed(
            "Resize", call.tensor("self"), "", "", name, axes=axes, mode=mode, coordinate_transformation_mode=where,
            cubic_coeff_a=-0.75 if mode == "cubic" else None,
        )  # fmt: skip

    return resize


def _pad(call: Call) -> Value:
    """Padding with something else than 0."""
    value = np.float32(call.fixed("value") or 0)
    return Computed(call.builder, pad(call)(call.tensor("self"), value), "Pad")


def _cumulative_sum(call: Call) -> Value:
    return call.computed("CumSum", call.tensor("self"), call.builder.constant(call.fixed("dim"), np.int64))


def _grid_sampler(call: Call) -> Value:
    modes = ("linear", "nearest", "cubic"), ("zeros", "border", "reflection")
    mode, padding = (
        names[call.fixed(name)] for names, name in zip(modes, ("interpolation_mode", "padding_mode"), strict=True)
    )
    return call.computed(
        "GridSample", call.tensor("input"), call.tensor("grid"), mode=mode, padding_mode=padding,
        align_corners=int(call.fixed("align_corners")),
    )  # fmt: skip


# --- functions of one number ---


def _in_turn(*steps: tuple[str, float] | tuple[str]) -> Operator:
    """ONNX operators, each of what the one before gives, and of a number."""

    def write(call: Call) -> Value:
        x = call.tensor("self")
        for number, (operator, *values) in enumerate(steps, 1):
            inputs = (x, *(call.builder.constant(value, np.float32) for value in values))
            if number == len(steps):
                break
            x = call.builder.add(operator, *inputs)
        return call.computed(operator, *inputs)

    return write


def _softplus(call: Call) -> Value:
    beta, threshold = (float(call.fixed(name)) for name in ("beta", "threshold"))
    x, add, constant = call.tensor("self"), call.builder.add, call.builder.constant
    if (beta, threshold) == (1, 20):  # behind which the difference is less than float32 holds
        return call.computed("Softplus", x)
    scaled = add("Mul", x, constant(beta, np.float32))
    soft = add("Div", add("Softplus", scaled), constant(beta, np.float32))
    return call.computed("Where", add("Greater", scaled, constant(threshold, np.float32)), x, soft)


def _truncated(call: Call, x: str = "") -> Value:
    x, add = x or call.tensor("self"), call.builder.add
    return call.computed("Mul", add("Sign", x), add("Floor", add("Abs", x)))


def _remainder(call: Call) -> Value:
    x, y, add = call.tensor("self"), call.tensor("other"), call.builder.add
    return call.computed("Sub", x, add("Mul", add("Floor", add("Div", x, y)), y))


def _pow(call: Call) -> Value:
    if _number(call, "exponent") == 2:
        x = call.tensor("self")
        return call.computed("Mul", x, x)
    return call.computed("Pow", call.tensor("self"), call.tensor("exponent"))


def _reciprocal_root(call: Call) -> Value:
    return call.computed("Reciprocal", call.builder.add("Sqrt", call.tensor("self")))


def _copied(call: Call) -> Value:
    if call.shape("src") != call.shape():
        raise call.unknown()
    return call.value("src")


def _same(call: Call) -> Value:
    return call.value(next(iter(call.arguments)))


_ALL = 2**31  # a bound that is no less than this is none
_UNARY = {
    "abs": "Abs", "acos": "Acos", "acosh": "Acosh", "asin": "Asin", "asinh": "Asinh", "atan": "Atan", "atanh": "Atanh",
    "ceil": "Ceil", "cos": "Cos", "cosh": "Cosh", "erf": "Erf", "exp": "Exp", "floor": "Floor",
    "hardswish": "HardSwish", "isnan": "IsNaN", "log": "Log", "mish": "Mish", "neg": "Neg", "reciprocal": "Reciprocal",
    "round": "Round", "sigmoid": "Sigmoid", "sign": "Sign", "sin": "Sin", "sinh": "Sinh", "sqrt": "Sqrt", "tan": "Tan",
    "tanh": "Tanh",
}  # fmt: skip
_COMPARISONS = {"gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"}
_LOGIC = {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}
_IDENTITIES = (
    "alias",
    "clone",
    "contiguous",
    "detach",
    "dropout",
    "feature_dropout",
    "lift_fresh",
    "lift_fresh_copy",
    "positive",
    "_to_copy",
    "to",
)

OPERATORS: dict[str, Operator] = {
    **{name: _unary(operator) for name, operator in _UNARY.items()},
    **{name: _binary(operator) for name, operator in _COMPARISONS.items()},
    **{f"{prefix}_{name}": logic(operator) for name, operator in _LOGIC.items() for prefix in ("bitwise", "logical")},
    **{f"__{name}__": logic(operator) for name, operator in _LOGIC.items()},
    **dict.fromkeys(_IDENTITIES, _same),
    "_log_softmax": _softmax("LogSoftmax"),
    "_softmax": _softmax("Softmax"),
    "adaptive_avg_pool1d": adaptive_average_pool,
    "adaptive_avg_pool2d": adaptive_average_pool,
    "adaptive_avg_pool3d": adaptive_average_pool,
    "_adaptive_avg_pool2d": adaptive_average_pool,
    "add": _add,
    "argmax": argmax("ArgMax"),
    "argmin": argmax("ArgMin"),
    "avg_pool1d": average_pool,
    "avg_pool2d": average_pool,
    "avg_pool3d": average_pool,
    "bmm": _binary("MatMul", second="mat2"),
    "cat": _cat,
    "celu": _with("Celu", alpha="alpha"),
    "clamp": _clamp("min", "max"),
    "clamp_max": _clamp(None, "max"),
    "clamp_min": _clamp("min", None),
    "clip": _clamp("min", "max"),
    "conv_transpose1d": _transposed_convolution,
    "conv_transpose2d": _transposed_convolution,
    "conv_transpose3d": _transposed_convolution,
    "convolution": _transposed_convolution,
    "copy": _copied,
    "cumsum": _cumulative_sum,
    "div": _scale("Div"),
    "elu": _elu,
    "erfc": _in_turn(("Erf",), ("Sub", 1.0), ("Neg",)),
    "exp2": _in_turn(("Mul", math.log(2)), ("Exp",)),
    "expm1": _in_turn(("Exp",), ("Sub", 1.0)),
    "fmod": lambda call: call.computed("Mod", call.tensor("self"), call.tensor("other"), fmod=1),
    "gather": gather,
    "gelu": _gelu,
    "grid_sampler": _grid_sampler,
    "group_norm": _group_norm,
    "hardsigmoid": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardtanh": _clamp("min_val", "max_val"),
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "leaky_relu": _with("LeakyRelu", alpha="negative_slope"),
    "log10": _in_turn(("Log",), ("Div", math.log(10))),
    "log1p": _in_turn(("Add", 1.0), ("Log",)),
    "log2": _in_turn(("Log",), ("Div", math.log(2))),
    "log_softmax": _softmax("LogSoftmax"),
    "logsumexp": reduce("ReduceLogSumExp"),
    "masked_fill": masked_fill,
    "matmul": _binary("MatMul"),
    "maximum": _binary("Max"),
    "mean": mean,
    "minimum": _binary("Min"),
    "mm": _binary("MatMul", second="mat2"),
    "mul": _scale("Mul"),
    "ne": differs,
    "constant_pad_nd": _pad,
    "pad": _pad,
    "pow": _pow,
    "prelu": _prelu,
    "_prelu_kernel": _prelu,
    "prod": reduce("ReduceProd"),
    "relu": _clamp(0.0, None),
    "relu6": _clamp(0.0, 6.0),
    "remainder": _remainder,
    "rrelu": _rrelu,
    "rsqrt": _reciprocal_root,
    "rsub": _rsub,
    "silu": _gate("Sigmoid"),
    "slice_scatter": _slice_scatter,
    "softmax": _softmax("Softmax"),
    "softplus": _softplus,
    "stack": _stack,
    "sub": _sub,
    "sum": reduce("ReduceSum"),
    "threshold": _threshold,
    "trunc": _truncated,
    "upsample_bicubic2d": _resize("cubic"),
    "upsample_bilinear2d": _resize("linear"),
    "upsample_linear1d": _resize("linear"),
    "upsample_trilinear3d": _resize("linear"),
    "var": variance,
    "var_mean": lambda call: [variance(call), reduce("ReduceMean")(call)],
    "where": where,
}
