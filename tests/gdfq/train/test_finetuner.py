"""Training of all blocks together: what images it sees, and that a run that diverges says so."""

import numpy as np
import pytest
import torch
from small_models import Residual, capture_once

from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.graph import build_quantized, build_teacher
from gdfq.nn import activation_quantizers
from gdfq.random_state import RandomState
from gdfq.train.finetune import FineTuner


def tuner_of(images, **settings):
    torch.manual_seed(0)
    captured = capture_once(Residual, 8)
    settings = {f"reconstruction.{name}": value for name, value in settings.items()}
    config = Config.load("cifar", {"reconstruction.batch_size": 8, **settings})
    student, _ = build_quantized(captured, config.quantizer)
    calibrate(student, [torch.randn(16, 3, 8, 8)])
    quantizers = activation_quantizers(student).values()
    return FineTuner(build_teacher(captured), student, quantizers, images, config, random())


def random() -> RandomState:
    return RandomState(0, torch.device("cpu"))


def test_images_are_moved_and_flipped():
    """One image, blended with itself as it is moved: every view is one of its 2 x 3 x 3."""
    image = torch.randn(1, 3, 8, 8)
    padded = np.pad(image[0].numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    moved = [padded[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
    possible = torch.from_numpy(np.stack([*moved, *(view[:, :, ::-1] for view in moved)]))
    views = tuner_of(image)._views(512, random())
    nearest = (views[:, None] - possible).abs().flatten(2).amax(2).min(1)
    assert nearest.values.max() < 1e-6
    assert set(nearest.indices.tolist()) == set(range(18))


def test_half_of_the_images_are_blended():
    bank = torch.stack([torch.full((3, 8, 8), value) for value in (0.0, 1.0)])
    views = tuner_of(bank)._views(4000, random())[:, 0]
    assert bool((views == views[:, :1, :1]).all())
    shares = views[:, 0, 0]
    whole = ((shares == 0) | (shares == 1)).float().mean().item()
    assert whole == pytest.approx(0.75, abs=0.03)  # one half of the others is blended with its like
    blended = shares[(shares > 0) & (shares < 1)]
    assert blended.mean().item() == pytest.approx(0.5, abs=0.05)
    assert blended.var().item() == pytest.approx(1 / 12, rel=0.2)


def test_divergence_is_that_of_as_many_views_as_there_are_images():
    tuner = tuner_of(torch.randn(24, 3, 8, 8))
    found = tuner.divergence(random())
    same = random()
    views = torch.cat([tuner._views(8, same) for _ in range(3)])
    with torch.no_grad():
        log_p, log_q = (z.double().log_softmax(1) for z in (tuner.read(views)[0], tuner.student(views)))
    assert found == pytest.approx((log_p.exp() * (log_p - log_q)).sum(1).mean().item(), rel=1e-4)
