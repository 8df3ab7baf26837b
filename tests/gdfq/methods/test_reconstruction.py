"""Block reconstruction: what it trains, that it helps, and runs that stop, go on, or were told nonsense."""

import json

import pytest
import torch
from recorded_graph import RecordedGraph
from small_models import Plain, Residual, capture_once, randomize_batch_norm
from torch import nn

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import Config
from gdfq.demo import teacher, test_set
from gdfq.evaluate import agreement
from gdfq.graph import build_quantized, build_teacher, quantized_layers
from gdfq.methods import Task
from gdfq.methods.reconstruction import Reconstruction, nearest
from gdfq.nn import activation_quantizers, per_channel
from gdfq.progress import Pace
from gdfq.run import folder as run_folder
from gdfq.train import cuda_graph
from gdfq.train.reconstruct import LearnedRounding
from gdfq_ext import quantizer_grid

SHORT = {
    "method": "reconstruction", "reconstruction.iterations": 8, "reconstruction.batch_size": 8,
    "reconstruction.finetune_iterations": 0,
    "inversion.images": 32, "inversion.batch_size": 16, "inversion.iterations": 4,
}  # fmt: skip


def task_of(model, settings=None, folder=None, device="cpu", progress=False):
    torch.manual_seed(0)
    device = torch.device(device)
    captured = capture_once(model, 8, device)
    config = Config.load("cifar", SHORT | (settings or {}))
    student, _ = build_quantized(captured, config.quantizer)
    images = torch.randn(48, *captured.image_shape).to(device)
    calibrate(student, [images])
    return Task(captured, build_teacher(captured), student, config, device, folder, False, progress, None, None), images


def run(task, images):
    Reconstruction(task, images).run()


def error(task, images):
    with torch.no_grad():
        return (task.student(images) - task.teacher(images)).square().mean().item()


@pytest.mark.parametrize("scheme", ["affine", "symmetric", "eq6"])
def test_a_rounding_begins_as_it_was_given_and_soft(scheme):
    weight = torch.randn(6, 5, 3, 3)
    rows = weight.flatten(1)
    grid = quantizer_grid(rows.amin(1), rows.amax(1), 4, scheme)
    given = torch.randint(0, 2, weight.shape).float()
    learned = LearnedRounding(weight, grid, given, 4, scheme, torch.tensor(2.0))
    assert torch.equal(learned.rounding(), given)
    in_steps = weight / per_channel(grid.step, weight)
    fraction, code = in_steps % 1, in_steps.floor() + per_channel(grid.zero_point, weight)
    inside = (code >= grid.lowest) & (code < grid.highest) & ((fraction - 0.5).abs() < 0.49)
    on_its_side = inside & ((fraction >= 0.5) == (given >= 0.5))
    assert on_its_side.float().mean() > 0.3
    soft = learned(weight)
    torch.testing.assert_close(soft[on_its_side], weight[on_its_side], rtol=1e-4, atol=1e-5)
    on_the_other = inside & ~on_its_side
    mirrored = (in_steps.floor() + 1 - fraction) * per_channel(grid.step, weight)
    torch.testing.assert_close(soft[on_the_other], mirrored[on_the_other], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["onnx", "int4-symmetric", "paper"])
def test_it_lowers_the_error_on_images_that_it_has_not_seen(target):
    settings = {"quantizer.target": target, "quantizer.weight_bits": 3, "quantizer.activation_bits": 4}
    task, images = task_of(Residual, settings | {"reconstruction.iterations": 100})
    others = torch.randn(256, *task.captured.image_shape)
    before = error(task, others)
    parameters = {name: value.clone() for name, value in task.student.named_parameters()}
    run(task, images)
    assert error(task, others) < 0.6 * before
    assert all(torch.equal(value, parameters[name]) for name, value in task.student.named_parameters())
    assert all(layer.is_stored for layer in quantized_layers(task.student))
    for layer in quantized_layers(task.student):
        codes = layer.quantizer.codes(layer.index, task.student.get_parameter(layer.weight))
        lowest, highest = (-3, 3) if target == "int4-symmetric" else (0, 7)
        assert codes.amin() >= lowest
        assert codes.amax() <= highest
    assert all(quantizer.range.isfinite().all() for quantizer in activation_quantizers(task.student).values())


