"""Builds the CUDA kernels for the CPU and offers them as `torch.ops.gdfq_cuda_on_cpu`."""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

from gdfq_ext._schemas import SCHEMAS

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# What CUDA's compiler takes for granted, and the arithmetic of the host: no contraction.
FLAGS = ["-O1", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
VARIANTS = {
    "plain": ([], []),
    "coverage": (["--coverage", "-O0"], ["--coverage"]),
    "sanitize": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
        ["-fsanitize=address,undefined"],
    ),
}


def kernel_sources() -> list[Path]:
    """The CUDA sources that the extension is built from."""
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    entries = (line.split() for line in lines if line and not line.startswith("#"))
    return [ROOT / path for part, path in entries if part == "cuda"]


@cache
def library(variant: str = os.environ.get("GDFQ_EMULATION", "plain")) -> ctypes.CDLL:
    """Compile what changed, load, and define the operators."""
    directory = ROOT / "build" / "cuda_on_cpu" / variant
    directory.mkdir(parents=True, exist_ok=True)
    compile_flags, link_flags = VARIANTS[variant]
    name = f"gdfq_cuda_on_cpu_{variant}"
    schemas = torch.library.Library("gdfq_cuda_on_cpu", "DEF")
    for op, schema in SCHEMAS.items():
        schemas.define(op + schema)
    load(
        name,
        [str(HERE / "binding.cpp"), *(str(_as_cpp(source, directory)) for source in kernel_sources())],
        extra_cflags=[*FLAGS, *compile_flags, "-DTORCH_TARGET_VERSION=0x020b000000000000"],
        extra_include_paths=[str(HERE / "include")],
        extra_ldflags=link_flags,
        build_directory=str(directory),
        is_python_module=False,
    )
    loaded = ctypes.CDLL(str(directory / f"{name}.so"))
    loaded.schemas = schemas  # the definitions live as long as the library
    return loaded


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
