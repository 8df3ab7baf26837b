"""Pools, and reductions over dimensions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gdfq.deploy.call import Call
from gdfq.deploy.values import Value


def pool_attributes(call: Call) -> dict[str, Any]:
    """Kernel, strides, pads and dilations of a pool without `ceil_mode`: what that adds at the end is written as
    padding, for which the sizes that were seen decide."""
    result = call.shape()
    rank = len(result) - 2
    kernel = spread(call.fixed("kernel_size"), rank)
    strides = spread(call.fixed("stride") or kernel, rank)
    padding = spread(call.fixed("padding"), rank)
    dilations = spread(call.fixed("dilation"), rank) if "dilation" in call.arguments else [1] * rank
    sizes = call.sizes("self", list(range(2, 2 + rank)))
    ends = [
        max(before, (call.known(output) - 1) * stride + dilation * (length - 1) + 1 - size - before)
        if _reaches_beyond(call) else before
        for output, stride, dilation, length, size, before in zip(
            result[2:], strides, dilations, kernel, sizes, padding, strict=True
        )
    ]  # fmt: skip
    attributes = {"kernel_shape": kernel, "strides": strides, "pads": [*padding, *ends]}
    if any(dilation != 1 for dilation in dilations):
        attributes["dilations"] = dilations
    return attributes


def _reaches_beyond(call: Call) -> bool:
    return bool(call.arguments.get("ceil_mode"))


def spread(value: int | list[int], rank: int) -> list[int]:
    """One number for each dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def average_pool(call: Call) -> Value:
    attributes = pool_attributes(call)
    rank = len(attributes["kernel_shape"])
    sizes = call.sizes("self", list(range(2, 2 + rank)))
    if attributes["kernel_shape"] == sizes and not any(attributes["pads"]):
        return call.computed("GlobalAveragePool", call.tensor("self"))
    padding = spread(call.fixed("padding"), rank)
    source = call.value("self")
    padded = bool(call.fixed("count_include_pad")) and any(padding)
    if padded and attributes["pads"][rank:] != padding:  # what is beyond the padding does not count
        zeros = call.builder.constant([0, 0, *padding, 0, 0, *padding], np.int64)
        source = source.moved(lambda x, zero: call.builder.add("Pad", x, zeros, call.builder.constant(zero)), False)
        ends = [end - before for end, before in zip(attributes["pads"][rank:], padding, strict=True)]
        attributes["pads"] = [0] * rank + ends
        padded = False
    divisor = call.arguments.get("divisor_override")
    pooled = partial(call.computed, "AveragePool", source.as_float, **attributes)
    if divisor is None:
        return pooled(count_include_pad=int(padded) or None)
    ratio = call.builder.constant(math.prod(attributes["kernel_shape"]) / divisor, np.float32)
    return call.computed("Mul", pooled(count_include_pad=1).as_float, ratio)


def adaptive_average_pool(call: Call) -> Value:
    outputs = list(call.shape()[2:])
    dims = list(range(2, 2 + len(outputs)))
    sizes = call.sizes("self", dims)
    if all(output == 1 for output in outputs):
        return call.computed("GlobalAveragePool", call.tensor("self"))
    if outputs == sizes:
        return call.value("self")
    if all(size % output == 0 for size, output in zip(sizes, outputs, strict=True)):
        kernel = [size // output for size, output in zip(sizes, outputs, strict=True)]
        return call.computed("AveragePool", call.tensor("self"), kernel_shape=kernel, strides=kernel)
    if len(outputs) > 2:
        raise call.unknown()
    x = call.tensor("self")
    for dim, size, output in zip(dims, sizes, outputs, strict=True):
        means = call.builder.constant(_windows(size, output))  # (output, size)
        if dim == dims[-1]:
            x = call.add("MatMul", x, call.builder.add("Transpose", means, perm=[1, 0]))
        else:
            x = call.add("MatMul", means, x)
    return call.of_float(x)


def _windows(size: int, output: int) -> np.ndarray:
    """`(output, size)` float32: each row takes the mean of a window of PyTorch's adaptive pools."""
    matrix = np.zeros((output, size), np.float32)
    for index in range(output):
        start, end = index * size // output, -(-(index + 1) * size // output)
        matrix[index, start:end] = 1 / (end - start)
    return matrix


def mean(call: Call) -> Value:
    rank = len(call.shape("self"))
    dims = call.arguments.get("dim")
    dims = sorted(dim % rank for dim in dims) if dims else list(range(rank))
    if rank > 2 and dims == list(range(2, rank)):
        pooled = call.computed("GlobalAveragePool", call.tensor("self"))
        if call.fixed("keepdim"):
            return pooled
        shape = call.as_reshape(call.shape())
        return pooled.moved(lambda x, zero: call.builder.add("Reshape", x, shape), True)
    return reduce("ReduceMean")(call)


def reduce(operator: str) -> Callable[[Call], Value]:
    def write(call: Call) -> Value:
        dims = call.fixed("dim") if call.arguments.get("dim") is not None else []
        dims = [dims] if isinstance(dims, int) else list(dims)
        axes = call.builder.constant(dims or list(range(len(call.shape("self")))), np.int64)
        return call.computed(operator, call.tensor("self"), axes, keepdims=int(call.arguments.get("keepdim") or 0))

    return write


def variance(call: Call) -> Value:
    builder = call.builder
    rank = len(call.shape("self"))
    dims = [dim % rank for dim in call.fixed("dim") or range(rank)]
    correction = call.arguments.get("correction", int(call.arguments.get("unbiased", True)))
    count = math.prod(call.sizes("self", dims))
    axes = builder.constant(dims, np.int64)
    x = call.tensor("self")
    centered = builder.add("Sub", x, builder.add("ReduceMean", x, axes, keepdims=1))
    squares = builder.add("Mul", centered, centered)
    total = builder.add("ReduceSum", squares, axes, keepdims=int(call.fixed("keepdim")))
    return call.computed("Div", total, builder.constant(count - (1 if correction is None else correction), np.float32))
