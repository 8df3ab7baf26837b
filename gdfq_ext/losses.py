"""The public functions of the losses; what `ops.py` says holds for them, too."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_device, check_floating, check_labels, check_shape, statistics

_ops = torch.ops.gdfq_ext


def bns_loss(
    means: Sequence[Tensor], variances: Sequence[Tensor], running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor], *, reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:  # fmt: skip
    """The batch-normalization-statistics loss over all layers (Eq. 5).

        sum_l |mean_l - running_mean_l|^2 + |var_l - running_var_l|^2

    Args:
        means, variances: batch statistics, one `(C_l,)` tensor per layer; the gradient goes to these.
        running_means, running_vars: the teacher's statistics, likewise.
        reduction: "sum" is the equation; "mean" divides each layer's term by C_l and averages over layers, as the
            published numbers were made.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: the lists are empty or differ in length, a layer's tensors differ in shape or device, or `reduction`
            is not known.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    means = list(means)
    if not means:
        raise ValueError("means is empty; the loss needs at least one batch-normalization layer")
    lists = (
        statistics("means", means, means),
        statistics("variances", list(variances), means),
        statistics("running_means", list(running_means), means),
        statistics("running_vars", list(running_vars), means),
    )
    return _ops.bns_loss(*lists, reduction == "mean")[0]


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor,
    *, sample_weight: Tensor | None = None, temperature: float = 20.0, cross_entropy_weight: float = 1.0,
    distillation_weight: float = 1.0, reduction: Literal["mean", "batchmean"] = "mean",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The student's loss (Eq. 10): cross-entropy and knowledge distillation with z_Q = student, z_P = teacher.

        loss = cross_entropy_weight * CE + distillation_weight * T^2 * KL(softmax(z_P/T) || softmax(z_Q/T))
        CE = 1/B sum_n sample_weight_n * -log softmax(z_Q,n)[targets_n]
          or 1/B sum_n sample_weight_n * -sum_c targets_nc * log softmax(z_Q,n)_c

    computed in float32. The gradient goes to `student_logits` only.

    Args:
        student_logits: `(B, C)`, floating.
        teacher_logits: `(B, C)`, floating.
        targets: labels, `(B,)` int64, each in 0..C-1 (another value makes the loss NaN; checking it would wait for the
            device), or soft ones, `(B, C)` floating, as a rule probabilities.
        sample_weight: `(B,)`, floating: weight of each image's cross-entropy; KL has none. None for 1.
        temperature: T, above 0.
        cross_entropy_weight, distillation_weight: weights of the two parts.
        reduction: KL is divided by B*C ("mean", as the published numbers were made) or by B ("batchmean").

    Returns:
        loss, cross_entropy, kl: float32 scalars. The last two are for logging, without the weights of the parts, KL
        without T^2, and take no gradient. NaN for an empty batch.

    Raises:
        TypeError: logits or `sample_weight` are not floating, or `targets` neither floating nor int64.
        ValueError: shapes or devices do not fit, `temperature` is not positive, or `reduction` is not known.
    """
    check_choice("reduction", reduction, ("mean", "batchmean"))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed is a number above 0")
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        check_floating(name, logits)
        if logits.dim() != 2 or logits.shape != student_logits.shape or logits.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(logits.shape)}, student_logits {tuple(student_logits.shape)}; "
                "both must be the same (B, C), C >= 1"
            )
    batch, classes = student_logits.shape
    check_device("teacher_logits", teacher_logits, student_logits)
    check_device("targets", targets, student_logits)
    if targets.is_floating_point():
        check_shape("targets", targets, (batch, classes))
        targets = targets.detach().float()
    else:
        check_labels("targets", targets, batch, classes, " or a floating type")
    if sample_weight is not None:
        check_floating("sample_weight", sample_weight)
        check_shape("sample_weight", sample_weight, (batch,))
        check_device("sample_weight", sample_weight, student_logits)
        sample_weight = sample_weight.detach().float().contiguous()
    loss, cross_entropy, kl, _ = _ops.distillation_loss(
        student_logits.float().contiguous(), teacher_logits.detach().float().contiguous(), targets.contiguous(),
        sample_weight, temperature, cross_entropy_weight, distillation_weight, reduction == "batchmean",
    )  # fmt: skip
    return loss, cross_entropy, kl
