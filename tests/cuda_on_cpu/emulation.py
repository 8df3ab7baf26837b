"""Builds the CUDA kernels for the CPU and offers them as `torch.ops.gdfq_cuda_on_cpu`."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths, load

from gdfq_ext._schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# What CUDA's compiler takes for granted, and the arithmetic of the host: no contraction.
FLAGS = [
    *("-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
# What is undefined traps, which the emulation makes an error of its own.
TRAPS = ["-fsanitize-undefined-trap-on-error", "-D_GLIBCXX_ASSERTIONS"]
VARIANTS = {
    "plain": (["-O1", "-fsanitize=undefined", *TRAPS], []),
    # Compiled for one run of the tests: what a bug in a kernel is likely to do wrong, and no more.
    "mutant": (["-O1", "-fsanitize=alignment,bounds,object-size", *TRAPS], []),
    "coverage": (["-O0", "--coverage"], ["--coverage"]),
    "sanitize": (
        ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
        ["-fsanitize=address,undefined"],
    ),
}
# A kernel's __shared__ variables together may not be larger on any GPU without asking.
MOST_SHARED_BYTES = 48 * 1024


def kernel_sources() -> list[Path]:
    """The CUDA sources that the extension is built from."""
    return sorted((ROOT / "csrc/kernels").glob("*.cu"))


@cache
def library(variant: str = os.environ.get("GDFQ_EMULATION", "plain")) -> ctypes.CDLL:
    """Compile what changed, and load it."""
    directory = ROOT / "build" / "cuda_on_cpu" / variant
    directory.mkdir(parents=True, exist_ok=True)
    compile_flags, link_flags = VARIANTS[variant]
    name = f"gdfq_cuda_on_cpu_{variant}"
    load(
        name,
        [str(HERE / name) for name in ("binding.cpp", "guarded_memory.cpp")]
        + [str(_as_cpp(source, directory)) for source in kernel_sources()],
        extra_cflags=[*FLAGS, *compile_flags],
        extra_include_paths=[str(HERE / "include")],
        extra_ldflags=link_flags,
        build_directory=str(directory),
        is_python_module=False,
    )
    return load_library(directory / f"{name}.so")


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library of the kernels, and define their operators.

    Raises:
        RuntimeError: a kernel has more shared memory than a GPU.
    """
    for function, size in shared_bytes(path).items():
        if size > MOST_SHARED_BYTES:
            raise RuntimeError(f"{function} has {size} bytes of __shared__ memory; a GPU has {MOST_SHARED_BYTES}")
    schemas = torch.library.Library("gdfq_cuda_on_cpu", "DEF")
    for op, schema in SCHEMAS.items():
        schemas.define(op + schema)
    loaded = ctypes.CDLL(str(path))
    loaded.schemas = schemas  # the definitions live as long as the library
    return loaded


def shared_bytes(path: Path) -> dict[str, int]:
    """Bytes of __shared__ memory of each kernel of a library, with those of all functions that kernels may call.

    The emulation makes thread-local variables of them, which stand among the library's symbols with their sizes.
    """
    command = ["readelf", "--symbols", "--wide", "--demangle", path]
    sizes: dict[str, int] = {}
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        fields = line.split(maxsplit=7)  # number, value, size, type, binding, visibility, section, name
        if fields[3:4] == ["TLS"] and fields[7].startswith("gdfq::cuda::"):
            function = fields[7].rpartition("::")[0]
            sizes[function] = sizes.get(function, 0) + int(fields[2], 0)
    called = sum(size for function, size in sizes.items() if "_kernel" not in function)
    return {function: size + called for function, size in sizes.items() if "_kernel" in function}


def compile_command(flags: list[str]) -> list[str]:
    """A compiler and its arguments, for single files of the emulation."""
    includes = [flag for folder in include_paths() for flag in ("-isystem", folder)]
    return [os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", *FLAGS, *flags, f"-I{HERE / 'include'}", *includes]


def link_command(flags: list[str]) -> list[str]:
    """The same for a library of what was compiled."""
    folders = [f"-L{folder}" for folder in library_paths()]
    libraries = ["-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch"]
    return [os.environ.get("CXX", "c++"), "-shared", *flags, *folders, *libraries]


def _as_cpp(source: Path, directory: Path) -> Path:
    """A C++ file that includes a CUDA file."""
    wrapper = directory / f"{source.stem}.cpp"
    text = f'#include "{source}"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
    return wrapper


def set_seed(seed: int) -> None:
    """Choose the order in which threads and blocks run; 0 for the plain one."""
    library().gdfq_set_seed(ctypes.c_uint(seed))


class Launched(ctypes.Structure):
    """How many kernels were launched, with how many blocks and threads in all."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("kernels", "blocks", "threads"))


def take_launched() -> tuple[int, int, int]:
    """What was launched since the last call: kernels, blocks, threads."""
    function = library().gdfq_take_launched
    function.restype = Launched
    count = function()
    return count.kernels, count.blocks, count.threads


@contextmanager
def guarded_memory(filled: bool = True) -> Iterator[None]:
    """Tensors that are made inside lie between pages that nobody may touch.

    Args:
        filled: what has not been written is NaN, and not zero.

    Raises:
        AssertionError: at the end, where something was written beside a tensor that has been freed.
    """
    library().gdfq_guard_memory(True, filled)
    try:
        yield
    finally:
        library().gdfq_guard_memory(False, False)
    damaged = library().gdfq_take_damaged()
    assert damaged == 0, f"{damaged} tensors were written beside"


@contextmanager
def most_blocks(count: int) -> Iterator[None]:
    """Longer grids run only so many of their blocks, half at the beginning and half at the end."""
    library().gdfq_set_most_blocks(ctypes.c_uint(count))
    try:
        yield
    finally:
        library().gdfq_set_most_blocks(ctypes.c_uint(-1))
