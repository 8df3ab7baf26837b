"""The emulation refuses what a GPU would refuse, and what it would do without a word."""

import ctypes
import re
import subprocess

import emulation
import pytest
import torch

WRONG = {
    "grid": "invalid configuration argument",
    "block": "invalid configuration argument",
    "flat block": "invalid configuration argument",
    "stream": "set_kernel: launched on another stream than the call's",
    "doubled": r"set_kernel: its blocks do not look at blockIdx\.z, so all of them do the same",
    "behind": r"set_kernel: block \(0,0\): thread 0 touches memory outside of what was allocated",
    "far before": "thread 0 touches memory outside",
    "unaligned": r"copy_kernel: block \(0,0\): thread 0 does something undefined",
    "index": "index_kernel: block .* thread 4 does something undefined",
}


def compiled(folder, *flags):
    """faulty_kernels.cpp as a library."""
    compile_flags, link_flags = emulation.VARIANTS["plain"]
    source, path = emulation.HERE / "faulty_kernels.cpp", folder / "faulty.so"
    commands = [
        [*emulation.compile_command([*compile_flags, *flags]), "-c", source, "-o", folder / "faulty.o"],
        [*emulation.link_command(link_flags), folder / "faulty.o", "-o", path],
    ]
    for command in commands:
        subprocess.run(command, check=True)
    return path


@pytest.fixture(scope="module")
def attempt(tmp_path_factory):
    """`attempt(name, x)` is what is wrong with that launch, in words."""
    emulation.library()
    launch = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("faulty")))).gdfq_try
    launch.restype = ctypes.c_char_p
    return lambda name, x: launch(name.encode(), ctypes.c_void_p(x.data_ptr())).decode()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(attempt, name):
    with emulation.guarded_memory():
        x = torch.zeros(1000)
        assert re.search(WRONG[name], attempt(name, x))


def test_the_right_launch_works_also_after_a_fault(attempt):
    with emulation.guarded_memory():
        x = torch.zeros(1000)
        assert "outside" in attempt("behind", x)
        assert attempt("", x) == ""
        assert x[0] == 1.0


def test_what_is_written_beside_a_tensor_is_noticed_when_it_is_freed(attempt):
    def write_beside():
        with emulation.guarded_memory():
            assert attempt("beside", torch.zeros(1000)) == ""

    with pytest.raises(AssertionError, match="1 tensors were written beside"):
        write_beside()


def test_more_shared_memory_than_a_gpu_has_is_refused(tmp_path):
    path = compiled(tmp_path, "-DTOO_MUCH_SHARED_MEMORY")
    with pytest.raises(RuntimeError, match=r"shared_kernel.* has 49156 bytes of __shared__ memory; a GPU has 49152"):
        emulation.load_library(path)
