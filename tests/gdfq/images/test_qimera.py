"""Qimera's images: whole batches are superposed or not, with soft targets that the losses take."""

import pytest
import torch
from small_models import Residual, capture_once
from torch.nn import functional as F

from gdfq.config import Config, GeneratorConfig
from gdfq.graph import build_teacher
from gdfq.images.qimera import SuperposedGenerator, qimera
from gdfq.random_state import RandomState

CPU = torch.device("cpu")


def new_source(**settings):
    captured = capture_once(Residual)
    own = {f"qimera.{name}": value for name, value in settings.items()}
    config = Config.load("cifar", {"images.source": "qimera", "run.held_out_images": 4, **own})
    return qimera(build_teacher(captured), captured, config, CPU)


@pytest.mark.parametrize(("probability", "superposed"), [(0.0, False), (1.0, True)])
def test_targets_are_shares_of_labels(probability, superposed):
    source = new_source(probability=probability, labels=3)
    latents = source.latents(64, RandomState(0, CPU))
    targets = source.targets(latents)
    _, labels, shares = latents
    assert labels.shape == shares.shape == (64, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    expected = torch.zeros(64, 5)
    for n in range(64):
        for label, share in zip(labels[n], shares[n], strict=True):
            expected[n, label] += share
    torch.testing.assert_close(targets, expected)
    assert (targets.amax(1) < 0.999).any().item() == superposed


def test_batches_are_superposed_with_the_probability_and_as_a_whole():
    source, random = new_source(probability=0.4), RandomState(0, CPU)
    batches = [source.latents(8, random)[2][:, 0] == 1 for _ in range(400)]
    assert all(batch.all() or not batch.any() for batch in batches)
    assert abs(sum(not batch.any() for batch in batches) / 400 - 0.4) < 0.08


def test_the_latent_is_the_weighted_sum_of_standardized_embeddings():
    generator = SuperposedGenerator((3, 8, 8), 5, GeneratorConfig(latent_size=16))
    seen = []
    generator.linear.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    noise, labels = torch.randn(4, 16), torch.randint(5, (4, 2))
    shares = torch.tensor([[0.25, 0.75]]).expand(4, 2)
    generator(noise, labels, shares)
    table = generator.embedding.weight.detach().double()
    expected = torch.zeros(4, 16, dtype=torch.float64)
    for k, share in enumerate((0.25, 0.75)):
        value = table[labels[:, k]] + noise.double()
        value = value - value.mean(1, keepdim=True)
        expected += share * value / value.var(1, correction=0, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-5)
    generator(noise, labels[:, 0])
    generator(noise, labels, torch.tensor([[1.0, 0.0]]).expand(4, 2))
    torch.testing.assert_close(seen[1], seen[2])


def test_the_generator_learns_on_soft_cross_entropy():
    source = new_source(probability=1.0)
    latents = source.latents(8, RandomState(3, CPU))
    _, logged, batch = source._forward(latents)
    log_p = F.log_softmax(batch.teacher_logits.detach().double(), 1)
    expected = -(source.targets(latents).double() * log_p).sum(1).mean()
    torch.testing.assert_close(logged[0].double(), expected, rtol=1e-5, atol=1e-6)
    before = [parameter.detach().clone() for parameter in source.generator.parameters()]
    assert source.step(8).targets.shape == (8, 5)
    assert any(not torch.equal(p, q) for p, q in zip(source.generator.parameters(), before, strict=True))
