"""The two losses of Algorithm 1, from the configuration's weights and the fused terms of `gdfq_ext`."""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

import gdfq_ext
from gdfq.config import GeneratorConfig, StudentConfig
from gdfq.graph import BatchNormStatistics


class GeneratorLoss(NamedTuple):
    """`total` has the gradient; the parts are for the log."""

    total: Tensor
    cross_entropy: Tensor
    bns: Tensor


class StudentLoss(NamedTuple):
    """`total` has the gradient; the parts are for the log."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def generator_loss(
    config: GeneratorConfig, logits: Tensor, labels: Tensor, statistics: BatchNormStatistics
) -> GeneratorLoss:
    """CE(z_P, y) + beta * BNS (Eq. 4, 5).

    Args:
        logits: z_P `(N, classes)`.
        labels: y `(N,)` int64.
        statistics: what the teacher's BN layers saw and what they remember, `Teacher.with_statistics`.
    """
    cross_entropy = F.cross_entropy(logits.float(), labels)
    bns = gdfq_ext.bns_loss(*statistics, reduction=config.bns_reduction)
    total = config.cross_entropy_weight * cross_entropy + config.bns_weight * bns
    return GeneratorLoss(total, cross_entropy.detach(), bns.detach())


def student_loss(config: StudentConfig, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> StudentLoss:
    """CE(z_Q, y) + gamma * T^2 * KL(softmax(z_P / T) || softmax(z_Q / T)) (Eq. 7 to 10).

    Args:
        student_logits: z_Q `(N, classes)`.
        teacher_logits: z_P `(N, classes)`, takes no gradient.
        labels: y `(N,)` int64.
    """
    return StudentLoss(
        *gdfq_ext.distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=config.temperature,
            cross_entropy_weight=config.cross_entropy_weight,
            distillation_weight=config.distillation_weight,
            reduction=config.kd_reduction,
        )
    )
