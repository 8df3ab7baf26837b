"""Top-1 and top-5 accuracy on labeled images, and how well Q agrees with P on any."""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from gdfq import ranks
from gdfq.errors import GdfqError
from gdfq.memory import explained, is_out_of_memory
from gdfq.precision import products_in_tf32


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    top1: float
    """Images whose most likely class is the right one, in percent."""
    top5: float
    """Images whose right class is among the five most likely ones (all, where there are fewer), in percent."""
    images: int
    """How many images were seen."""
    seconds: float
    """Wall-clock time, reading and decoding included."""


@products_in_tf32(False)
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    workers: int = 0,
    progress: bool = False,
    num_classes: int | None = None,
    channels_last: bool = True,
) -> Evaluation:
    """Accuracy of `model` on every item of `dataset`, in eval mode and without gradients.

    Args:
        model: takes images `(N, C, H, W)` and returns logits `(N, classes)`. Its training flags are put back.
        dataset: yields `(image, label)`, a float32 tensor `(C, H, W)` and an int, as those of `load_dataset`.
        batch_size: images per forward pass.
        device: where to run; the model is moved there and stays. None: where the model's parameters are.
        workers: processes that decode images; 0 decodes in this one.
        progress: a bar on standard error.
        num_classes: how many logits the model must return; None takes what it returns.
        channels_last: hand the images over in channels-last memory format.

    Images are cast to the dtype of the model's first floating-point parameter.

    Raises `GdfqError` for an empty data set, labels that exceed the number of logits, NaN or Inf among the logits, an
    output that is not `(N, classes)`, and images that the model rejects.

    In a process group of torch.distributed all processes call it alike, each sees its share, and all get the figures.
    """
    if len(dataset) == 0:
        raise GdfqError("there are no images to evaluate on")
    if device is not None:
        model.to(device)
    parameter = next((value for value in model.parameters() if value.is_floating_point()), torch.empty(0))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    own = dataset if ranks.count() == 1 else Subset(dataset, range(ranks.rank(), len(dataset), ranks.count()))
    loader = DataLoader(own, batch_size=batch_size, num_workers=workers, pin_memory=parameter.device.type == "cuda")
    start = time.perf_counter()
    top1 = top5 = 0
    classes = len(getattr(dataset, "classes", ()))
    settings = {"the batch size": batch_size}
    with (
        ranks.one_run(),
        ranks.together(),
        explained("evaluating", settings),
        _eval_mode(model),
        torch.inference_mode(),
    ):
        for images, labels in tqdm(_batches(loader), "evaluating", len(loader), disable=not progress):
            images = images.to(parameter.device, parameter.dtype, non_blocking=True, memory_format=memory_format)
            logits = _checked_logits(_forward(model, images), labels, num_classes)
            if classes not in (0, logits.shape[1]):
                warnings.warn(
                    f"the data have {classes} classes, but the model knows {logits.shape[1]}: labels, which are in the "
                    "data's own order, may stand for other classes than the model's",
                    stacklevel=3,
                )
                classes = 0
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.to(logits.device)[:, None]
            top1 += int(best[:, 0].sum())
            top5 += int(best.sum())
    top1, top5 = ranks.totals([top1, top5])
    count = len(dataset)
    return Evaluation(100 * top1 / count, 100 * top5 / count, count, time.perf_counter() - start)


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
def agreement(teacher: nn.Module, student: nn.Module, batches: Iterable[Tensor]) -> Agreement:
    """Compare the logits of P and Q on `batches` of images `(N, C, H, W)`, the same ones on all ranks."""
    alike = divergence = torch.zeros((), dtype=torch.float64)
    count = 0
    for whole in batches:
        images = ranks.shard(whole)
        log_p, log_q = (F.log_softmax(model(images).double(), 1).cpu() for model in (teacher, student))
        alike = alike + (log_p.argmax(1) == log_q.argmax(1)).sum()
        divergence = divergence + F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        count += len(whole)
    sums = torch.stack([alike.double(), divergence])
    ranks.add_up([sums])
    alike, divergence = sums
    return Agreement(100 * alike.item() / count, divergence.item() / count, count)


def _batches(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    try:
        yield from loader
    except GdfqError as error:
        # A worker process sends its whole traceback as the message; the user needs the end of it.
        raise GdfqError(str(error).rpartition("GdfqError: ")[2].strip()) from error


def _forward(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    try:
        return model(images)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        shape = tuple(images.shape[1:])
        raise GdfqError(f"the model rejects images of shape {shape} (channels, height, width): {error}") from error


def _checked_logits(logits: object, labels: torch.Tensor, num_classes: int | None) -> torch.Tensor:
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(labels):
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise GdfqError(f"a classifier returns a tensor (images, classes); this one, for {len(labels)} images: {given}")
    if num_classes not in (None, logits.shape[1]):
        raise GdfqError(f"the model returns {logits.shape[1]} logits, but {num_classes} classes were asked for")
    if int(labels.max()) >= logits.shape[1]:
        raise GdfqError(
            f"the data hold the label {int(labels.max())}, but the model knows only {logits.shape[1]} classes "
            f"(0..{logits.shape[1] - 1}); evaluate on the data that the model was trained for"
        )
    if not bool(logits.isfinite().all()):
        raise GdfqError("the model's output holds NaN or Inf; its accuracy is undefined")
    return logits


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own training flag afterward."""
    flags = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):  # an exported graph: its mode was fixed when it was captured
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
