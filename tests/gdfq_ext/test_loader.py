"""GDFQ_EXT and the report, in processes of their own, from a copy of the package with no library, or a broken one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gdfq_ext
from gdfq_ext import _stamp
from gdfq_ext._loader import load_library
from gdfq_ext._schemas import SCHEMAS

PACKAGE = Path(gdfq_ext.__file__).parent
USE = """
import torch, gdfq_ext
y = gdfq_ext.fake_quantize(torch.tensor([0.4, 2.6]), torch.zeros(1), torch.tensor([3.0]), 2)
assert y.tolist() == [0.0, 3.0]
report = gdfq_ext.backend_report()
print(report.mode, report.library, {op.backend for devices in report.ops.values() for op in devices.values()})
print(report)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the Python files alone."""
    copy = tmp_path / "gdfq_ext"
    copy.mkdir()
    for source in PACKAGE.glob("*.py"):
        shutil.copy(source, copy)
    return copy


def run(package, mode):
    environment = {name: value for name, value in os.environ.items() if name != "GDFQ_EXT"}
    environment |= {"PYTHONPATH": str(package.parent)} | ({} if mode is None else {"GDFQ_EXT": mode})
    command = [sys.executable, "-c", USE]
    return subprocess.run(command, env=environment, cwd=package.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", [None, "auto"])
def test_without_a_library_the_reference_runs_quietly(package, mode):
    result = run(package, mode)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("auto None {'reference'}")
    assert "no compiled library" in result.stdout
    assert "Warning" not in result.stderr


def test_require_without_a_library_is_an_import_error(package):
    result = run(package, "require")
    assert result.returncode != 0
    assert "ImportError: GDFQ_EXT=require, but no compiled library" in result.stderr


def test_a_broken_library_is_reported_once_and_left_aside(package):
    (package / "_C.abi3.so").write_bytes(b"not a library")
    result = run(package, "auto")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("auto None {'reference'}")
    assert "_C.abi3.so did not load" in result.stdout
    assert result.stderr.count("RuntimeWarning: gdfq_ext runs in pure PyTorch, because _C.abi3.so did not load") == 1


def test_require_with_a_broken_library_is_an_import_error(package):
    (package / "_C.so").write_bytes(b"not a library")
    result = run(package, "require")
    assert result.returncode != 0
    assert "ImportError: GDFQ_EXT=require, but _C.so did not load" in result.stderr


def test_reference_never_touches_the_library(package):
    (package / "_C.so").write_bytes(b"not a library")
    result = run(package, "reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference None {'reference'}")
    assert "GDFQ_EXT=reference asks for pure PyTorch" in result.stdout
    assert "Warning" not in result.stderr


@pytest.mark.parametrize("mode", ["", "native"])
def test_an_unknown_mode_is_refused(package, mode):
    result = run(package, mode)
    assert result.returncode != 0
    assert f"ValueError: GDFQ_EXT={mode!r} is not known; allowed are auto, reference, require" in result.stderr


def test_the_report_covers_every_op_in_words_and_as_data():
    report = gdfq_ext.backend_report()
    data = report.as_dict()
    assert set(data["ops"]) == set(SCHEMAS)
    for name, devices in data["ops"].items():
        assert name in str(report)
        assert set(devices) == {"cpu", "cuda"}
        for choice in devices.values():
            assert choice["backend"] in ("native", "reference")
            assert choice["reason"] in str(report)


COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
SOURCES = {"a.cpp": "int a();", "cpu/a.h": "#pragma once", "kernels/a.cu": "// kernel"}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The folder of the package, still empty, in a checkout with sources of its own."""
    for name, text in SOURCES.items():
        file = tmp_path / "csrc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "gdfq_ext").mkdir()
    monkeypatch.setenv("GDFQ_EXT", "require")
    return tmp_path / "gdfq_ext"


def build(package: Path, code: str = "", name: str = "_C.so", architectures: tuple[str, ...] = (), **stamp) -> Path:
    """A library without operators, with the stamp of the sources beside it."""
    stamp = {
        "sources": _stamp.sources_digest(package.parent / "csrc", with_cuda=bool(architectures)),
        "torch_version": "2.12.0+built",
        "torch_target": "2.11",
        "cuda_architectures": architectures,
    } | stamp
    source = package.parent / "library.cpp"
    source.write_text(code + _stamp.cpp_source(stamp))
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", package / name, source], check=True)
    return package / name


