"""Inverted images fit the BN statistics, in parts each of a seed of its own."""

from dataclasses import replace

import pytest
import torch
from small_models import PIXELS, capture_remembering_smooth_images

from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.fit import fit, mean_distances
from gdfq.graph import build_teacher
from gdfq.graph.sizes import ImageSizes
from gdfq.images import inversion
from gdfq.images.inversion import InversionConfig, balanced_labels, hard_sample_loss, invert, inverted

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def captured():
    return capture_remembering_smooth_images()


@pytest.fixture(scope="module")
def teacher(captured):
    return build_teacher(captured)


def new_bank(teacher, captured, **changes):
    settings = {"inversion.images": 10, "inversion.batch_size": 4, "inversion.iterations": 2}
    config = Config.load("cifar", settings | {key.replace("__", "."): value for key, value in changes.items()})
    return inverted(teacher, captured, config, CPU)


@pytest.fixture(scope="module")
def made(teacher, captured):
    """`made(seed, **settings)`: 16 inverted images."""
    return lambda seed=0, **settings: invert(teacher, captured, InversionConfig(**settings), 16, seed, CPU)


def distance(teacher, images) -> float:
    return mean_distances(fit(teacher, [images], PIXELS).layers)[0]


@pytest.mark.parametrize("swing", [False, True])
def test_images_fit_the_better_the_longer_it_takes(teacher, made, swing):
    distances = [distance(teacher, made(iterations=iterations, swing=swing)) for iterations in (1, 30, 300)]
    assert distances[2] < 0.7 * distances[1] < 0.5 * distances[0]


def test_images_have_the_scale_of_the_pixels(made):
    images = made(iterations=200)
    mean, std = PIXELS.tensors()
    torch.testing.assert_close(images.mean((0, 2, 3)), mean.flatten(), atol=0.1, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), std.flatten(), atol=0.1, rtol=0)


def test_everything_comes_from_the_seed(made):
    torch.manual_seed(1)
    first = made(iterations=3)
    torch.manual_seed(2)
    assert torch.equal(made(iterations=3), first)
    assert not torch.equal(made(seed=1, iterations=3), first)
    assert not torch.equal(made(iterations=3, swing=False), first)


def test_a_bank_has_parts_of_about_the_same_size(teacher, captured):
    bank = new_bank(teacher, captured)
    assert [len(part) for part in bank.calibration()] == [4, 3, 3]
    (held_out,) = bank.held_out()
    assert (len(bank.bank), len(held_out)) == (10, 3)
    images = torch.cat([bank.bank, held_out]).flatten(1)
    assert len(images.unique(dim=0)) == 13
    again, other = new_bank(teacher, captured), new_bank(teacher, captured, run__seed=1)
    assert torch.equal(again.bank, bank.bank)
    assert not (torch.cat([other.bank, *other.held_out()]).flatten(1)[:, None] == images).all(2).any()


def test_a_bank_smaller_than_a_part(teacher, captured):
    bank = new_bank(teacher, captured, inversion__images=3)
    assert (len(bank.bank), [len(images) for images in bank.held_out()]) == (3, [3])


def test_hard_samples_count_more():
    random = torch.Generator().manual_seed(0)
    logits, labels = 4 * torch.randn(20, 7, generator=random), torch.randint(7, (20,), generator=random)
    logits[0, labels[0]] = 100.0  # P is sure: no loss, and no NaN in its gradient
    probabilities = logits.double().softmax(1)[range(20), labels]
    for hardness in (0.0, 0.5, 2.0):
        expected = ((1 - probabilities) ** hardness * -probabilities.log()).mean()
        found = hard_sample_loss(logits.requires_grad_(True), labels, hardness)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        (gradient,) = torch.autograd.grad(found, logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("count", "classes"), [(12, 5), (5, 5), (3, 1000), (16, 4)])
def test_labels_are_balanced(count, classes):
    labels = balanced_labels(count, classes, torch.Generator().manual_seed(0))
    counts = labels.bincount(minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert (len(labels), len(counts)) == (count, classes)


def test_images_become_of_the_classes_that_are_asked_for(teacher, made):
    labels = balanced_labels(16, 5, torch.Generator().manual_seed(0))
    settings = {"iterations": 150, "swing": False, "hardness": 0.0}
    losses = [
        hard_sample_loss(teacher(made(cross_entropy_weight=weight, **settings)), labels, 0).item() for weight in (0, 1)
    ]
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("settings", [{"crop": 0.5}, {"flip": True}, {"low_pass": 2.0}])
def test_each_setting_makes_others_that_fit(teacher, made, settings):
    images = made(iterations=100, **settings)
    assert not torch.equal(images, made(iterations=100))
    assert torch.equal(images, made(iterations=100, **settings))
    assert distance(teacher, images) < 0.5 * distance(teacher, made(iterations=1))


def test_images_of_low_frequencies_stay_so(made):
    def roughness(images):
        return ((images[..., 1:] - images[..., :-1]).square().mean() / images.var()).item()

    assert roughness(made(iterations=30, low_pass=1.0)) < 0.5 * roughness(made(iterations=30))


def test_large_images_are_optimized_at_smaller_sizes_first(captured):
    large = replace(captured, image_shape=(3, 66, 130))
    seen = []
    teacher = build_teacher(large)
    settings = InversionConfig(iterations=2, coarse_iterations=3)
    reads = inversion.misfit

    def noted(images, layers):
        seen.append(tuple(images.shape[2:]))
        return reads(images, layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "misfit", noted)
        images = invert(teacher, large, settings, 2, 0, CPU)
        assert seen == [(33, 65)] * 3 + [(66, 130)] * 2
        assert images.shape == (2, 3, 66, 130)
        seen.clear()
        fixed = ImageSizes(large.image_shape, ("h == 66", "w == 130"))
        invert(teacher, replace(large, sizes=fixed), settings, 2, 0, CPU)
    assert seen == [(66, 130)] * 2


def test_images_that_diverge_are_said(teacher, captured):
    bank = new_bank(teacher, captured, inversion__learning_rate=1e30, inversion__iterations=3)
    with pytest.raises(GdfqError, match=r"NaN or infinite: lower the learning rate \(inversion\)"):
        next(bank.calibration())
