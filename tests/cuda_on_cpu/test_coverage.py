"""test_kernels.py executes nearly every line of the CUDA kernels."""

import shutil

import kernel_coverage
import pytest


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcov") is None, reason="gcov is not installed")
def test_nearly_every_line_is_executed():
    assert kernel_coverage.main() == 0
