"""Activation ranges without training, and how well Q agrees with P on images that were not used for it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdfq.errors import GdfqError
from gdfq.modules import activation_quantizers, observing


@dataclass(frozen=True)
class Agreement:
    """The data-free figures.

    Attributes:
        top1: share of images, in percent, that P and Q classify alike.
        kl: KL(softmax(z_P) || softmax(z_Q)), mean over images, nats.
        images: how many.
    """

    top1: float
    kl: float
    images: int


@torch.no_grad()
def calibrate(student: nn.Module, batches: Iterable[Tensor]) -> None:
    """Observe the activation ranges anew on `batches` of images `(N, C, H, W)`; parameters are not touched.

    Raises:
        GdfqError: a range came out NaN or infinite (names the quantizers).
    """
    for quantizer in activation_quantizers(student).values():
        quantizer.reset()
    with observing(student):
        for images in batches:
            student(images)
    check_ranges(student)


def check_ranges(student: nn.Module) -> None:
    """Raise `GdfqError` if any activation range is NaN or infinite. Reads the ranges back from the device."""
    quantizers = activation_quantizers(student)
    if not quantizers:
        return
    finite = torch.stack([quantizer.range for quantizer in quantizers.values()]).isfinite().all(1).tolist()
    broken = [
        name.removeprefix("activation_quantizers.") for name, fine in zip(quantizers, finite, strict=True) if not fine
    ]
    if broken:
        raise GdfqError(
            f"NaN or Inf in the activations of {len(broken)} of {len(quantizers)} quantized places, first at "
            f"'{broken[0]}': the model overflows on synthetic images; check its weights and BN statistics"
        )


@torch.no_grad()
def agreement(teacher: nn.Module, student: nn.Module, batches: Iterable[Tensor]) -> Agreement:
    """Compare the logits of P and Q on `batches` of images `(N, C, H, W)`."""
    alike = divergence = torch.zeros((), dtype=torch.float64)
    count = 0
    for images in batches:
        log_p, log_q = (F.log_softmax(model(images).double(), 1).cpu() for model in (teacher, student))
        alike = alike + (log_p.argmax(1) == log_q.argmax(1)).sum()
        divergence = divergence + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        count += len(images)
    return Agreement(100 * alike.item() / count, divergence.item() / count, count)


def gaussian_images(
    shape: tuple[int, int, int], count: int, batch_size: int, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """`count` images of N(0, 1) noise in batches `(N, *shape)`: what is left where nothing better is known."""
    random = torch.Generator(device).manual_seed(seed)
    for start in range(0, count, batch_size):
        yield torch.randn(min(batch_size, count - start), *shape, generator=random, device=device)
