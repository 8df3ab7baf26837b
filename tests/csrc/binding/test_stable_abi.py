"""The binding compiles against every torch that the package supports, whichever is installed.

It was written and is tested with one version; what a later version added to the stable ABI is not in 2.11's headers.
"""

import runpy
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from stable_names import names_in, stable_abi, torch_headers_in
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[3]
BINDING = ROOT / "csrc/binding"
OLDEST = Path(__file__).with_name("torch-2.11.txt")
# Our own, though torch 2.13 has them too.
OURS = {"context"}
# The standard that torch's own headers ask for.
STANDARDS = {"2.11.0": "c++17", "2.14.1": "c++20"}


def lacking(source: str, installed: set[str]) -> set[str]:
    """What `source` takes from the stable ABI of the installed torch and torch 2.11 does not have."""
    names = (names_in(source) & installed) | torch_headers_in(source)
    return names - set(OLDEST.read_text().split()) - OURS


@pytest.fixture(scope="module")
def installed():
    return stable_abi(Path(include_paths()[0]))


@pytest.mark.parametrize("path", [*BINDING.glob("*.h"), *BINDING.glob("*.cpp")], ids=lambda path: path.name)
def test_torch_2_11_has_what_the_binding_takes(path, installed):
    assert not lacking(path.read_text(), installed)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="looks names up that came with torch 2.13")
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("STABLE_TORCH_ERROR_CODE_CHECK(call);", "STABLE_TORCH_ERROR_CODE_CHECK("),
        ("#include <torch/csrc/stable/generator.h>", "torch/csrc/stable/generator.h"),
        ("auto handle = stream.nativeHandle();", "nativeHandle("),
        ("aoti_torch_dtype_float8_e8m0fnu();", "aoti_torch_dtype_float8_e8m0fnu("),
    ],
)
def test_what_came_later_is_found(line, name, installed):
    assert lacking(f'// {line}\n{line}\nstd::puts("{name}");', installed) == {name}


def test_the_list_has_what_the_binding_lives_on():
    names = set(OLDEST.read_text().split())
    assert {"Tensor", "TORCH_BOX(", "STD_TORCH_CHECK(", "scalar_type(", "torch_parallel_for("} <= names
    assert "torch/csrc/stable/ops.h" in names


@pytest.fixture(scope="module", params=STANDARDS)
def other_torch(request):
    """(version, include folder) of a torch, from its wheel. The headers stay in build/, the wheel does not."""
    version = request.param
    unpacked = ROOT / "build/torch-headers" / version
    if not unpacked.exists():
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
            download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"torch=={version}", "-d", folder]
            subprocess.run(download, check=True)
            (wheel,) = Path(folder).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                headers = (name for name in archive.namelist() if name.startswith("torch/include/torch/"))
                archive.extractall(folder, headers)
            Path(folder, "torch").rename(unpacked)
    return version, unpacked / "include"


@pytest.mark.slow
@pytest.mark.torch_wheels
@pytest.mark.parametrize("source", ["cpu.cpp", "cuda.cpp"])
def test_the_binding_compiles_against(other_torch, source, tmp_path):
    version, include = other_torch
    setup = runpy.run_path(ROOT / "setup.py")
    toolkit = setup["find_toolkit"]()
    if source == "cuda.cpp" and toolkit is None:
        pytest.skip("the CUDA toolkit's headers are not installed")
    includes = setup["system_includes"]([include, *([toolkit / "include"] if toolkit else [])])
    flags = [f"-std={STANDARDS[version]}", "-fPIC", *setup["CXX_FLAGS"], "-Werror", setup["TARGET_FLAG"], *includes]
    command = [setup["find_compiler"](), *flags, "-c", BINDING / source, "-o", tmp_path / "binding.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
