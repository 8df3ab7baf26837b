"""The extension with its CUDA kernels builds without a GPU, and what is built works where there is none."""

import json
import os
import shutil
import subprocess
import sys

import emulation
import pytest
from test_nvcc import NVCC

from gdfq_ext._schemas import SCHEMAS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")]

SETTINGS = {
    "GDFQ_BUILD": "require",
    "GDFQ_CUDA": "require",
    "TORCH_CUDA_ARCH_LIST": "9.0",
    "GDFQ_WERROR": "1",
    "GDFQ_EXT": "require",
    "LDFLAGS": "-static-libstdc++",  # as some compilers do unasked
    "CUDA_VISIBLE_DEVICES": "",
}
USE = """
import json, torch, gdfq_ext
y = gdfq_ext.fake_quantize(torch.tensor([0.4, 2.6]), torch.zeros(1), torch.tensor([3.0]), 2)
assert y.tolist() == [0.0, 3.0]
y, mean, var = gdfq_ext.batch_norm_act_moments(torch.ones(2, 3, 4, 4), torch.ones(3), torch.ones(3), None, None)
assert y.eq(0).all() and mean.eq(1).all() and var.eq(0).all()
try:
    torch.ops.gdfq_ext.fake_quantize(torch.ones(2), torch.zeros(2), torch.ones(1), 2, 0, -1)
except RuntimeError as error:
    assert "lower has 2 elements where 1 are needed" in str(error), error
else:
    raise AssertionError("two bounds for one channel were taken")
print(json.dumps(gdfq_ext.backend_report().as_dict()))
"""


@pytest.mark.long
def test_a_build_with_cuda_works_without_a_gpu(tmp_path):
    package = tmp_path / "lib" / "gdfq_ext"
    shutil.copytree(emulation.ROOT / "gdfq_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    tools = os.pathsep.join([os.path.dirname(NVCC), os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, **SETTINGS, "PATH": tools, "PYTHONPATH": str(package.parent)}
    build = [sys.executable, "setup.py", "build_ext", "--build-temp", tmp_path / "temp", "--build-lib", package.parent]
    built = subprocess.run(build, cwd=emulation.ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    done = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["library"].startswith(str(package))
    assert report["ops"].keys() == SCHEMAS.keys()
    for devices in report["ops"].values():
        assert devices["cuda"]["backend"] == "native"
        assert devices["cuda"]["reason"].endswith("but PyTorch finds no CUDA device")
    assert report["ops"]["fake_quantize"]["cpu"]["backend"] == "native"
