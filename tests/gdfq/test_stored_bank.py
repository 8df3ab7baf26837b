"""A bank in files: a killed run makes the missing parts, a later run takes the whole, and what is none is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import Residual, randomize_batch_norm

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.errors import GdfqError
from gdfq.fit import fit, mean_distances
from gdfq.graph import Pixels, build_teacher, capture
from gdfq.images import inversion
from gdfq.images.transforms import LowPass
from gdfq.methods import Method, Outcome
from gdfq.methods.training import bank_of
from gdfq.registry import METHODS
from gdfq.run import bank
from gdfq.run import folder as run_folder
from gdfq.run.bank import stored_bank
from gdfq.run.files import load_tensors

SHORT = {
    "schedule.epochs": 3, "schedule.iterations": 2, "schedule.batch_size": 8, "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 1, "schedule.range_batches": 1, "inversion.images": 10, "inversion.batch_size": 4,
    "inversion.iterations": 3, "method": "squant",
}  # fmt: skip


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomize_batch_norm(Residual())


def quantize(folder=None, model=None, resume=False, **settings) -> gdfq.Result:
    settings = SHORT | {key.replace("__", "."): value for key, value in settings.items()}
    config = Config.load("cifar", settings)
    return gdfq.quantize(model or network(), config, run_dir=folder, resume=resume, progress=False)


def names(folder) -> set[str]:
    return {path.name for path in folder.glob("*images*.safetensors")}


def same(one: gdfq.Result, other: gdfq.Result) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    held_out = zip(one.held_out_images, other.held_out_images, strict=True)
    return all(torch.equal(a, b) for a, b in (*pairs, *held_out))


def content(path) -> tuple:
    tensors, metadata = load_tensors(path)
    return {name: tensor.tolist() for name, tensor in tensors.items()}, metadata


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bank that a run has left, and its result."""
    folder = tmp_path_factory.mktemp("bank") / "whole"
    result = quantize(folder)
    return folder / run_folder.IMAGES, result


def test_a_run_leaves_its_bank(whole):
    path, result = whole
    assert names(path.parent) == {run_folder.IMAGES}
    tensors = load_file(path)
    assert {name: tuple(images.shape) for name, images in tensors.items()} == {
        "images": (10, 3, 8, 8), "held_out": (3, 3, 8, 8),
    }  # fmt: skip
    assert torch.equal(tensors["held_out"], result.held_out_images[0])


@pytest.mark.parametrize("method", ["gdfq", "mse"])
def test_a_later_run_takes_it_and_computes_the_same(method, whole, tmp_path, monkeypatch):
    settings = {"method": method, "calibration__images": "inverted", "images__source": "inverted"}
    made = quantize(tmp_path / "made", **settings)
    monkeypatch.setattr(inversion, "invert", None)
    assert same(made, quantize(tmp_path / "taken", images__file=str(whole[0]), **settings))
    assert names(tmp_path / "taken") == set()


class Kill(BaseException):
    pass


@pytest.mark.parametrize("moment", [12, *(pytest.param(other, marks=pytest.mark.long) for other in (2, 3, 4, 20, 21))])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(moment, whole, tmp_path, monkeypatch):
    """Three iterations a part, and before and behind every file that is written: five moments, and two of the whole."""
    moments = iter(range(100))

    def count() -> None:
        if next(moments) == moment:
            raise Kill

    misfit, save = inversion.misfit, bank.save_tensors
    made = []

    def killed_misfit(*args):
        count()
        return misfit(*args)

    def killed_save(path, *args):
        count()
        save(path, *args)
        made.append(path.name)
        count()

    monkeypatch.setattr(inversion, "misfit", killed_misfit)
    monkeypatch.setattr("gdfq.run.bank.save_tensors", killed_save)
    with pytest.raises(Kill):
        quantize(tmp_path / "run")
    parts = len([name for name in made if name != run_folder.IMAGES])
    calls = []
    monkeypatch.setattr(inversion, "misfit", lambda *args: calls.append(0) or misfit(*args))
    monkeypatch.setattr("gdfq.run.bank.save_tensors", save)
    assert same(quantize(tmp_path / "run", resume=True), whole[1])
    assert len(calls) == 3 * (4 - parts)
    assert names(tmp_path / "run") == {run_folder.IMAGES}
    assert content(tmp_path / "run" / run_folder.IMAGES) == content(whole[0])


def test_parts_of_other_settings_are_made_anew(whole, tmp_path):
    other = quantize(tmp_path / "other", inversion__batch_size=5)
    (tmp_path / "run").mkdir()
    for name in (run_folder.IMAGES, run_folder.IMAGES_PART.format(1)):
        (tmp_path / "run" / name).write_bytes(whole[0].read_bytes())
    assert same(quantize(tmp_path / "run", inversion__batch_size=5), other)


def test_a_file_of_another_network_is_taken_and_said(whole):
    with pytest.warns(UserWarning, match=r"made for a network with other weights"):
        result = quantize(model=network(1), images__file=str(whole[0]))
    assert result.report.fit.layers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(images__file=str(whole[0]))


@pytest.fixture(scope="module")
def read():
    """`read(path)` is the bank in a file."""
    captured = capture(network())
    teacher = build_teacher(captured)
    return lambda path: stored_bank(path, teacher, captured, Config.load("cifar"), torch.device("cpu"))


