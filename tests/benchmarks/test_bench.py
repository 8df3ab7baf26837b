"""`gdfq bench`: the providers compute the same, the files are written, and a wrong argument gives one clear message."""

import csv
import json

import pytest
import torch

import gdfq_ext
from gdfq.bench import measure, peers, shapes, timing
from gdfq.bench.operations import DTYPES, LAYOUTS, OPERATIONS, Case, Problem, disagreement

LIBRARIES = tuple(name for name in peers.LIBRARIES if peers.why_missing(name) is None)
CASES = [
    (operation, dtype, layout)
    for operation in OPERATIONS
    for dtype in (DTYPES if OPERATIONS[operation].low_precision else ["fp32"])
    for layout in (LAYOUTS if OPERATIONS[operation].layouts else ["nchw"])
]
FLOAT32_ONLY = {("eager", "fake_quantize_weight"), ("eager", "fake_quantize_weights")}


@pytest.mark.parametrize(("operation", "dtype", "layout"), CASES)
def test_every_provider_agrees_with_ours(operation, dtype, layout, monkeypatch):
    # What torch.compile gives for these functions is its own tests' business, and takes minutes.
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setattr("gdfq.bench.operations.RESNET18_WEIGHTS", [(8, 4, 3), (6, 8, 1)])
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


def test_a_disagreement_is_found():
    x = torch.linspace(-1, 1, 1000)
    case = Case({"ours": lambda: x, "wrong": lambda: x * 1.01, "nan": lambda: x / 0 * 0}, [], 1, 1)
    assert "differs from ours by up to 0.01" in disagreement(case, "wrong")
    assert disagreement(case, "nan") is not None
    quantized = Case({"ours": lambda: x, "wrong": lambda: x.where(x < 0.99, x - 2)}, [], 1, 1, step=1.0)
    assert disagreement(quantized, "wrong") is not None


def test_table_json_csv_and_pictures(gdfq, tmp_path):
    arguments = ["bench", "--device", "cpu", "--op", "fake_quantize", "--op", "observe_range", "--provider", "released"]
    arguments += ["--provider", "eager", "--provider", "ours", "--mb", "0.05", "--rounds", "2", "--out", tmp_path]
    code, out, err = gdfq(*arguments)
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
    for picture in ("speedup.png", "bandwidth.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    code, out, _ = gdfq(*arguments[:-2], "--json")
    assert code == 0
    assert json.loads(out)["plan"]["rounds"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "convolution"], "--op convolution is not known; allowed are fake_quantize,"),
        (["--provider", "tensorrt"], "--provider tensorrt is not known; allowed are released,"),
        (["--dtype", "int8"], "allowed are fp32, bf16"),
        (["--layout", "nhwc"], "allowed are nchw, channels_last"),
        (["--layer", "alexnet"], "allowed are resnet20-16x32"),
        (["--rounds", "0"], "--rounds is 0; allowed is a number above 0"),
        (["--mb", "-1"], "--mb is -1.0; allowed is a number above 0"),
        (["--device", "tpu"], "--device tpu is not known; allowed are auto, cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99 is not there"),
    ],
)
def test_wrong_arguments(gdfq, arguments, words):
    code, out, err = gdfq("bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gdfq: ")
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_missing_library_is_left_out_with_the_reason(gdfq, monkeypatch):
    monkeypatch.setitem(peers.LIBRARIES, "brevitas", "no_such_module")
    peers.why_missing.cache_clear()
    code, out, _ = gdfq(
        "bench", "--device", "cpu", "--op", "observe_range", "--mb", "0.01", "--rounds", "1", "--provider", "brevitas",
        "--provider", "ours",
    )  # fmt: skip
    peers.why_missing.cache_clear()
    assert code == 0
    assert "left out: brevitas: ModuleNotFoundError: No module named 'no_such_module'" in out


def test_a_failing_operation_is_named_and_the_others_are_measured(gdfq, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(gdfq_ext, "observe_range", broken)
    arguments = ["--device", "cpu", "--mb", "0.01", "--rounds", "1", "--provider", "ours"]
    code, out, err = gdfq("bench", *arguments, "--op", "observe_range", "--op", "fake_quantize")
    assert code == 1
    assert "fake_quantize" in out
    assert "failed: observe_range, resnet20-16x32 0.01 MB, fp32, nchw: RuntimeError: no kernel image\n" in out
    assert err.startswith("gdfq: 1 cases failed, the first: observe_range")


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
