"""What every source has: as many images as asked for, held-out ones that stay, and a state to go on from."""

import pytest
import torch
from small_models import Plain, capture_once

from gdfq.config import Config
from gdfq.graph import build_teacher
from gdfq.registry import SOURCES

SETTINGS = {
    "schedule.batch_size": 8, "schedule.range_batches": 3, "run.held_out_images": 10, "zeroq.iterations": 2,
    "zeroq.images": 12, "inversion.images": 12, "inversion.iterations": 2,
    "distillation.images": 12, "distillation.iterations": 2,
}  # fmt: skip


def new_source(name: str, **changes):
    torch.manual_seed(0)
    captured = capture_once(Plain)
    config = Config.load("cifar", SETTINGS | {key.replace("__", "."): value for key, value in changes.items()})
    return SOURCES[name](build_teacher(captured), captured, config, torch.device("cpu"))


@pytest.mark.parametrize("name", ["gaussian", "generator", "qimera"])
def test_images_to_calibrate_on_are_as_many_as_asked_for(name):
    source = new_source(name)
    assert [tuple(batch.shape) for batch in source.calibration()] == [(8, 3, 8, 8)] * 3
    assert sum(len(batch) for batch in source.held_out()) == 10
    assert [len(batch) for batch in new_source(name, calibration__count=11).calibration()] == [8, 3]


@pytest.mark.parametrize("name", SOURCES)
def test_held_out_images_are_the_same_ones_every_time_and_others_than_drawn(name):
    source = new_source(name)
    first = torch.cat(list(source.held_out()))
    assert torch.equal(torch.cat(list(source.held_out())), first)
    drawn = source.draw(8)
    assert not (drawn.images[:, None] == first[None]).flatten(2).all(2).any()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_goes_on_where_its_state_was(name):
    source, again = new_source(name), new_source(name)
    source.step(8)
    again.load_state_dict(source.state_dict())
    for one, other in zip(source.step(8)[:3], again.step(8)[:3], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SOURCES)
def test_targets_fit_the_images_and_the_teacher_is_asked_once(name):
    source = new_source(name)
    source.set_reads(["statistics", "features"])
    for batch in (source.step(8), source.draw(8)):
        torch.testing.assert_close(batch.teacher_logits, source.teacher(batch.images))
        assert len(batch.targets) == len(batch.images) == 8
        assert not batch.images.requires_grad
        assert not batch.teacher_logits.requires_grad
        assert batch.labels.max() < 5
        (mean,) = batch.readings["statistics"].means
        x = torch.nn.functional.conv2d(batch.images, source.teacher.module.get_parameter("conv.weight"), padding=1)
        torch.testing.assert_close(mean.detach(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert not batch.readings["features"].requires_grad
        assert not mean.requires_grad
