"""The CUDA kernels touch no memory outside their tensors and do nothing undefined: AddressSanitizer and UBSan watch."""

import os
import shutil
import subprocess
import sys

import emulation
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")]

# PyTorch gets its tensors from malloc, which AddressSanitizer guards. Python itself does not free everything.
SETTINGS = {"GDFQ_EMULATION": "sanitize", "GDFQ_EXT": "reference", "ASAN_OPTIONS": "detect_leaks=0"}
# Built in a process of its own, because the compiler is slow where AddressSanitizer watches it.
BUILD = f"""
import os, sys
sys.path[:0] = [{str(emulation.HERE)!r}, {str(emulation.ROOT)!r}]
import emulation
emulation.library()
os._exit(0)  # cleaning up would surprise the sanitizer, which came late
"""


@pytest.mark.long
def test_kernels_stay_inside_their_memory():
    runtime = [run(["g++", f"-print-file-name={name}"]).stdout.strip() for name in ("libasan.so", "libubsan.so")]
    if not all(map(os.path.isabs, runtime)):
        pytest.skip("g++ has no sanitizers")
    build = run([sys.executable, "-c", BUILD], ASAN_OPTIONS="detect_leaks=0:verify_asan_link_order=0")
    assert build.returncode == 0, (build.stdout + build.stderr)[-10000:]
    tests = [str(emulation.HERE / "test_kernels.py"), "-k", "seed0", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    done = run([sys.executable, "-m", "pytest", *tests], LD_PRELOAD=" ".join(runtime))
    assert done.returncode == 0, (done.stdout + done.stderr)[-10000:]


def run(command: list[str], **settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **SETTINGS, **settings}
    return subprocess.run(command, cwd=emulation.ROOT, env=environment, capture_output=True, text=True)
