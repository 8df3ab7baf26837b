"""How far images are from what a network remembers, against torch.distributions in float64."""

import math

import numpy as np
import pytest
import torch
from small_models import Residual
from torch import nn

from gdfq.fit import LayerFit, effective_number, effective_rank, fit, problems
from gdfq.graph import Pixels, build_teacher, capture


def trained_on(make_images):
    """A network whose BN statistics are those of the images."""
    torch.manual_seed(0)
    model = Residual().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    images = make_images()
    with torch.no_grad():
        model(images)
    return model.eval(), images


@pytest.fixture(scope="module")
def model():
    return trained_on(lambda: 2 + 3 * torch.randn(512, 3, 8, 8))[0]


def moments(model, x):
    """Of every BN's input, by hooks: mean and variance of all images, float64."""
    found = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.update({name: args[0].double()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: (y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) for name, y in found.items()}


def test_distances_are_kl_divergences_over_all_images(model):
    teacher = build_teacher(capture(model))
    images = 1 + 2 * torch.randn(48, 3, 8, 8)
    found = fit(teacher, images.split([16, 24, 8]), Pixels.standardized(3))
    expected = moments(model, images)
    assert [layer.name for layer in found.layers] == list(expected)
    for layer in found.layers:
        bn = model.get_submodule(layer.name)
        mean, var = expected[layer.name]
        remembered = torch.distributions.Normal(bn.running_mean.double(), bn.running_var.double().sqrt())
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, var.sqrt()), remembered)
        assert layer.distance == pytest.approx(kl.mean().item(), rel=0.03)  # a thousandth of the variance is added
    probabilities = model(images).softmax(1).amax(1)
    assert found.confident == pytest.approx(100 * (probabilities > 0.5).float().mean().item())


def test_noise_is_at_the_scale_of_the_pixels(model):
    teacher = build_teacher(capture(model))
    images = torch.randn(64, 3, 8, 8)
    right, wrong = (
        fit(teacher, [images], pixels)
        for pixels in (Pixels.around((2.0,) * 3, (3.0,) * 3, "set"), Pixels.standardized(3))
    )
    assert all(layer.of_noise < 0.05 < other.of_noise for layer, other in zip(right.layers, wrong.layers, strict=True))
    assert [layer.distance for layer in right.layers] == [layer.distance for layer in wrong.layers]


def test_dead_channels_decide_nothing(model):
    teacher = build_teacher(capture(model))
    with torch.no_grad():
        for name, buffer in teacher.module.named_buffers():
            if name == "bn1.running_var":
                buffer[0] = 1e-30
    found = fit(teacher, [2 + 3 * torch.randn(64, 3, 8, 8)], Pixels.standardized(3))
    assert found.layers[0].distance <= 100 / 8 + 1


def smooth(count):
    return nn.functional.interpolate(torch.randn(count, 3, 3, 3), (8, 8), mode="bilinear")


def test_figures_on_images_that_do_not_fit_are_distrusted():
    model, images = trained_on(lambda: smooth(600))
    teacher, right = build_teacher(capture(model)), Pixels.around((0.0,) * 3, (images.std().item(),) * 3, "set")
    assert not fit(teacher, images.split(200), right).problems
    for wrong in (right.scaled(torch.randn(200, 3, 8, 8)), 1 + 2 * images, 400 * images):
        (problem,) = fit(teacher, [wrong], right).problems
        assert "such images P was not trained on" in problem
    nan = fit(teacher, [torch.full((4, 3, 8, 8), torch.nan)], right)
    assert nan.problems
    assert all(layer.distance == 100 for layer in nan.layers)


def test_where_noise_fits_no_figure_is_trusted(model):
    teacher, right = build_teacher(capture(model)), Pixels.around((2.0,) * 3, (3.0,) * 3, "set")
    for images in (right.scaled(torch.randn(64, 3, 8, 8)), 3 * smooth(64)):
        (problem,) = fit(teacher, [images], right).problems
        assert "they are of no images" in problem


@pytest.mark.parametrize(
    ("distances", "trusted"),
    [
        ((0.01, 0.1), True),
        ((0.1, 0.3), False),
        ((0.2, 10.0), True),
        ((0.4, 10.0), False),
        ((0.001, 0.02), False),
    ],
)
def test_images_must_fit_better_than_noise_and_well(distances, trusted):
    assert (not problems([LayerFit("bn", *distances)])) is trusted


def test_variety_is_how_many_classes_and_dimensions_there_are(model):
    teacher = build_teacher(capture(model))
    images = 2 + 3 * torch.randn(40, 3, 8, 8)
    found = fit(teacher, images.split(16), Pixels.standardized(3))
    labels = model(images).argmax(1).tolist()
    shares = [labels.count(label) / len(labels) for label in set(labels)]
    assert found.classes == pytest.approx(math.prod(share**-share for share in shares))
    pooled = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    model(images)
    handle.remove()
    features = pooled[0].detach().double().numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(features.T)).clip(1e-18)
    shares = eigenvalues / eigenvalues.sum()
    assert found.rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert f"sees {found.classes:.1f} classes, in features of rank {found.rank:.1f}" in str(found)


def test_effective_numbers_of_what_is_known():
    assert effective_number(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert effective_number(torch.tensor([0, 7])) == pytest.approx(1)
    assert effective_rank(torch.eye(6)) == pytest.approx(5)
    assert effective_rank(torch.randn(50, 1) @ torch.randn(1, 9)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.full((8, 3), torch.nan)) == 1
    assert effective_rank(torch.ones(8, 3)) == 1
