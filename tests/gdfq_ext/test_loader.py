"""GDFQ_EXT and the report, in processes of their own, from a copy of the package with no library, or a broken one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gdfq_ext
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
