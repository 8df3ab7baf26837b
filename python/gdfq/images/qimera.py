"""Qimera (Choi et al., NeurIPS 2021): GDFQ's generator, also asked for images between classes."""

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from gdfq.config import Config, Section
from gdfq.graph import CapturedModel, Teacher
from gdfq.images.generator import GeneratorImages, Latents, seeded
from gdfq.images.networks import Generator
from gdfq.random_state import RandomState
from gdfq.registry import SECTIONS, SOURCES


class QimeraConfig(Section):
    """Qimera: superposed labels. The generator is the one with embeddings, whatever `generator.architecture` says."""

    probability: float = Field(0.4, ge=0, le=1, description="with which a batch is superposed (0.7 for ResNet-50)")
    labels: int | None = Field(
        None, ge=2, description="how many are superposed; default: a quarter of the classes, as 25 for CIFAR-100"
    )


class SuperposedGenerator(Generator):
    """`generator(noise, labels, shares)`: labels `(N, K)` int64 and shares `(N, K)` float32 that add up to one; what
    goes in is sum_k share_k * standardize(E[y_k] + z). Labels `(N,)` alone are single ones."""

    def forward(self, noise: Tensor, labels: Tensor, shares: Tensor | None = None) -> Tensor:
        if shares is None:
            labels, shares = labels[:, None], torch.ones_like(noise[:, :1])
        each = F.layer_norm(self.embedding(labels) + noise[:, None], noise.shape[1:])
        return self.decode((shares[..., None] * each).sum(1), torch.zeros_like(labels[:, 0]))


class QimeraImages(GeneratorImages):
    """Of whole batches some are superposed: a sample has K labels with shares softmax(N(0, 1)^K), the others have the
    first one alone. Targets are soft: sum_k share_k onehot(y_k)."""

    def latents(self, count: int, random: RandomState) -> Latents:
        settings = {"generator": random.generator, "device": self.device}
        own: QimeraConfig = self.config.qimera
        number = own.labels or max(2, self.num_classes // 4)
        noise = torch.randn(count, self.config.generator.latent_size, **settings)
        labels = torch.randint(self.num_classes, (count, number), **settings)
        shares = torch.randn(count, number, **settings).softmax(1)
        is_superposed = torch.rand((), **settings) < own.probability
        single = torch.zeros_like(shares)
        single[:, 0] = 1
        return noise, labels, torch.where(is_superposed, shares, single)

    def targets(self, latents: Latents) -> Tensor:
        _, labels, shares = latents
        return shares.new_zeros(len(labels), self.num_classes).scatter_add_(1, labels, shares)


def qimera(
    teacher: Teacher, captured: CapturedModel, config: Config, device: torch.device, progress: bool = False
) -> QimeraImages:
    shape, num_classes = captured.image_shape, captured.num_classes
    settings = config.generator.model_copy(update={"architecture": "embedding"})
    network = seeded(
        config,
        device,
        lambda: SuperposedGenerator(shape, num_classes, settings, captured.pixels, config.run.checkpointing),
    )
    return QimeraImages(teacher, shape, num_classes, config, device, network)


SOURCES["qimera"] = qimera
SECTIONS["qimera"] = QimeraConfig