def test_roundings_are_up_or_down_of_the_weight_and_some_have_turned():
    task, images = task_of(Residual, {"reconstruction.iterations": 100, "reconstruction.begin": "nearest"})
    run(task, images)
    turned = count = 0
    for layer in quantized_layers(task.student):
        weight = task.student.get_parameter(layer.weight).detach()
        quantizer = layer.quantizer.stored[str(layer.index)]
        assert set(quantizer.rounding.unique().tolist()) <= {0, 1}
        turned += (quantizer.rounding != nearest(weight, quantizer.grid)).sum().item()
        count += weight.numel()
    assert 0.01 < turned / count < 0.5


@pytest.mark.parametrize("observer", ["moving_average", "learned_step"])
def test_learned_steps_stay_on_the_quantizers(observer):
    task, images = task_of(Residual, {"quantizer.observer": observer})
    before = {name: q.range.clone() for name, q in activation_quantizers(task.student).items()}
    observers = {name: q.observer for name, q in activation_quantizers(task.student).items()}
    run(task, images)
    for name, quantizer in activation_quantizers(task.student).items():
        assert quantizer.observer is observers[name]
        if name.endswith(".x"):  # the image's, which is not learned
            torch.testing.assert_close(quantizer.range, before[name], rtol=1e-3, atol=1e-3)
            continue
        assert not torch.equal(quantizer.range, before[name]), name
        step, zero_point, low, high = quantizer.grid()
        torch.testing.assert_close(
            torch.stack([(low - zero_point) * step, (high - zero_point) * step]), quantizer.range
        )


@pytest.mark.long
def test_a_run_that_stopped_anywhere_ends_as_one_that_did_not(tmp_path):
    settings = {"reconstruction.finetune_iterations": 3}
    whole, images = task_of(Residual, settings)
    run(whole, images)
    for stop_in in (0, 1, 4, 5):  # of five blocks, and behind them
        folder = tmp_path / str(stop_in)
        folder.mkdir()
        task, images = task_of(Residual, settings, folder=folder)
        reconstruction = Reconstruction(task, images)
        train = reconstruction._train

        def killed(block, number, *args, stop_in=stop_in, train=train):
            if number == stop_in:
                raise KeyboardInterrupt
            train(block, number, *args)

        def killed_in_the_end(*args, stop_in=stop_in, finetune=reconstruction._finetune):
            finetune(*args)
            assert stop_in == 5
            raise KeyboardInterrupt

        reconstruction._train, reconstruction._finetune = killed, killed_in_the_end
        with pytest.raises(KeyboardInterrupt):
            reconstruction.run()
        task, images = task_of(Residual, settings, folder=folder)
        again = Reconstruction(task, images)
        assert again.resume() == (stop_in > 0)
        assert again.done == stop_in
        again.run()
        state = whole.student.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in task.student.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "begins"),
    [({}, ""), ({"reconstruction.finetune_iterations": 1}, "until all blocks are trained together: ")],
)
def test_how_long_it_takes_is_said_when_a_block_is_over(capsys, monkeypatch, settings, begins):
    task, images = task_of(Residual, settings)
    clock = iter(range(0, 10**6, 7000))
    monkeypatch.setattr("gdfq.methods.reconstruction.Pace", lambda: Pace(lambda: next(clock)))
    run(task, images)
    assert capsys.readouterr().err == ""
    run(*task_of(Residual, settings, progress=True))
    assert capsys.readouterr().err.splitlines() == [
        f"gdfq: {begins}about 7.8 h to go, 4 blocks of 1.9 h",
        "gdfq: that is long for a CPU: a new run with fewer reconstruction.iterations, or on a GPU, takes less",
    ]


def test_from_files_it_is_the_same():
    in_memory, images = task_of(Residual)
    run(in_memory, images)
    in_files, images = task_of(Residual, {"reconstruction.memory_gib": 1e-4})
    run(in_files, images)
    state = in_memory.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in in_files.student.state_dict().items())


def test_as_graphs_it_is_the_same(monkeypatch):
    monkeypatch.setattr(cuda_graph, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    settings = {"reconstruction.iterations": 6, "reconstruction.finetune_iterations": 5}
    eager, images = task_of(Residual, settings | {"run.cuda_graph": False})
    run(eager, images)
    assert not RecordedGraph.made
    graphs, images = task_of(Residual, settings | {"run.cuda_graph": True})
    run(graphs, images)
    assert [graph.replays for graph in RecordedGraph.made] == [6 - cuda_graph.WARMUP] * 5 + [5 - cuda_graph.WARMUP]
    state = eager.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in graphs.student.state_dict().items())


