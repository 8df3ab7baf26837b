"""SQuant (Guo et al., ICLR 2022): weights rounded up or down so that the errors of a kernel, and of a channel, cancel.

No image, no gradient: it begins with the nearest levels and flips as few roundings as it takes. With delta the rounding
errors in steps, code minus value,

    of a kernel (one input channel's elements)   e = sum delta      floor(|e| + 1/2) elements of e's sign are flipped
    of an output channel                         e = sum of its kernels' e, each flip in a kernel of its own

the largest errors first, so that every sum ends within 1/2 and every element within a step. What would leave the codes
is not flipped. Kernels of one element, as those of linear layers, have the second step alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from gdfq.calibrate import calibrate
from gdfq.clip_values import mse
from gdfq.graph import quantized_layers
from gdfq.methods.calibration import calibrating, clipped_by
from gdfq.methods.method import Method
from gdfq.nn import per_channel
from gdfq_ext import Grid


@torch.no_grad()
def squant(student: fx.GraphModule, batches: Iterable[Tensor]) -> None:
    """Round the weights of `student` so, on the grids that their ranges give, and clip its activations by the squared
    error on `batches` of images `(N, C, H, W)`, in place.

    Raises:
        GdfqError: a range came out NaN or infinite.
    """
    for layer in {layer.weight: layer for layer in quantized_layers(student)}.values():
        weight = student.get_parameter(layer.weight)
        grid = layer.quantizer.grid(layer.index, weight)
        layer.quantizer.store(layer.index, grid.step, grid.zero_point, rounding(weight, grid))
    calibrate(student, list(batches), clipped_by(mse, student))


def rounding(weight: Tensor, grid: Grid) -> Tensor:
    """What is added to floor(weight / step): integers of the shape of `weight`, `(channels, inputs, ...)`."""
    step, zero_point, lowest, highest = grid
    x = (weight / per_channel(step, weight)).reshape(*weight.shape[:2], -1)  # (channels, inputs, elements)
    low, high = ((end - zero_point).view(-1, 1, 1) for end in (lowest, highest))
    level = x.round().clamp(low, high)

    def can_flip(sign: Tensor) -> Tensor:
        """Whether one level against the sign is left."""
        return torch.where(sign > 0, level > low, level < high)

    error = level - x
    level = level - flips(error, can_flip(error.sum(2, keepdim=True).sign()))
    of_kernels = (level - x).sum(2)
    sign = of_kernels.sum(1).sign().view(-1, 1, 1)
    largest, element = ((level - x) * sign).where(can_flip(sign), -torch.inf).max(2, keepdim=True)
    of_kernels = flips(of_kernels, largest.squeeze(2) > 0).unsqueeze(2)
    level = level.scatter_add(2, element, -of_kernels)
    return (level - x.floor()).reshape(weight.shape)


def flips(errors: Tensor, can_flip: Tensor) -> Tensor:
    """Along the last dimension, the sign of their sum e for floor(|e| + 1/2) errors of that sign, the largest first;
    0 for all others, and where `can_flip` is false."""
    total = errors.sum(-1, keepdim=True)
    amounts = (errors * total.sign()).where(can_flip, -torch.inf)
    place = amounts.argsort(-1, descending=True).argsort(-1)
    return total.sign() * ((place < (total.abs() + 0.5).floor()) & (amounts > 0))


SQUANT = Method(
    "squant",
    "no training; weights rounded so that errors cancel, activations clipped by the squared error on inverted images",
    calibrating(lambda task, batches: squant(task.student, batches)),
    source="inverted",
)
