"""A wheel built from the source tree works in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import gdfq

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "gdfq_ext", "python", "setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")
USE = """
import gdfq, gdfq_ext, torch
from gdfq.demo import teacher
config = gdfq.Config.load("demo", {"method": "minmax", "schedule.range_batches": 1, "run.held_out_images": 8})
result = gdfq.quantize(teacher(), config, progress=False)
assert result.model(torch.randn(2, 1, 28, 28)).isfinite().all()
report = gdfq_ext.backend_report()
assert report.ops["fake_quantize"]["cpu"].backend == EXPECTED, str(report)
print(gdfq.__file__)
"""


def _build_wheel(tmp_path: Path, build: str) -> Path:
    source = tmp_path / "source"
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        ignore = {"ignore": shutil.ignore_patterns("*.so", "__pycache__")} if (ROOT / name).is_dir() else {}
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name, **ignore)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "-q", "-w", tmp_path]
    done = subprocess.run(command, cwd=source, env={**os.environ, "GDFQ_BUILD": build}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("gdfq-*.whl")
    return wheel


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "GDFQ_"))}


def _use(python: Path, folder: Path, expected: str) -> str:
    code = USE.replace("EXPECTED", repr(expected))
    done = subprocess.run([python, "-c", code], cwd=folder, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_wheel_in_an_empty_environment(tmp_path):
    wheel = _build_wheel(tmp_path, "require")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("gdfq_ext/_C.") for name in names)
    assert {"gdfq/demo/fashion_mnist_resnet20.safetensors", "gdfq/presets/cifar.toml"} <= set(names)
    assert {"gdfq/py.typed", "gdfq_ext/py.typed", f"gdfq-{gdfq.__version__}.dist-info/METADATA"} <= set(names)
    assert any(name.endswith("LICENSE.fashion-mnist") for name in names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "benchmarks"))]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch", wheel], check=True)
    assert str(tmp_path / "venv") in _use(python, tmp_path, "native")
    command = [python.with_name("gdfq"), "doctor"]
    doctor = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stderr
    assert "native" in doctor.stdout


@pytest.mark.slow
def test_without_a_compiler_everything_still_works_and_says_so(tmp_path):
    wheel = _build_wheel(tmp_path, "off")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n" + USE.replace("EXPECTED", "'reference'")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
