"""Distilled images fit the BN statistics the better the longer it takes, at the scale of the pixels."""

import pytest
import torch
from small_models import PIXELS, capture_remembering_smooth_images
from torch import nn

from gdfq.config import Config
from gdfq.fit import fit, mean_distances
from gdfq.graph import build_teacher
from gdfq.images.distilled import Decoder, DistillationConfig, distill, distilled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captured():
    return capture_remembering_smooth_images()


@pytest.fixture(scope="module")
def teacher(captured):
    return build_teacher(captured)


def test_they_fit_the_better_the_longer_it_takes(teacher, captured):
    made = [distill(teacher, captured, DistillationConfig(iterations=n), 16, 0, CPU) for n in (1, 100)]
    distances = [mean_distances(fit(teacher, [images], PIXELS).layers)[0] for images in made]
    assert distances[1] < 0.7 * distances[0]
    for images in made:
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(PIXELS.mean), atol=1e-3, rtol=0)
        torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(PIXELS.std), atol=1e-2, rtol=0)


def test_everything_comes_from_the_seed(teacher, captured):
    settings = DistillationConfig(iterations=2)
    before = torch.random.get_rng_state()
    first = distill(teacher, captured, settings, 4, 0, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(9)
    assert torch.equal(distill(teacher, captured, settings, 4, 0, CPU), first)
    assert not torch.equal(distill(teacher, captured, settings, 4, 1, CPU), first)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 10)])
def test_the_generator_is_the_published_layers_one_by_one(shape):
    torch.manual_seed(0)
    decoder, latents = Decoder(shape, 16), torch.randn(6, 16)
    start = (-(-shape[1] // 4), -(-shape[2] // 4))

    def norm(x, layer):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x if layer.weight is None else x * layer.weight[:, None, None] + layer.bias[:, None, None]

    def up_and_convolved(x, layer):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)

    x = norm((latents @ decoder.linear.weight.T + decoder.linear.bias).view(6, 128, *start), decoder.norm1)
    x = norm(up_and_convolved(x, decoder.conv1), decoder.norm2)
    x = torch.tanh(up_and_convolved(x.maximum(0.2 * x), decoder.conv2)[:, :, : shape[1], : shape[2]])
    torch.testing.assert_close(decoder(latents), norm(x, decoder.norm3), rtol=1e-4, atol=1e-4)


def test_a_bank_of_them(teacher, captured):
    config = Config.load(
        "cifar", {"distillation.images": 5, "distillation.batch_size": 3, "distillation.iterations": 1}
    )
    bank = distilled(teacher, captured, config, CPU)
    assert [len(part) for part in bank.calibration()] == [3, 2]
    assert [len(part) for part in bank.held_out()] == [2]