def test_fine_tuning_begins_at_what_was_reconstructed_and_trains_on():
    settings = {"reconstruction.iterations": 30, "quantizer.weight_bits": 2, "quantizer.activation_bits": 2}
    task, images = task_of(Residual, settings)
    run(task, images)
    x = torch.randn(4, *task.captured.image_shape)
    found = task.student(x)
    still = {f"reconstruction.finetune_{name}": 1e-9 for name in ("learning_rate", "step_learning_rate")}
    tuned, images = task_of(Residual, settings | still | {"reconstruction.finetune_iterations": 1})
    run(tuned, images)
    torch.testing.assert_close(tuned.student(x), found, rtol=1e-4, atol=1e-5)
    tuned, images = task_of(Residual, settings | {"reconstruction.finetune_iterations": 60})
    run(tuned, images)
    before, after = (agreement(each.teacher, each.student, [images]).kl for each in (task, tuned))
    assert after < 0.9 * before


@pytest.mark.long
@pytest.mark.filterwarnings("error:all blocks trained together")
def test_what_is_better_on_real_images_stays(tmp_path):
    """The bank's own images, which each block has learned by heart, would say that it is worse."""
    images = torch.stack([test_set().image(number) for number in range(1000)])
    real, bank = [], None
    for together in (0, 100):
        settings = {
            "quantizer.target": "paper", "inversion.images": 64, "inversion.iterations": 30,
            "reconstruction.iterations": 100, "reconstruction.finetune_iterations": together, "run.seed": 0,
        }  # fmt: skip
        if bank is not None:
            settings["images.file"] = str(bank)
        found = gdfq.quantize(
            teacher(), Config.load("demo", settings), run_dir=tmp_path / str(together), progress=False
        )
        bank = bank or tmp_path / str(together) / run_folder.IMAGES
        with torch.no_grad():
            real.append(agreement(teacher(), found.model.eval(), [images]).kl)
    assert real[1] < 0.9 * real[0]


@pytest.mark.parametrize("rate", [3.0, 1e30])  # the one spoils Q, the other makes all of it NaN
def test_what_fine_tuning_spoils_is_undone(rate):
    settings = {"reconstruction.iterations": 30}
    task, images = task_of(Residual, settings)
    run(task, images)
    names = [f"reconstruction.finetune_{name}" for name in ("learning_rate", "step_learning_rate")]
    tuned, images = task_of(Residual, settings | dict.fromkeys(names, rate) | {"reconstruction.finetune_iterations": 3})
    with pytest.warns(
        UserWarning, match=r"further from P than before \(KL .* undone: lower reconstruction.finetune_lear"
    ):
        run(tuned, images)
    x = torch.randn(4, *task.captured.image_shape)
    assert torch.equal(tuned.student(x), task.student(x))
    state = task.student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tuned.student.state_dict().items())


def test_memory_for_no_batch():
    task, images = task_of(Residual, {"reconstruction.memory_gib": 1e-6})
    with pytest.raises(gdfq.GdfqError, match=r"memory_gib' = 1e-06 holds no batch of 8 images at the block of 'conv1'"):
        run(task, images)


def test_bits_that_leave_nothing_to_train():
    settings = {"quantizer.layers": {"*": "float"}, "quantizer.target": "paper"}
    task, images = task_of(Residual, settings | {"reconstruction.step_learning_rate": 0.0})
    before = task.student(images)
    run(task, images)
    assert not quantized_layers(task.student)
    torch.testing.assert_close(task.student(images), before)
    steps_alone, images = task_of(Residual, settings)
    run(steps_alone, images)
    weights = dict(task.student.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in steps_alone.student.named_parameters())
    assert not torch.equal(steps_alone.student(images), before)


class OneLayer(nn.Module):
    in_size = (8, 8)

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3 * 64, 5)

    def forward(self, x):
        return self.fc(self.bn(x).flatten(1))


@pytest.mark.parametrize("model", [Plain, OneLayer])
def test_a_model_of_one_block_or_two(model):
    task, images = task_of(model, {"reconstruction.iterations": 60})
    before = error(task, images)
    run(task, images)
    assert error(task, images) < before


def test_a_whole_run_its_log_and_its_files(tmp_path):
    torch.manual_seed(0)
    model = randomize_batch_norm(Residual())
    config = Config.load("cifar", SHORT)
    result = gdfq.quantize(model, config, run_dir=tmp_path / "run", progress=False)
    assert result.report.selected == "trained"
    log = [json.loads(line) for line in (tmp_path / "run" / run_folder.LOG).read_text().splitlines()]
    assert [entry["iteration"] for entry in log] == [8, 16, 24, 32, 40]
    assert all(0 < entry["reconstruction/error"] < 1 for entry in log)
    again = gdfq.load_quantized(tmp_path / "run" / run_folder.MODEL, model)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(again(x), result.model(x))