def test_of_a_file_that_does_not_say_it_the_last_eighth_is_held_out(read, tmp_path):
    images = torch.randn(17, 3, 8, 8)
    save_file({"images": images}, tmp_path / "own.safetensors")
    bank = read(tmp_path / "own.safetensors")
    assert torch.equal(bank.bank, images[:14])
    assert torch.equal(next(bank.held_out()), images[14:])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"images": torch.randn(8, 1, 8, 8)}, ["(1, 8, 8)", "(3, 8, 8)"]),
        ({"images": torch.randn(8, 3, 9, 8)}, ["(3, 9, 8)", "(3, 8, 8)"]),
        ({"images": torch.randn(0, 3, 8, 8)}, ["too few images"]),
        ({"images": torch.randn(1, 3, 8, 8)}, ["too few images"]),
        ({"images": torch.randn(8, 3, 8, 8), "held_out": torch.randn(0, 3, 8, 8)}, ["too few images"]),
        ({"images": torch.randn(8, 3, 8, 8), "held_out": torch.randn(1, 3, 4, 4)}, ["(3, 4, 4)"]),
        ({"images": torch.full((8, 3, 8, 8), torch.nan)}, ["NaN or Inf"]),
        ({"images": torch.tensor(1.0)}, ["(N, C, H, W)", "shape ()"]),
        ({"images": torch.randn(3, 8, 8)}, ["(N, C, H, W)", "shape (3, 8, 8)"]),
        ({"images": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)}, ["float tensor", "uint8"]),
        ({"conv.weight": torch.randn(8, 3, 8, 8)}, ["no bank of images", "'images'"]),
    ],
)
def test_what_is_no_bank_of_the_model_is_refused(tensors, words, read, tmp_path):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(GdfqError) as error:
        read(tmp_path / "bad.safetensors")
    assert all(word in str(error.value) for word in ["bad.safetensors", *words]), str(error.value)


def test_files_that_are_not_there_or_broken(read, tmp_path, whole):
    with pytest.raises(GdfqError, match=r"no such file: .*missing"):
        quantize(images__file=str(tmp_path / "missing"))
    (tmp_path / "half").write_bytes(whole[0].read_bytes()[:1000])
    with pytest.raises(GdfqError, match=r"half is truncated or is not a safetensors file"):
        read(tmp_path / "half")


@pytest.mark.parametrize("method", ["minmax", "zeroq", "dfq"])
def test_methods_that_have_images_of_their_own_take_no_file(method, whole):
    with pytest.raises(GdfqError, match=rf"images.file.*gdfq.*but the method is '{method}': leave it out"):
        quantize(images__file=str(whole[0]), method=method)


def test_two_kinds_of_images_are_one_too_many(whole):
    config = Config.load("cifar", SHORT | {"method": "mse", "images.file": str(whole[0])})
    with pytest.raises(GdfqError, match=r"both a bank.*--calibration-data.*leave one out"):
        gdfq.quantize(network(), config, calibrate_on=[torch.zeros(3, 8, 8)], progress=False)


def test_from_the_command_line(gdfq, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole[0].parent)
    settings = [f"--set={name}={value}" for name, value in SHORT.items() if name != "method"]
    quantize = ["quantize", "--method", "squant", *settings, "--out", tmp_path / "run"]
    model = f"{__file__.replace('test_stored_bank', 'small_models')}:Plain"
    code, _, err = gdfq(*quantize, "--model", model, "--images", run_folder.IMAGES)
    assert code == 0, err
    assert f"images of {whole[0]}" in err
    report = json.loads((tmp_path / "run" / run_folder.REPORT).read_text())
    assert (report["config"]["images"]["file"], report["data_free"]["images"]) == (str(whole[0]), 3)
    code, _, err = gdfq("quantize", "--resume", tmp_path / "run")
    assert code == 0, err


@pytest.fixture
def drawn(tmp_path):
    """`drawn(name, **settings)`: the bank that a method takes in the run folder of that name."""
    banks = []

    def run(task):
        bank = bank_of(task)
        banks.append(bank)
        calibrate(task.student, bank.calibration())
        return Outcome(bank.held_out(), 0.0)

    before = dict(METHODS)
    Method("toy", "takes a bank", run, source="generator")

    def bank_of_run(name, **settings):
        quantize(tmp_path / name, method="toy", images__bank=12, **settings)
        return banks.pop()

    yield bank_of_run
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("source", ["generator", "qimera", "gaussian"])
def test_a_bank_is_drawn_from_a_source_that_has_none(source, drawn, tmp_path):
    settings = {"images__source": source, "images__transforms": {"low_pass": {"cutoff": 1.0}}}
    bank = drawn("run", **settings)
    (held_out,) = bank.held_out()
    assert (len(bank.bank), len(held_out)) == (12, 12)
    assert len(torch.cat([bank.bank, held_out]).flatten(1).unique(dim=0)) == 24
    path = tmp_path / "run" / run_folder.IMAGES
    torch.testing.assert_close(LowPass(1.0)(load_file(path)["images"]), bank.bank, rtol=1e-4, atol=1e-5)
    again = drawn("again", images__file=str(path), **settings)
    assert torch.equal(again.bank, bank.bank)
    assert torch.equal(next(again.held_out()), held_out)


def test_a_generators_bank_is_of_one_that_has_learned(drawn):
    settings = {"schedule__warmup_epochs": 3, "schedule__iterations": 10}
    distances = [
        mean_distances(fit(bank.teacher, [bank.bank], Pixels.standardized(3)).layers)[0]
        for bank in (drawn(str(rate), generator__learning_rate=rate, **settings) for rate in (1e-9, 1e-2))
    ]
    assert distances[1] < distances[0]
