"""A toy of everything that can be added, each registered in one place, chosen in the settings and used."""

import json

import pytest
import torch
from small_models import Residual, randomize_batch_norm
from typer.testing import CliRunner

import gdfq
from gdfq.cli import app
from gdfq.config import Config, LayerBits, Section
from gdfq.errors import GdfqError
from gdfq.images.noise import GaussianImages
from gdfq.methods import Method
from gdfq.methods.calibration import calibrating
from gdfq.objective import Term
from gdfq.registry import ALL, METHODS, OPTIMIZERS, SECTIONS, SOURCES, TARGETS, TERMS, TRANSFORMS
from gdfq.target import Target

SHORT = {
    "schedule.epochs": 3, "schedule.iterations": 2, "schedule.batch_size": 8, "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2, "schedule.range_batches": 1, "run.held_out_images": 8, "run.log_every": 1,
    "method": "gdfq",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_stays():
    before = [dict(registry) for registry in (*ALL, SECTIONS)]
    yield
    for registry, content in zip((*ALL, SECTIONS), before, strict=True):
        registry.clear()
        registry.update(content)


def quantize(tmp_path=None, **settings):
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    torch.manual_seed(0)
    return gdfq.quantize(
        randomize_batch_norm(Residual()), Config.load("cifar", SHORT | settings), run_dir=tmp_path, progress=False
    )


class ToySection(Section):
    clip: float = 1.0


def add_method() -> None:
    def clip(task, batches) -> None:
        for batch in batches:
            task.student(batch)
        for quantizer in task.student.modules():
            if hasattr(quantizer, "range"):
                quantizer.range.copy_(torch.tensor([-1.0, 1.0]) * task.config.toy.clip)

    Method("toy", "ranges as they are set", calibrating(clip, "gaussian"))
    SECTIONS["toy"] = ToySection


def test_a_method_with_a_section_of_its_own():
    add_method()
    result = quantize(method="toy", toy__clip=2.5)
    assert result.report.selected == "calibrated"
    ranges = [value for name, value in result.model.named_buffers() if name.endswith(".range")]
    assert all(value.tolist() == [-2.5, 2.5] for value in ranges)
    with pytest.raises(GdfqError, match=r"unknown setting 'toy.cut'"):
        Config.load("cifar", {"toy.cut": 1})


def test_a_method_from_the_command_line(tmp_path):
    add_method()
    arguments = ["quantize", "--model", "small_models:Plain", "--method", "toy", "--set", "toy.clip=3.0"]
    done = CliRunner().invoke(app, [*arguments, "--set", "run.held_out_images=8", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert "method       toy, W4A4" in done.output
    assert json.loads((tmp_path / "run/report.json").read_text())["config"]["toy"] == {"clip": 3.0}


def test_a_method_that_is_not_there():
    with pytest.raises(GdfqError, match=r"setting 'method': there is no 'toy'; there are: .*gdfq"):
        Config.load("cifar", {"method": "toy"})


class Brightness(Term):
    reads = ("statistics", "features")

    def __call__(self, outputs):
        assert outputs.readings["features"].dim() == 4
        return outputs.batch.images.square().mean() + outputs.readings["statistics"].means[0].mean()


def test_a_term_of_both_losses(tmp_path):
    TERMS["brightness"] = Brightness
    quantize(tmp_path / "run", generator__terms={"brightness": 0.5}, student__terms={"brightness": 0.0})
    last = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert {"generator/brightness", "student/brightness"} <= last.keys()
    less, same, more = (quantize(generator__terms={"brightness": weight}) for weight in (0.5, 0.5, 50.0))
    assert torch.equal(less.held_out_images[0], same.held_out_images[0])
    assert not torch.equal(less.held_out_images[0], more.held_out_images[0])


def test_an_image_source():
    class Halves(GaussianImages):
        def images(self, count):
            images, _ = super().images(count)
            return images / 2, torch.zeros(count, dtype=torch.int64)

    SOURCES["halves"] = lambda teacher, captured, *rest: Halves(teacher, captured.image_shape, *rest[:2])
    result = quantize(images__source="halves")
    assert result.generator is None
    assert result.report.choice is not None  # Q was trained


def test_a_transform():
    class Flip:
        def __init__(self, dim: int) -> None:
            self.dim = dim

        def __call__(self, images):
            return images.flip(self.dim)

    TRANSFORMS["flip"] = Flip
    plain, flipped = (quantize(images__transforms=t, images__source="gaussian") for t in ({}, {"flip": {"dim": 3}}))
    assert torch.equal(plain.held_out_images[0].flip(3), flipped.held_out_images[0])
    with pytest.raises(GdfqError, match=r"setting 'images.transforms.flip'.*axis"):
        quantize(images__transforms={"flip": {"axis": 3}})


def test_an_optimizer_that_no_graph_can_hold():
    class Lbfgs(torch.optim.SGD):
        obstacle = "its line search reads losses on the host"

    OPTIMIZERS["toy"] = lambda student, config: Lbfgs(student.parameters(), torch.tensor(0.01))
    result = quantize(student__optimizer="toy", run__cuda_graph=True)
    assert result.report.iterations.startswith("eager: ")


def test_a_target():
    eight = LayerBits(weights=8, activations=8)
    TARGETS["toy"] = Target(name="toy", layers={"<first>": eight, "<last>": eight})
    summary = quantize(quantizer__target="toy", method="minmax").report.summary
    assert [entry.bits for entry in summary.weights] == [8, 4, 4, 4, 8]
    assert "toy" in TARGETS


def test_all_methods_say_what_they_do():
    assert all(isinstance(method, Method) and method.help for method in METHODS.values())
