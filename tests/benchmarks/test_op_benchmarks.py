"""`benchmarks.ops`: the providers compute the same, the files are written, a wrong argument gives one clear message."""

import csv
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gdfq_ext
from benchmarks.ops import __main__ as ops
from benchmarks.ops import measure, output, peers, shapes, timing
from benchmarks.ops.case import DTYPES, LAYOUTS, Case, Problem
from benchmarks.ops.operations import OPERATIONS, SeparateQuantizer, disagreement
from benchmarks.step_providers import Gdfq, new_task
from gdfq.provenance import provenance

LIBRARIES = tuple(name for name in peers.LIBRARIES if peers.why_missing(name) is None)
CASES = [
    (operation, dtype, layout)
    for operation in OPERATIONS
    for dtype in (DTYPES if OPERATIONS[operation].low_precision else ["fp32"])
    for layout in (LAYOUTS if OPERATIONS[operation].layouts else ["nchw"])
]
FLOAT32_ONLY = {("eager", "fake_quantize_weight"), ("eager", "fake_quantize_weights")}


@pytest.fixture
def bench(capsys):
    """Run the command in this process: `bench(*arguments)` gives exit code, standard output, standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        code = ops.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(("operation", "dtype", "layout"), CASES)
def test_every_provider_agrees_with_ours(operation, dtype, layout, monkeypatch):
    # What torch.compile gives for these functions is its own tests' business, and takes minutes.
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr("benchmarks.ops.operations.RESNET18_WEIGHTS", [(8, 4, 3), (6, 8, 1)])
    case = OPERATIONS[operation].build(Problem((3, 8, 7, 5), DTYPES[dtype], LAYOUTS[layout], libraries=LIBRARIES))
    assert {"compile", "ours"} < set(case.providers)
    for provider in case.providers:
        if dtype == "bf16" and (provider, operation) in FLOAT32_ONLY:
            continue
        for direction in {"forward", OPERATIONS[operation].directions[-1]}:
            assert disagreement(case, provider, direction, DTYPES[dtype]) is None, (provider, direction)


@pytest.mark.slow
def test_what_torch_compile_makes_agrees_with_ours():
    case = OPERATIONS["batch_norm_act_fake_quantize"].build(Problem((3, 8, 7, 5)))
    assert disagreement(case, "compile") is None
    assert disagreement(case, "compile", "both") is None


def test_the_separate_quantizer_ends_in_no_conversion_that_changes_nothing():
    """torch.compile of PyTorch 2.11 would lose its gradient."""
    called = []

    class Note(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    for dtype in (torch.float32, torch.bfloat16):
        x, bounds = torch.randn(8, dtype=dtype), torch.tensor([-1.0, 1.0])
        called.clear()
        with Note():
            y = SeparateQuantizer.forward(SimpleNamespace(), x, bounds[:1], bounds[1:], 4, False)
        assert y.dtype == dtype
        assert (torch.Tensor.to in called) == (dtype != torch.float32)


def test_a_disagreement_is_found():
    x = torch.linspace(-1, 1, 1000)
    case = Case({"ours": lambda: x, "wrong": lambda: x * 1.01, "nan": lambda: x / 0 * 0}, [], 1, 1)
    assert "differs from ours by up to 0.01" in disagreement(case, "wrong")
    assert disagreement(case, "nan") is not None
    quantized = Case({"ours": lambda: x, "wrong": lambda: x.where(x < 0.99, x - 2)}, [], 1, 1, step=1.0)
    assert disagreement(quantized, "wrong") is not None


def test_table_json_csv_and_pictures(bench, tmp_path):
    arguments = ["--device", "cpu", "--op", "fake_quantize", "--op", "observe_range", "--provider", "released"]
    arguments += ["--provider", "eager", "--provider", "ours", "--mb", "0.05", "--rounds", "2", "--out", tmp_path]
    code, out, err = bench(*arguments)
    assert (code, err) == (0, "")
    for words in ("fake_quantize", "observe_range", "resnet20-16x32 0.05 MB", "best peer", torch.__version__):
        assert words in out
    result = json.loads((tmp_path / "results.json").read_text())
    assert len(result["rows"]) == 3 * 2 * (3 + 1)  # providers, caches, directions
    for row in result["rows"]:
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3)
        assert row["best_peer"] in {"released", "eager", "ours"} - {row["provider"]}
    with (tmp_path / "results.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [row["provider"] for row in table] == [row["provider"] for row in result["rows"]]
    assert {row["torch"] for row in table} == {torch.__version__}
    assert "fake_quantize" in (tmp_path / "results.txt").read_text()
    for picture in ("speedup.png", "bandwidth.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    code, out, _ = bench(*arguments[:-2], "--json")
    assert code == 0
    assert json.loads(out)["plan"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "convolution"], "--op convolution is not known; allowed are conditional_batch_norm_act,"),
        (["--provider", "tensorrt"], "--provider tensorrt is not known; allowed are released,"),
        (["--dtype", "int8"], "allowed are fp32, bf16"),
        (["--layout", "nhwc"], "allowed are channels_last, nchw"),
        (["--layer", "alexnet"], "allowed are resnet20-16x32"),
        (["--rounds", "0"], "--rounds is 0; allowed is a number above 0"),
        (["--mb", "-1"], "--mb is -1.0; allowed is a number above 0"),
        (["--device", "tpu"], "--device tpu is not known; allowed are auto, cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
    ],
)
def test_wrong_arguments(bench, arguments, words):
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_missing_library_is_left_out_with_the_reason(bench, monkeypatch):
    monkeypatch.setitem(peers.LIBRARIES, "brevitas", "no_such_module")
    peers.why_missing.cache_clear()
    code, out, _ = bench(
        "--device", "cpu", "--op", "observe_range", "--mb", "0.01", "--rounds", "1", "--provider", "brevitas",
        "--provider", "ours",
    )  # fmt: skip
    peers.why_missing.cache_clear()
    assert code == 0
    assert "left out: brevitas: ModuleNotFoundError: No module named 'no_such_module'" in out


def test_a_failing_operation_is_named_and_the_others_are_measured(bench, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(gdfq_ext, "observe_range", broken)
    arguments = ["--device", "cpu", "--mb", "0.01", "--rounds", "1", "--provider", "ours"]
    code, out, err = bench(*arguments, "--op", "observe_range", "--op", "fake_quantize")
    assert code == 1
    assert "fake_quantize" in out
    assert "failed: observe_range, resnet20-16x32 0.01 MB, fp32, nchw: RuntimeError: no kernel image\n" in out
    assert err.startswith("1 cases failed, the first: observe_range")


def test_a_run_stops_when_its_time_is_up():
    run = measure.Run(measure.plan(device="cpu", providers=["ours"], megabytes=[0.01], rounds=1, minutes=1e-9))
    assert list(run.measure()) == []
    assert "the time was up" in run.left_out["the rest"]


def test_what_makes_no_difference_is_measured_once():
    what = measure.plan(device="cpu", full=True)
    items = measure.items(what)
    assert [item.operation for item in items].count("bns_loss") == 1
    assert [item.operation for item in items].count("fake_quantize_weights") == len(DTYPES)
    assert [item.operation for item in items].count("fake_quantize") == 4 * len(what.shapes)


def test_a_run_on_a_gpu_begins_with_what_a_run_that_is_cut_off_must_have(monkeypatch):
    """The trainer's layout, at one size in both types, with the operations in order."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cases = [
        (item.operation, item.shape.layer, item.dtype) for item in measure.items(measure.plan(device="cuda"))
        if item.layout == "channels_last"
    ]  # fmt: skip
    low = [name for name in OPERATIONS if OPERATIONS[name].low_precision]
    first = [
        (name, "resnet18-64x56", dtype) for dtype, names in (("fp32", OPERATIONS), ("bf16", low)) for name in names
    ]
    assert cases[: len(first)] == first
    assert {layer for _, layer, _ in cases[len(first) : len(first) + 3]} == {"resnet50-256x56"}
    layouts = [item.layout for item in measure.items(measure.plan(device="cuda"))]
    assert layouts == sorted(layouts)  # channels_last before nchw
    asked = measure.items(measure.plan(device="cpu", dtypes=["bf16", "fp32"], layouts=["nchw", "channels_last"]))
    assert [(item.layout, item.dtype) for item in asked[:1] + asked[-1:]] == [
        ("nchw", "bf16"),
        ("channels_last", "fp32"),
    ]


