"""Builds the compiled parts of gdfq_ext; everything else about the package is in pyproject.toml.

    gdfq_ext/_C*.so            the operators' kernels, on LibTorch's stable ABI
    gdfq_ext/_build_info*.so   how they were built

GDFQ_BUILD: `auto` (the default) compiles where a C++ compiler is found and otherwise installs pure PyTorch, `off` never
compiles, `require` stops without a compiler. GDFQ_CUDA: `auto` compiles the CUDA kernels where nvcc is found and torch
is a CUDA build, `off` never does, `require` does so with any torch and stops without nvcc. TORCH_CUDA_ARCH_LIST says
for which GPUs, as torch reads it ("9.0", "8.0;9.0+PTX", "Hopper"); unless given, those that are here, else 8.0, 9.0,
10.0, 12.0 and later ones. MAX_JOBS is the most compilers at a time. GDFQ_WERROR=1 makes warnings errors.
"""

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# LibTorch's stable ABI is that of the oldest torch that the binary loads in.
TORCH_TARGET = "2.11"
TARGET_FLAG = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*map(int, TORCH_TARGET.split(".")))
# Contraction into multiply-adds would change quantization levels. OpenMP is not needed: threads are PyTorch's.
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
]
# Some compilers put libstdc++ into the library. If its symbols are not hidden, some calls land in torch's: numbers in a
# message then end it, or the process.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"]
# In csrc, by the part of the build that compiles them; CMakeLists.txt takes the same folders.
SOURCES = {
    "kernels": "cpu/*.cpp",
    "binding": "binding/cpu.cpp",
    "cuda": "kernels/*.cu",
    "cuda_binding": "binding/cuda.cpp",
    "build_info": "binding/build_info.cpp",
}
WERROR = os.environ.get("GDFQ_WERROR") == "1"
NVCC_FLAGS = ["-O3", "--std=c++17", "-Xcompiler=-fPIC,-ffp-contract=off,-fvisibility=hidden"]


def main() -> None:
    mode = os.environ.get("GDFQ_BUILD", "auto")
    if mode not in ("auto", "off", "require"):
        sys.exit(f"gdfq: GDFQ_BUILD={mode!r} is not known; allowed are auto, off, require")
    compiler = None if mode == "off" else find_compiler()
    if compiler is None:
        reason = "GDFQ_BUILD=off" if mode == "off" else "no C++ compiler was found (set CXX, or install g++ or clang++)"
        if mode == "require":
            sys.exit(f"gdfq: GDFQ_BUILD=require, but {reason}")
        print(f"gdfq: {reason}: gdfq_ext is installed without compiled kernels and runs in pure PyTorch")
        setup()
        return
    os.environ["CXX"] = compiler
    setup(**compiled_parts())


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, else the first usual one on the path."""
    given = os.environ.get("CXX")
    if given:
        return given if shutil.which(given.split()[-1]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def compiled_parts() -> Mapping:
    """The arguments of setup() that build the two libraries."""
    missing = [name for name in ("torch", "pybind11") if find_spec(name) is None]
    if missing:
        sys.exit(
            f"gdfq: the build needs {' and '.join(missing)}, not installed here. Install torch and pybind11 first, "
            "then `pip install --no-build-isolation .`, or set GDFQ_BUILD=off for pure PyTorch"
        )
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    max_jobs()  # a wrong one stops here, not after half of the build
    warnings_are_errors = ["-Werror"] if WERROR else []
    # The machine's paths stay out of the files, in error messages too.
    relocated = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={Path(torch.__file__).parent}=torch"]
    flags = [*CXX_FLAGS, *warnings_are_errors, *relocated]
    cuda = find_cuda()
    cuda_include, cuda_library = ([str(cuda / "include")], [str(find_cudart(cuda))]) if cuda else ([], [])
    operators = Extension(
        "gdfq_ext._C",
        sources=[*sources("kernels"), *sources("binding"), *(sources("cuda_binding") if cuda else [])],
        # Other people's headers as system headers: our warnings are about our code only.
        extra_compile_args=[*flags, TARGET_FLAG, *system_includes([*include_paths(), *cuda_include])],
        # libtorch alone brings in the CUDA half where torch has one: one binary serves both.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", *LINK_FLAGS],
        library_dirs=[*library_paths(), *cuda_library],
        libraries=["cudart_static", "rt", "dl"] if cuda else [],
        language="c++",
    )
    build_info = Extension(
        "gdfq_ext._build_info",
        sources=sources("build_info"),
        define_macros=[
            ("GDFQ_VERSION", quoted(project_version())),
            ("GDFQ_FLAGS", quoted(" ".join([*CXX_FLAGS, *warnings_are_errors]))),
            ("GDFQ_TORCH_VERSION", quoted(torch.__version__)),
            ("GDFQ_CUDA_VERSION", quoted(cuda_version(cuda) if cuda else "")),
            ("GDFQ_CUDA_ARCHITECTURES", quoted(" ".join(cuda_architectures()))),
        ],
        extra_compile_args=[*flags, *system_includes([pybind11.get_include()])],
        extra_link_args=LINK_FLAGS,
        language="c++",
    )

    class Build(BuildExtension):
        """Compiles the CUDA kernels itself: with a CPU-only torch, torch's own CUDA build refuses to."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # ninja knows what has changed, kernels' objects and settings too; setuptools does not

        def build_extension(self, extension: Extension) -> None:
            if extension is operators:
                touch_changed_sources(Path(self.build_temp))
                extension.sources.append(write_stamp(Path(self.build_temp)))
                extension.extra_objects = compile_cuda(Path(self.build_temp)) if cuda else []
            super().build_extension(extension)

    return {"ext_modules": [operators, build_info], "cmdclass": {"build_ext": Build}}