@needs_compiler
def test_a_library_that_was_built_from_the_sources_loads(checkout):
    library = build(checkout)
    for file in (checkout.parent / "csrc").rglob("*.*"):
        os.utime(file, (2e9, 2e9))  # as later copies are
    loaded = load_library(checkout)
    assert (loaded.library, loaded.cause) == (library, "_C.so is loaded")
    assert loaded.stamp["torch_version"] == "2.12.0+built"


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda csrc: (csrc / "a.cpp").write_text("int b();"),
        lambda csrc: (csrc / "cpu/a.h").write_text(""),
        lambda csrc: (csrc / "cpu/b.h").write_text(""),
        lambda csrc: (csrc / "cpu/a.h").rename(csrc / "a.h"),
        lambda csrc: (csrc / "a.cpp").unlink(),
    ],
    ids=["changed", "emptied", "added", "moved", "removed"],
)
def test_a_library_of_other_sources_is_left_aside(checkout, change, monkeypatch):
    build(checkout)
    change(checkout.parent / "csrc")
    words = "_C.so was built from other sources than csrc/ holds now; rebuild it with `python setup.py build_ext"
    with pytest.raises(ImportError, match=words):
        load_library(checkout)
    monkeypatch.setenv("GDFQ_EXT", "auto")
    with pytest.warns(RuntimeWarning, match=words):
        loaded = load_library(checkout)
    assert loaded.library is None
    assert words in loaded.cause


@needs_compiler
def test_sources_of_cuda_kernels_matter_to_a_library_that_has_them(checkout):
    kernel = checkout.parent / "csrc/kernels/a.cu"
    build(checkout)
    kernel.write_text("// other kernel")
    assert load_library(checkout).library is not None
    build(checkout, architectures=("sm_90",))
    assert load_library(checkout).library is not None
    kernel.write_text("// kernel")
    with pytest.raises(ImportError, match="other sources"):
        load_library(checkout)


@needs_compiler
def test_a_library_without_a_stamp_is_one_of_other_sources(checkout):
    subprocess.run([COMPILER, "-shared", "-xc++", "-o", checkout / "_C.so", os.devnull], check=True)
    with pytest.raises(ImportError, match="other sources"):
        load_library(checkout)


@needs_compiler
def test_where_there_are_no_sources_nothing_is_compared(checkout):
    library = build(checkout)
    shutil.rmtree(checkout.parent / "csrc")
    assert load_library(checkout).library == library


@needs_compiler
def test_the_library_that_fits_is_taken_before_a_newer_one_that_does_not(checkout, recwarn, monkeypatch):
    monkeypatch.setenv("GDFQ_EXT", "auto")
    fitting = build(checkout)
    os.utime(fitting, (1e9, 1e9))
    build(checkout, name="_C.cpython-399-x86_64-linux-gnu.so", sources="others")
    assert load_library(checkout).library == fitting
    assert not recwarn


@needs_compiler
@pytest.mark.parametrize(("version", "loads"), [("2.10.2", False), ("2.11.0a0+git1", True), ("3.0.0", True)])
def test_a_torch_that_is_too_old_is_named(checkout, monkeypatch, version, loads):
    library = build(checkout)
    monkeypatch.setattr(torch, "__version__", version)
    if loads:
        assert load_library(checkout).library == library
    else:
        with pytest.raises(ImportError, match=r"_C\.so needs torch 2\.11 or later, and this is torch 2\.10\.2"):
            load_library(checkout)


@needs_compiler
def test_a_library_that_this_torch_cannot_load_names_both_versions(checkout):
    build(checkout, "void of_a_later_torch(); void call() { of_a_later_torch(); }\n")
    with pytest.raises(ImportError) as error:
        load_library(checkout)
    assert f"did not load in torch {torch.__version__} (it was built with 2.12.0+built): " in str(error.value)
    assert "of_a_later_torch" in str(error.value)
    assert "rebuild it with `python setup.py build_ext --inplace`" in str(error.value)


@needs_compiler
def test_build_information_is_that_of_the_loaded_library(package, monkeypatch):
    monkeypatch.setenv("GDFQ_EXT", "auto")
    (package.parent / "csrc").mkdir()
    build(package)
    (package / "_build_info.py").write_text("torch_version, compiler = '2.13.0', 'of another build'")
    use = "import gdfq_ext; print(gdfq_ext.build_info())"
    done = subprocess.run([sys.executable, "-c", use], cwd=package.parent, capture_output=True, text=True)
    assert "2.12.0+built" in done.stdout, done.stderr
    assert "of another build" not in done.stdout
    (package / "_build_info.py").write_text("torch_version, compiler = '2.12.0+built', 'of this one'")
    done = subprocess.run([sys.executable, "-c", use], cwd=package.parent, capture_output=True, text=True)
    assert "of this one" in done.stdout, done.stderr