@pytest.mark.long
def test_operations_are_in_the_order_of_their_weight_in_an_iteration():
    """Of ResNet-18 in a batch of 16: the bytes of all that goes into them and comes out, forward and backward."""
    moved, size = Counter(), 32  # of 224, where activations are 49 times as large

    class Weigh(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func.namespace == "gdfq_ext":
                tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
                name = func.__name__.split(".")[0].removesuffix("_backward")
                for tensor in tensors:
                    is_activation = tensor.dim() == 4 and OPERATIONS[name].layouts
                    moved[name] += tensor.nbytes * ((224 / size) ** 2 if is_activation else 1)
            return results

    trainer = Gdfq(new_task("pytorchcv:resnet18", size, preset="imagenet", batch=16)).trainer
    with Weigh():
        trainer.step()
    assert list(OPERATIONS)[: len(moved)] == [name for name, _ in moved.most_common()]
    assert moved["conditional_batch_norm_act"] == pytest.approx(1680e6, rel=0.01)
    assert moved["fake_quantize_weights"] == pytest.approx(93e6, rel=0.01)


def test_the_overview_has_all_directions_of_an_operation_in_a_line():
    def row(provider, direction, us, cache="cold", **changes):
        row = {
            "op": "fake_quantize", "on": "resnet18-64x56 64 MB", "dtype": "bf16", "layout": "channels_last",
            "direction": direction, "cache": cache, "provider": provider, "median_us": us, "share_of_copy": 0.5,
            "over_ours": us / 40, "best_peer": "eager", "best_peer_over_this": 1.25,
        }  # fmt: skip
        return row | changes

    rows = [row("ours", "forward", 40.0), row("compile", "forward", 60.0), row("eager", "forward", 50.0)]
    rows += [row("ours", "forward", 7.0, cache="warm"), row("ours", "both", 123.4, share_of_copy=None, best_peer=None)]
    rows[-1]["best_peer_over_this"] = None
    facts = {**provenance(1), "backend": "loaded", "left_out": {"the rest": "2 cases"}, "failed": ["bns_loss: broken"]}
    lines = output.overview({**facts, "rows": rows}).splitlines()
    place = lines.index("resnet18-64x56 64 MB, bf16, channels_last")
    assert lines[place - 1].split()[:6] == ["forward", "us", "copy", "compile", "best", "backward"]
    assert lines[place + 1].split() == ["fake_quantize", "40.0", "50%", "1.50", "1.25", "123", "-", "-", "-"]
    assert lines[place + 1].index("123") > lines[place - 1].index("best", lines[place - 1].index("backward"))
    assert lines[place + 2 : place + 5] == ["left out: the rest: 2 cases", "failed: bns_loss: broken", "ours: loaded"]


def test_shapes_have_the_size_that_is_asked_for():
    for layer in shapes.LAYERS:
        batch, *image = shapes.Shape(layer, 256).of(4)
        assert tuple(image) == shapes.LAYERS[layer]
        assert batch * image[0] * image[1] * image[2] * 4 == pytest.approx(256e6, rel=0.03)
    assert len(shapes.RESNET18_WEIGHTS) == 20


def test_a_cold_turn_is_one_call_and_a_warm_turn_several():
    clock, calls = timing.CpuClock(), []
    subject = timing.Subject(lambda: calls.append(1), repeats=5, host_seconds=0.0)
    assert clock.turn(subject, cold=True)() > 0
    assert len(calls) == 1
    assert clock.turn(subject, cold=False)() > 0
    assert len(calls) == 1 + 1 + 5
