"""CMake builds the torch-free kernels, and their CTest tests pass."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_library_and_its_tests(tmp_path):
    cuda = ["-DGDFQ_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"] if shutil.which("nvcc") else []
    for command in (
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *cuda],
        ["cmake", "--build", tmp_path, "--parallel", "1"],
        ["ctest", "--test-dir", tmp_path, "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
    assert (tmp_path / "libgdfq_kernels.a").exists()
    assert (tmp_path / "compile_commands.json").exists()
    assert not cuda or (tmp_path / "libgdfq_cuda_kernels.a").exists()
