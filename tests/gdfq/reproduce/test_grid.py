"""What a grid runs, keeps, takes over and leaves out; quantizing itself is replaced, so that calls can be counted."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from gdfq.demo import teacher
from gdfq.errors import GdfqError
from gdfq.models import load_model
from gdfq.reproduce import grid as grid_module
from gdfq.reproduce import sources
from gdfq.reproduce.grid import Grid
from gdfq.run.training_run import Stopped


class Quantizer:
    """In place of `gdfq.quantize`: says that it was called, and fails, stops or returns the float model."""

    def __init__(self) -> None:
        self.calls = []
        self.raises: dict[int, BaseException] = {}  # by the number of the call

    def __call__(self, model, config, *, run_dir, resume, calibrate_on, train_on, progress, source):
        self.calls.append(SimpleNamespace(**locals()))
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
        if len(self.calls) in self.raises:
            raise self.raises[len(self.calls)]
        report = {
            "data_free": {"top1": 90.0, "kl": 0.1, "images": 2}, "choice": None, "selected": "trained",
            "iterations": "eager", "seconds": 2.0, "versions": {}, "config": config.model_dump(mode="json"),
        }  # fmt: skip
        trained = config.method in ("gdfq", "finetune")
        choice = {name: torch.zeros_like(value) for name, value in model.state_dict().items()} if trained else None
        return SimpleNamespace(model=model, choice_state=choice, report=SimpleNamespace(to_dict=lambda: report))


@pytest.fixture
def quantizer(monkeypatch):
    replacement = Quantizer()
    monkeypatch.setattr(grid_module, "quantize", replacement)
    return replacement


@pytest.fixture(autouse=True)
def _few_images(few_shipped_images):
    pass


def offline(name, out, **options):
    return Grid(name, out, is_offline=True, **options)


def test_every_cell_and_seed_is_run_once_and_recorded(quantizer, tmp_path):
    result = offline("table1", tmp_path, seeds=(3, 5)).run()
    assert [(call.config.method, call.config.run.seed) for call in quantizer.calls] == [
        (method, seed) for method in ("finetune", "zeroq", "gdfq") for seed in (3, 5)
    ]
    assert len(list((tmp_path / "cells").iterdir())) == 6
    finetuned, zeroq, ours = result["cells"]
    float_top1 = ours["summary"]["float"]
    assert zeroq["summary"]["top1"] == float_top1 > 50
    assert (zeroq["summary"]["choice"], zeroq["summary"]["seconds"]) == (None, 2)
    assert finetuned["summary"]["choice"] < float_top1  # the weights there are zeros
    assert [result["seed"] for result in ours["results"]] == [3, 5]
    record = json.loads(next((tmp_path / "cells").glob("*gdfq*seed3.json")).read_text())
    assert record["config"]["run"]["seed"] == 3
    assert record["test_images"] == 20
    assert record["provenance"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "table1.json").read_text()) == result
    assert "90.25 ± 0.30" in (tmp_path / "table1.md").read_text()


def test_real_images_go_to_the_methods_that_need_them(quantizer, tmp_path):
    offline("table1", tmp_path).run()
    finetune, zeroq, ours = quantizer.calls
    assert [len(finetune.train_on), finetune.calibrate_on] == [30, None]
    assert [zeroq.train_on, zeroq.calibrate_on, ours.train_on, ours.calibrate_on] == [None] * 4
    assert zeroq.run_dir is None
    assert finetune.run_dir != ours.run_dir
    offline("table5", tmp_path, number=1).run()
    assert quantizer.calls[-1].config.method == "mse"
    assert [len(quantizer.calls[-1].calibrate_on), quantizer.calls[-1].train_on] == [30, None]


def test_resume_skips_what_is_finished_and_nothing_is_taken_over_without_it(quantizer, tmp_path):
    first = offline("table1", tmp_path).run()
    with pytest.raises(GdfqError, match=r"already holds 3 of the 3 results.*--resume"):
        offline("table1", tmp_path).run()
    assert offline("table1", tmp_path).run(resume=True) == first
    assert len(quantizer.calls) == 3
    offline("table1", tmp_path, seeds=(0, 1)).run(resume=True)
    assert len(quantizer.calls) == 6


def test_one_cell_per_process_and_then_the_table(quantizer, tmp_path):
    assert offline("table3", tmp_path, number=2).run()["cells"][0]["results"] == []
    for number in (1, 3):
        result = offline("table3", tmp_path, number=number).run()
    assert [len(cell["results"]) for cell in result["cells"]] == [1, 1, 1]
    assert len(quantizer.calls) == 3


def test_tasks_share_a_table(quantizer, tmp_path):
    assert [list(offline("table1", tmp_path, shard=f"{task}/2").chosen) for task in (1, 2)] == [[1, 3], [2]]
    for _ in range(2):  # the second time as when tasks are requeued
        result = offline("table1", tmp_path, shard="1/2").run(resume=True)
        assert [len(cell["results"]) for cell in result["cells"]] == [1, 0, 1]
        assert "Not all there yet: cell 2." in (tmp_path / "table1.md").read_text()
    assert offline("table1", tmp_path, shard="5/5").run(resume=True)["missing"] == [2]  # more tasks than cells
    assert offline("table1", tmp_path, shard="2/2").run(resume=True)["missing"] == []
    assert "Not all" not in (tmp_path / "table1.md").read_text()
    assert [call.config.method for call in quantizer.calls] == ["finetune", "gdfq", "zeroq"]


def test_ranks_have_a_share_each_and_the_first_one_hears_of_all(quantizer, tmp_path, monkeypatch):
    """Without a process group; `test_ranks.py` has one."""
    others = {"no weights": [1]}, {"cell 3, seed 0": "NaN"}
    second = SimpleNamespace(
        rank=lambda: 1, count=lambda: 2, together=nullcontext, alone=nullcontext,
        gathered=lambda own: [others, own], from_first=lambda make: make(),
    )  # fmt: skip
    monkeypatch.setattr(grid_module, "ranks", second)
    quantizer.raises = {2: GdfqError("too large")}
    said = []
    grid = offline("table1", tmp_path, seeds=(0, 1))
    grid.run(say=said.append)
    assert [(call.config.method, call.config.run.seed) for call in quantizer.calls] == [("zeroq", 0), ("zeroq", 1)]
    assert grid.failed == {"cell 3, seed 0": "NaN", "cell 2, seed 1": "too large"}
    assert said[0].startswith("rank 1 of 2: table1: cell 2 of 3, seed 0: ")
    assert said[-3:] == [
        "left out cell 1: no weights", "failed: cell 3, seed 0: NaN", "failed: cell 2, seed 1: too large",
    ]  # fmt: skip


def test_what_another_task_finishes_while_a_table_is_written_is_in_it(quantizer, tmp_path, monkeypatch):
    second = offline("table1", tmp_path, shard="2/2")
    write, written = grid_module.write_text, []

    def slow(path, text):
        written.append(path.name)
        if written == ["table1.json"]:  # just before the first task writes it
            second._run_cell(2, 0, False)
        write(path, text)

    first = offline("table1", tmp_path, shard="1/2")
    monkeypatch.setattr(grid_module, "write_text", slow)
    first.write()
    assert [len(cell["results"]) for cell in json.loads((tmp_path / "table1.json").read_text())["cells"]] == [0, 1, 0]


def test_tables_share_what_they_have_in_common(quantizer, tmp_path):
    offline("table2", tmp_path).run()
    shared = offline("table3", tmp_path).run(resume=True)
    assert len(quantizer.calls) == 4 + 2
    assert all(cell["results"] for cell in shared["cells"])


@pytest.mark.parametrize(
    "changed", [{"scale": 0.5}, {"settings": {"schedule.iterations": 3}}, {"seeds": (1,)}, {"number": 2}]
)
def test_results_of_another_recipe_are_other_results(quantizer, changed, tmp_path):
    offline("table3", tmp_path, number=1).run()
    offline("table3", tmp_path, **{"number": 1, **changed}).run()
    assert len(quantizer.calls) == 2


def test_where_and_how_a_run_is_carried_out_does_not_make_another_result(quantizer, tmp_path):
    offline("table3", tmp_path).run()
    offline("table3", tmp_path, settings={"run.device": "cpu", "run.checkpoint_every": 7}).run(resume=True)
    assert len(quantizer.calls) == 3


@pytest.mark.parametrize("interruption", [Stopped("by the run"), KeyboardInterrupt()])
def test_an_interrupted_grid_keeps_what_is_finished_and_goes_on(quantizer, interruption, tmp_path):
    quantizer.raises[2] = interruption
    with pytest.raises(Stopped, match=r"stopped in cell 2 of table3, seed 0.*--resume"):
        offline("table3", tmp_path).run()
    written = json.loads((tmp_path / "table3.json").read_text())
    assert [len(cell["results"]) for cell in written["cells"]] == [1, 0, 0]
    with pytest.raises(GdfqError, match="already holds 2 of the 3"):
        offline("table3", tmp_path).run()
    offline("table3", tmp_path).run(resume=True)
    assert [call.resume for call in quantizer.calls] == [False, False, True, False]
    assert quantizer.calls[1].run_dir == quantizer.calls[2].run_dir


def test_a_cell_that_fails_does_not_keep_others_from_running(quantizer, tmp_path):
    quantizer.raises[1] = GdfqError("KL became NaN")
    said = []
    grid = offline("table3", tmp_path)
    result = grid.run(say=said.append)
    assert [len(cell["results"]) for cell in result["cells"]] == [0, 1, 1]
    assert grid.failed == {"cell 1, seed 0": "KL became NaN"}
    assert said[-1] == "failed: cell 1, seed 0: KL became NaN"


def test_defects_of_ours_are_not_swallowed(quantizer, tmp_path):
    quantizer.raises[1] = RuntimeError("a defect")
    with pytest.raises(RuntimeError, match="a defect"):
        offline("table3", tmp_path).run()


def test_a_damaged_result_is_named(quantizer, tmp_path):
    offline("table3", tmp_path, number=1).run()
    next((tmp_path / "cells").iterdir()).write_text("{")
    with pytest.raises(GdfqError, match=r"cells/.*cannot be read.*delete it"):
        offline("table3", tmp_path).run(resume=True)


# --- what is missing ---------------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """pytorchcv finds nothing and can load nothing down; the networks that it was asked for."""
    asked = []

    def load(spec, weights=None, **options):
        if options.get("pretrained"):
            asked.append(spec)
            raise GdfqError(f"the factory {spec} failed: no route to host")
        return load_model(spec, weights, **options)

    monkeypatch.setattr(sources, "load_model", load)
    monkeypatch.setattr(sources, "PYTORCHCV_CACHE", tmp_path / "torch-models")
    return asked


def test_one_message_for_each_thing_that_is_missing(quantizer, downloads, cifar10, tmp_path):
    with pytest.raises(GdfqError) as error:
        Grid("table1", tmp_path / "out", data=[f"cifar10={cifar10}"]).run()
    lines = str(error.value).splitlines()
    assert lines[0] == "no cell of table1 could be run"
    assert len(lines) == 1 + 5 + 2  # weights of five networks, images of CIFAR-100 and ImageNet
    assert lines[1].startswith("left out cells 1, 2, 3: no weights of resnet20_cifar10: put resnet20_cifar10-0597-")
    assert "torch-models" in lines[1]
    assert "--weights resnet20_cifar10=FILE" in lines[1]
    assert "no route to host" in lines[1]
    assert any(
        line.startswith(
            "left out cells 7, 8, 9, 10, 11, 12, 13, 14, 15: give the images of imagenet as --data imagenet"
        )
        for line in lines
    )
    assert downloads == ["pytorchcv:resnet20_cifar10"]  # once, and not for networks without images
    assert not quantizer.calls


def test_what_is_there_is_run_and_the_rest_said(quantizer, downloads, cifar10, resnet20_weights, tmp_path):
    said = []
    grid = Grid("table4", tmp_path, data=[f"cifar10={cifar10}"], weights=[f"resnet20_cifar10={resnet20_weights}"])
    result = grid.run(say=said.append)
    assert [len(cell["results"]) for cell in result["cells"]] == [1, 1, 0, 0]
    assert [line.split(":")[0] for line in said[2:]] == ["left out cells 3, 4"] * 2
    assert quantizer.calls[0].source == {
        "model": "pytorchcv:resnet20_cifar10", "weights": str(resnet20_weights), "model_args": [],
    }  # fmt: skip
    assert not downloads


def test_other_weights_are_other_results(quantizer, downloads, cifar10, resnet20_weights, tmp_path):
    def run(weights):
        return Grid("table4", tmp_path, data=[f"cifar10={cifar10}"], weights=[f"resnet20_cifar10={weights}"], number=2)

    run(resnet20_weights).run()
    state = load_model("pytorchcv:resnet20_cifar10").state_dict()
    save_file(state, tmp_path / "others.safetensors")
    run(tmp_path / "others.safetensors").run()
    assert len(quantizer.calls) == 2


def test_training_images_are_missed_where_they_are_needed_alone(
    quantizer, downloads, cifar10, resnet20_weights, tmp_path
):
    (cifar10 / "data_batch_3.bin").unlink()
    grid = Grid(
        "table1", tmp_path, data=[f"cifar10={cifar10}"], weights=[f"resnet20_cifar10={resnet20_weights}"],
        models=["resnet20_cifar10"],
    )  # fmt: skip
    said = []
    result = grid.run(say=said.append)
    assert [len(cell["results"]) for cell in result["cells"]] == [0, 1, 1]
    assert said[-1].startswith("left out cell 1: ")
    assert "data_batch_3" in said[-1]


def test_listing_names_cells_and_what_they_lack_and_runs_nothing(quantizer, downloads, tmp_path):
    offline("table3", tmp_path, number=2).run()
    listed = offline("table3", tmp_path).listing()
    assert [(cell["number"], cell["row"], cell["finished_seeds"]) for cell in listed["cells"]] == [
        (1, "CE", []), (2, "KD", [0]), (3, "CE and KD", []),
    ]  # fmt: skip
    assert listed["lacking"] == {}
    lacking = Grid("table8", tmp_path, models=["shufflenet_g1_w1"]).listing()["lacking"]
    assert list(lacking.values()) == [[9, 10, 11, 12]] * 2
    assert any("shufflenet_g1_w1-1389-4cfb65a3.pth" in reason for reason in lacking)
    assert not downloads
    assert len(quantizer.calls) == 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("table0", {}, ["table0", "figure1", "table9"]),
        ("table1", {"is_offline": True, "data": ["cifar10=."]}, ["--offline", "--data"]),
        ("table1", {"data": ["nowhere"]}, ["--data nowhere", "NAME=PATH", "cifar10, cifar100, imagenet"]),
        ("table1", {"data": ["mnist=."]}, ["--data mnist=.", "cifar10"]),
        ("table2", {"data": ["nowhere"]}, ["--data nowhere", "there is no nowhere"]),
        ("table2", {"data": ["cifar100=.", "."]}, ["cifar100 is given twice"]),
        ("table2", {"weights": ["resnet18=."]}, ["--weights resnet18=.", "resnet20_cifar100"]),
        ("table1", {"models": ["resnet20"]}, ["--models resnet20", "resnet20_cifar10"]),
        ("table2", {"number": 5}, ["--cell 5", "cells 1, 2, 3, 4"]),
        *(("table2", {"shard": shard}, [f"--shard {shard}", "I/N"]) for shard in ("3", "0/2", "3/2", "-1/2", "a/b")),
        ("table2", {"scale": 0.0}, ["scale is 0.0"]),
        ("table2", {"settings": {"generator.bns_weight": 1}}, ["generator.bns_weight", "table2"]),
        ("table2", {"settings": {"run.seed": 1}}, ["run.seed", "--seeds"]),
        ("table2", {"settings": {"schedule.epochs": -1}}, ["schedule.epochs", "-1"]),
    ],
)
def test_bad_input_is_said_before_anything_runs(quantizer, name, options, words, tmp_path):
    with pytest.raises(GdfqError) as error:
        Grid(name, tmp_path / "out", **options)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "out").exists()


def test_labels_that_do_not_fit_stop_a_cell_before_it_is_trained(quantizer, monkeypatch, tmp_path):
    model = teacher()
    model.output = torch.nn.Linear(64, 5)
    monkeypatch.setattr(sources.Sources, "teacher", lambda self, network: model)
    with pytest.raises(GdfqError, match="knows only 5 classes"):
        offline("table3", tmp_path).run()
    assert not quantizer.calls