def sources(part: str) -> list[str]:
    """The source files of one part of the build, relative to the root as setuptools asks."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(SOURCES[part]))


def touch_changed_sources(directory: Path) -> None:
    """Makes sources that differ from the last build's newer than it: ninja goes by times, and copies keep theirs."""
    record = directory / "sources.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    digests = {str(path): sha256(path.read_bytes()).hexdigest() for path in (ROOT / "csrc").rglob("*.*")}
    for path, digest in digests.items():
        if known.get(path, digest) != digest:
            os.utime(path)
    directory.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(digests))


def write_stamp(directory: Path) -> str:
    """The source file that says what the library is built from, for the loader; written only where that has changed."""
    import torch

    stamp = SimpleNamespace(**runpy.run_path(str(ROOT / "gdfq_ext/_stamp.py")))
    text = stamp.cpp_source(
        {
            "sources": stamp.sources_digest(ROOT / "csrc", with_cuda=find_cuda() is not None),
            "torch_version": torch.__version__,
            "torch_target": TORCH_TARGET,
            "cuda_architectures": cuda_architectures(),
        }
    )
    file = directory / "stamp.cpp"
    if not (file.exists() and file.read_text() == text):
        file.write_text(text)
    return str(file)


def system_includes(directories: list[str]) -> list[str]:
    return [argument for directory in directories for argument in ("-isystem", directory)]


def project_version() -> str:
    """The one in the package, which need not be importable yet."""
    return re.search(r'^__version__ = "(.+)"$', (ROOT / "python/gdfq/__init__.py").read_text(), re.MULTILINE)[1]


def quoted(text: str) -> str:
    """A C++ string literal, as a macro's value on the command line."""
    return f'"{text}"'


@cache
def find_cuda() -> Path | None:
    """The CUDA toolkit, where GDFQ_CUDA wants it used. Whether a GPU is here plays no part."""
    import torch

    mode = os.environ.get("GDFQ_CUDA", "auto")
    if mode not in ("auto", "off", "require"):
        sys.exit(f"gdfq: GDFQ_CUDA={mode!r} is not known; allowed are auto, off, require")
    if mode == "off" or (mode == "auto" and torch.version.cuda is None):
        return None
    toolkit = find_toolkit()
    if toolkit is None:
        missing = "no nvcc with its headers was found (set CUDA_HOME)"
    elif find_cudart(toolkit) is None:
        missing = f"no libcudart_static.a was found in {toolkit} or among pip's packages"
    else:
        return toolkit
    if mode == "require":
        sys.exit(f"gdfq: GDFQ_CUDA=require, but {missing}")
    print(f"gdfq: torch is a CUDA build, but {missing}: on a GPU, pure PyTorch will run")
    return None


