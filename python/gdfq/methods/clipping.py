"""The methods `mse`, `aciq` and `kl` of the paper's Table 5: weights and activations clipped, no training.

- Weights per output channel (KL: per tensor, since a histogram needs more values than one channel has). The weight
  itself is clamped once; its minimum and maximum, which the quantizer takes as the range, are the clip values then.
- Activations per tensor, from a histogram over all calibration images. The image itself keeps its minimum and maximum:
  pixels have few different values, and none of them is an outlier.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from gdfq.calibrate import calibrate
from gdfq.clip_values import RULES, kl
from gdfq.graph import quantized_layers
from gdfq.methods.calibration import calibrating, clipped_by
from gdfq.methods.method import Data, Method


@torch.no_grad()
def clip(student: fx.GraphModule, batches: Iterable[Tensor], rule: str) -> None:
    """Clip the weights of `student`, then set its activation ranges from `batches` of images `(N, C, H, W)`, in place.

    Args:
        rule: `mse`, `aciq` or `kl`.

    Raises:
        GdfqError: an activation is NaN or infinite.
    """
    choose = RULES[rule]
    for layer in {layer.weight: layer for layer in quantized_layers(student)}.values():
        weight = student.get_parameter(layer.weight)
        rows = weight.reshape(1, -1) if choose is kl else weight.flatten(1)
        lower, upper = choose(rows, None, layer.bits, layer.scheme)
        shape = (-1, *(1 for _ in weight.shape[1:]))
        weight.clamp_(lower.view(shape), upper.view(shape))
    calibrate(student, list(batches), clipped_by(choose, student))


def _method(rule: str, by: str) -> Method:
    return Method(
        rule,
        f"no training; weights and activations clipped by {by}",
        calibrating(lambda task, batches: clip(task.student, batches, rule)),
        Data.IMAGES,
    )


MSE = _method("mse", "the squared error")
ACIQ = _method("aciq", "a fitted distribution")
KL = _method("kl", "the KL divergence")
