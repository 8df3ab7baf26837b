"""Activation ranges from images, without training."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.nn import FakeQuantize, activation_quantizers, observing
from gdfq.observers import Observer


@torch.no_grad()
def calibrate(
    student: nn.Module, batches: Iterable[Tensor], observer: Callable[[FakeQuantize], Observer] | None = None
) -> None:
    """Observe the activation ranges anew on `batches` of images `(N, C, H, W)`; parameters are not touched.

    Args:
        observer: what looks at the activations of each quantizer for this once; default: its own observer.

    Raises:
        GdfqError: a range came out NaN or infinite (names the quantizers).
    """
    own = {quantizer: quantizer.observer for quantizer in activation_quantizers(student).values()}
    for quantizer in own:
        quantizer.reset()
        if observer is not None:
            quantizer.observer = observer(quantizer)
    passes = max((quantizer.observer.passes for quantizer in own), default=1)
    batches = list(batches) if passes > 1 else batches
    try:
        for _ in range(passes):
            with observing(student):
                for images in batches:
                    student(ranks.shard(images))
            end_pass(student)
    finally:
        for quantizer, before in own.items():
            quantizer.observer = before
    if observer is not None:
        end_pass(student)  # their own observers go on from the range that another has found


def end_pass(student: nn.Module) -> None:
    """All images that the activation ranges are observed on have been seen; raises as `check_ranges`."""
    for quantizer in activation_quantizers(student).values():
        quantizer.end_pass()
    check_ranges(student)


def check_ranges(student: nn.Module) -> None:
    """Raise `GdfqError` if any activation range is NaN or infinite. Reads the ranges back from the device."""
    quantizers = activation_quantizers(student)
    if not quantizers:
        return
    finite = torch.stack([quantizer.range for quantizer in quantizers.values()]).isfinite().all(1).tolist()
    broken = [name.partition(".")[2] or name for name, fine in zip(quantizers, finite, strict=True) if not fine]
    if broken:
        raise GdfqError(
            f"NaN or Inf in the activations of {len(broken)} of {len(quantizers)} quantized places, first at "
            f"'{broken[0]}': the model overflows on synthetic images; check its weights and BN statistics"
        )