def find_toolkit() -> Path | None:
    """nvcc with its headers."""
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if on_path:
        candidates.append(Path(on_path).resolve().parents[1])
    candidates += [toolkit for packages in pip_cuda_packages() for toolkit in packages.glob("cu*")]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def pip_cuda_packages() -> list[Path]:
    """The folders where pip puts NVIDIA's packages."""
    nvidia = find_spec("nvidia")
    return [Path(path) for path in nvidia.submodule_search_locations or ()] if nvidia else []


def find_cudart(toolkit: Path) -> Path | None:
    """The folder of the static CUDA runtime: the toolkit's, else that of pip's package for the same CUDA."""
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    folders = [toolkit / name for name in ("lib64", "lib", f"targets/{target}-linux/lib")]
    major = cuda_version(toolkit).split(".")[0]
    package = "cuda_runtime" if major == "12" else f"cu{major}"
    folders += [packages / package / "lib" for packages in pip_cuda_packages()]
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


def cuda_version(toolkit: Path) -> str:
    text = subprocess.run([toolkit / "bin/nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return text.split("release ")[1].split(",")[0]


@cache
def cuda_targets() -> list[str]:
    """nvcc's flags for the GPUs in TORCH_CUDA_ARCH_LIST: machine code, with +PTX also what later GPUs can translate."""
    import torch
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if os.environ.get("TORCH_CUDA_ARCH_LIST", "") in ("", "native"):
        found = sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})
        names = [f"{major}.{minor}" for major, minor in found] or ["8.0", "9.0", "10.0", "12.0"]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
    try:
        return _get_cuda_arch_flags()
    except ValueError as error:
        given = os.environ["TORCH_CUDA_ARCH_LIST"]
        sys.exit(f"gdfq: TORCH_CUDA_ARCH_LIST={given!r}: {error}; allowed are '9.0', '8.0;9.0+PTX', 'Hopper', ...")


def cuda_architectures() -> list[str]:
    """What the library has CUDA kernels for, as nvcc names it: ["sm_90", "compute_90"]."""
    return [flag.rpartition("code=")[2] for flag in cuda_targets()] if find_cuda() else []


def max_jobs() -> int:
    """MAX_JOBS, which torch gives to ninja, for nvcc; the number of processors unless it is set."""
    given = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    if not given.isdecimal() or int(given) == 0:
        sys.exit(f"gdfq: MAX_JOBS={given!r} is no number of compilers; give a whole number from 1")
    return int(given)


def compile_cuda(directory: Path) -> list[str]:
    """Compiles what changed; returns the objects."""
    flags = [*NVCC_FLAGS, *(["-Werror=all-warnings"] if WERROR else [])]
    newest_header = max(path.stat().st_mtime for path in (ROOT / "csrc/kernels").glob("*.*h"))

    def compile_one(source: str) -> str:
        object_file = directory / Path(source).with_suffix(".cu.o")
        object_file.parent.mkdir(parents=True, exist_ok=True)
        command = [find_cuda() / "bin/nvcc", *flags, *cuda_targets(), "-c", source, "-o", object_file]
        command_file = object_file.with_suffix(".command")
        command_line = " ".join(map(str, command))
        is_new = object_file.exists() and object_file.stat().st_mtime > max(
            newest_header, (ROOT / source).stat().st_mtime
        )
        if not (is_new and command_file.exists() and command_file.read_text() == command_line):
            print(command_line, flush=True)
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                sys.exit(f"gdfq: nvcc did not compile {source}; the reason stands above")
            command_file.write_text(command_line)
        return str(object_file)

    with ThreadPoolExecutor(max_jobs()) as pool:
        return list(pool.map(compile_one, sources("cuda")))


if __name__ == "__main__":
    main()
