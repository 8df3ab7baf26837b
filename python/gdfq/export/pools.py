"""Windows of pools, as ONNX has them."""

from typing import Any

from gdfq.export.call import Call


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
