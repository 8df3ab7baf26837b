"""Losses as sums of terms, and what the log has of them.

A term is added to `gdfq.registry.TERMS` by name; the settings `generator.terms` and `student.terms` give its weight.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import gdfq_ext
from gdfq import ranks
from gdfq.batch import Batch
from gdfq.config import GeneratorConfig, StudentConfig
from gdfq.errors import GdfqError
from gdfq.registry import TERMS


class Outputs(NamedTuple):
    """What a term sees.

    Attributes:
        batch: images, targets and the teacher's logits.
        logits: `(N, classes)` of the network that the loss goes through: P for a generator, Q for the student.
        readings: what the terms have declared to read of P, by name.
    """

    batch: Batch
    logits: Tensor
    readings: dict[str, Any]


class Term:
    """A term of a loss: `term(outputs)` gives a `()` tensor, and with `parts` a tuple that goes on with these.

    Attributes:
        reads: names of `gdfq.graph.teacher.READINGS`.
        parts: names of what the log gets in place of the term.
        is_mean: whether it is a mean over images; or else is of statistics of the whole batch, which all ranks have.
    """

    reads: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    is_mean = True

    def __call__(self, outputs: Outputs) -> Any:
        raise NotImplementedError


class Objective:
    """The weighted sum of terms.

    Args:
        name: whose loss it is; begins the names in the log.
        terms: name -> weight and term.

    Attributes:
        reads: what all terms read.
        names: of what the log gets, in the order of the second result.
    """

    def __init__(self, name: str, terms: dict[str, tuple[float, Term]]) -> None:
        self.terms = terms
        self.reads = tuple({read: None for _, term in terms.values() for read in term.reads})
        logged = (part for term_name, (_, term) in terms.items() for part in term.parts or (term_name,))
        self.names = [f"{name}/{part}" for part in logged]

    def __call__(self, outputs: Outputs) -> tuple[Tensor, list[Tensor]]:
        """The loss, `()` with its gradient, and what the log gets of it, `()` each without: of both this rank's part,
        which is to be added up over ranks."""
        total: Tensor | None = None
        logged = []
        of_mean, of_whole = ranks.share(len(outputs.logits)), 1 / ranks.count()
        for weight, term in self.terms.values():
            value, *parts = term(outputs) if term.parts else (term(outputs),)
            if ranks.count() > 1:
                value, *parts = ((of_mean if term.is_mean else of_whole) * part for part in (value, *parts))
            logged += [part.detach() for part in parts or [value]]
            value = value if weight == 1 else weight * value
            total = value if total is None else total + value
        assert total is not None
        return total, logged


class CrossEntropy(Term):
    """CE(z_P, y) of a generator's images (Eq. 4); y may be soft."""

    def __call__(self, outputs: Outputs) -> Tensor:
        return F.cross_entropy(outputs.logits.float(), outputs.batch.targets)


class BatchNormStatisticsLoss(Term):
    """BNS (Eq. 5): the batch's statistics against those that P's BN layers remember.

    Args:
        reduction: `mean` over channels and layers, or `sum`.
    """

    reads = ("statistics",)
    is_mean = False

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def __call__(self, outputs: Outputs) -> Tensor:
        return gdfq_ext.bns_loss(*outputs.readings["statistics"], reduction=self.reduction)


class Distillation(Term):
    """CE(z_Q, y) + gamma * T^2 * KL(softmax(z_P / T) || softmax(z_Q / T)) (Eq. 7 to 10), in one pass."""

    parts = ("cross_entropy", "kl")

    def __init__(self, config: StudentConfig) -> None:
        self.config = config

    def __call__(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        return gdfq_ext.distillation_loss(
            outputs.logits,
            outputs.batch.teacher_logits,
            outputs.batch.targets,
            sample_weight=outputs.batch.weights,
            temperature=config.temperature,
            cross_entropy_weight=config.cross_entropy_weight,
            distillation_weight=config.distillation_weight,
            reduction=config.kd_reduction,
        )


def generator_objective(config: GeneratorConfig) -> Objective:
    """CE(z_P, y) + beta * BNS (Eq. 4, 5), and the further terms that are set."""
    terms: dict[str, tuple[float, Term]] = {
        "cross_entropy": (config.cross_entropy_weight, CrossEntropy()),
        "bns": (config.bns_weight, BatchNormStatisticsLoss(config.bns_reduction)),
    }
    return Objective("generator", terms | _further(config.terms))


def student_objective(config: StudentConfig) -> Objective:
    """The loss of Eq. 10, and the further terms that are set."""
    return Objective("student", {"distillation": (1.0, Distillation(config)), **_further(config.terms)})


def _further(terms: dict[str, float]) -> dict[str, tuple[float, Term]]:
    return {name: (weight, TERMS[name]()) for name, weight in terms.items()}


class Averages:
    """Means of what the log gets, kept on the device: nothing waits for it until they are read.

    Args:
        names: of the values.
        device: where they arise.
    """

    def __init__(self, names: Iterable[str], device: torch.device) -> None:
        self.names = list(names)
        self.sums = torch.zeros(len(self.names) + 1, device=device)  # in the last place how many

    def add(self, values: list[Tensor]) -> None:
        """One step's values, `()` each."""
        self.sums += torch.stack([*values, torch.ones_like(values[0])])

    def read(self) -> dict[str, float | None]:
        """Means since the last call; None where nothing was added."""
        *values, steps = self.sums.tolist()
        self.sums.zero_()
        return {name: value / steps if steps else None for name, value in zip(self.names, values, strict=True)}


def check_finite(metrics: dict[str, float | None], iteration: int) -> None:
    """Raise `GdfqError` where a loss is NaN or infinite."""
    broken = [name for name, value in metrics.items() if value is not None and not math.isfinite(value)]
    if broken:
        raise GdfqError(
            f"{' and '.join(broken)} became NaN or Inf by iteration {iteration}: lower "
            "generator.learning_rate or student.learning_rate"
        )
