"""What the public functions check of their arguments, and what they make of them for the ops."""

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ._schemas import SCHEMES, dense_format

_CHECK_VALUES = os.environ.get("GDFQ_CHECK") == "1"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=dense_format(x))


def check_input(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} is {x.dtype}; allowed are float32, float16 and bfloat16")


def check_weight(name: str, weight: Tensor) -> None:
    check_input(name, weight)
    if weight.dim() == 0:
        raise ValueError(f"{name} has no dimensions; a weight is (out_channels, ...)")


def check_channels(x: Tensor) -> None:
    check_input("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed is (N, C, *spatial)")


def check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits!r}; allowed is an integer from 2 to 8")


def bits_of_each(bits: int | Sequence[int], weights: list[Tensor]) -> list[int]:
    bits = [bits] * len(weights) if isinstance(bits, int) else list(bits)
    if len(bits) != len(weights):
        raise ValueError(f"bits has {len(bits)} values for {len(weights)} weights; give one number, or one per weight")
    return bits


def schemes_of_each(scheme: str | Sequence[str], weights: list[Tensor]) -> list[int]:
    """What the ops take for the names."""
    schemes = [scheme] * len(weights) if isinstance(scheme, str) else list(scheme)
    if len(schemes) != len(weights):
        raise ValueError(
            f"scheme has {len(schemes)} values for {len(weights)} weights; give one name, or one per weight"
        )
    for value in schemes:
        check_choice("scheme", value, SCHEMES)
    return [SCHEMES[value] for value in schemes]


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def check_axis(axis: int, x: Tensor) -> int:
    """`axis` counted from the front."""
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis is {axis}; x has {x.dim()} dimensions")
    return axis % x.dim()


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the input on {like.device}; move both to one device")


def check_float32(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} is {tensor.dtype}; allowed is float32")


def check_state(state: Tensor) -> None:
    check_float32("state", state)
    if state.shape != (3,) or not state.is_contiguous():
        raise ValueError(f"state has shape {tuple(state.shape)}; allowed is a contiguous (3,)")


def float_parameter(name: str, tensor: Tensor, count: int, x: Tensor) -> Tensor:
    """`tensor` as float32, contiguous, `(count,)`."""
    if tensor.numel() != count or (count != 1 and tensor.dim() != 1):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is ({count},)")
    check_device(name, tensor, x)
    return tensor.float().reshape(count).contiguous()


def range(lower: Tensor, upper: Tensor, count: int, x: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = float_parameter("lower", lower, count, x), float_parameter("upper", upper, count, x)
    if _CHECK_VALUES:
        wrong = ~(torch.isfinite(lower) & torch.isfinite(upper) & (lower <= upper))
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"lower[{index}] is {lower[index].item()}, upper[{index}] {upper[index].item()}; "
                "allowed are finite numbers, lower <= upper"
            )
    return lower, upper


def check_step(step: Tensor, count: int, x: Tensor) -> Tensor:
    step = float_parameter("step", step, count, x)
    if _CHECK_VALUES:
        wrong = ~(torch.isfinite(step) & (step > 0))
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"step[{index}] is {step[index].item()}; allowed is a finite number above 0")
    return step


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}; allowed is a floating type")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is {shape}")


def check_labels(name: str, labels: Tensor, count: int, classes: int, other_types: str = "") -> None:
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} is {labels.dtype}; allowed is torch.int64{other_types}")
    check_shape(name, labels, (count,))
    if _CHECK_VALUES:
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            index = int(wrong.nonzero()[0])
            raise ValueError(f"{name}[{index}] is {labels[index].item()}; allowed is 0 to {classes - 1}")


def batch_norm_parameters(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    channels = x.shape[1]
    return (
        float_parameter("running_mean", running_mean, channels, x),
        float_parameter("running_var", running_var, channels, x),
        None if weight is None else float_parameter("weight", weight, channels, x),
        None if bias is None else float_parameter("bias", bias, channels, x),
    )


def statistics(name: str, tensors: list[Tensor], means: list[Tensor]) -> list[Tensor]:
    """One statistic of all layers as float32, checked against the batch means."""
    if len(tensors) != len(means):
        raise ValueError(f"{name} has {len(tensors)} layers and means has {len(means)}; give one tensor per layer")
    # Whole lists are compared, and looked through only where they differ: there are many layers, and little to compute.
    if tensors is means or [t.shape for t in tensors] != [mean.shape for mean in means]:
        for index, (tensor, mean) in enumerate(zip(tensors, means, strict=True)):
            if tensor.shape != mean.shape or tensor.dim() != 1 or tensor.numel() == 0:
                shapes = f"{tuple(tensor.shape)}, means[{index}] {tuple(mean.shape)}"
                raise ValueError(f"{name}[{index}] has shape {shapes}; all must be (C,) with one C >= 1 per layer")
    if {t.device for t in tensors} != {means[0].device}:
        for index, tensor in enumerate(tensors):
            check_device(f"{name}[{index}]", tensor, means[0])
    return [t if t.dtype == torch.float32 and t.is_contiguous() else t.float().contiguous() for t in tensors]
