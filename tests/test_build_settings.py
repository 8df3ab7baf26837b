"""What setup.py makes of the environment and of the toolkit, with stand-ins for the compilers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from gdfq_ext._loader import load_library

ROOT = Path(__file__).parents[1]
SETTINGS = ("GDFQ_BUILD", "GDFQ_CUDA", "GDFQ_WERROR", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module, with none of its settings given."""
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that what setup.py sets is undone, too
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("gdfq_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit without a runtime library, whose nvcc notes when it begins and ends and writes what it is told."""
    home = tmp_path / "toolkit"
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    nvcc = home / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        textwrap.dedent(f"""\
            #!/bin/sh
            if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
            echo begin >>{tmp_path}/log; sleep 0.2; echo end >>{tmp_path}/log
            for output; do :; done
            echo "$@" >"$output"
            """)
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def add_runtime(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "libcudart_static.a").touch()
    return folder


@pytest.mark.parametrize(
    ("listed", "architectures"),
    [
        ("9.0", {"sm_90"}),
        ("9.0+PTX", {"sm_90", "compute_90"}),
        ("8.0 9.0a+PTX;Hopper", {"sm_80", "sm_90a", "compute_90a", "sm_90", "compute_90"}),
        (None, {"sm_86", "sm_90", "compute_90"}),
        ("", {"sm_86", "sm_90", "compute_90"}),
        ("native", {"sm_86", "sm_90", "compute_90"}),
    ],
)
def test_architectures_are_torchs_list_or_the_gpus_that_are_here(setup, toolkit, monkeypatch, listed, architectures):
    add_runtime(toolkit / "lib64")
    monkeypatch.setenv("GDFQ_CUDA", "require")
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 6), (9, 0)].__getitem__)
    assert set(setup.cuda_architectures()) == architectures
    assert "-gencode=arch=compute_90,code=sm_90" in setup.cuda_targets()


def test_without_gpus_all_kinds_are_compiled_for(setup, toolkit, monkeypatch):
    add_runtime(toolkit / "lib64")
    monkeypatch.setenv("GDFQ_CUDA", "require")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert set(setup.cuda_architectures()) == {"sm_80", "sm_90", "sm_100", "sm_120", "compute_120"}


def test_without_cuda_there_are_no_architectures(setup, monkeypatch):
    monkeypatch.setenv("GDFQ_CUDA", "off")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup.cuda_architectures() == []


@pytest.mark.parametrize("listed", ["90", "9.0,10.0", "Hoper", "9.0;"])
def test_a_wrong_list_ends_with_one_line(setup, monkeypatch, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit) as stop:
        setup.cuda_targets()
    assert stop.value.code.startswith(f"gdfq: TORCH_CUDA_ARCH_LIST={listed!r}: ")
    assert len(stop.value.code.splitlines()) == 1


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_of_jobs_ends_the_build_with_one_line(setup, monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(SystemExit) as stop:
        setup.main()
    assert stop.value.code == f"gdfq: MAX_JOBS={jobs!r} is no number of compilers; give a whole number from 1"


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_nvcc_run_at_a_time(setup, toolkit, tmp_path, monkeypatch, jobs):
    add_runtime(toolkit / "lib64")
    monkeypatch.setenv("GDFQ_CUDA", "require")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    objects = setup.compile_cuda(tmp_path)
    assert len(objects) == len(setup.sources("cuda")) > 3
    running, most = 0, 0
    for line in (tmp_path / "log").read_text().split():
        running += 1 if line == "begin" else -1
        most = max(most, running)
    assert most == jobs
    assert all("-gencode=arch=compute_90,code=sm_90 " in Path(path).read_text() for path in objects)


def test_an_nvcc_that_fails_is_said_in_one_line(setup, toolkit, tmp_path, monkeypatch):
    add_runtime(toolkit / "lib64")
    monkeypatch.setenv("GDFQ_CUDA", "require")
    assert setup.cuda_version(setup.find_cuda()) == "13.0"
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(SystemExit, match=r"gdfq: nvcc did not compile csrc/kernels/\w+\.cu; the reason stands above"):
        setup.compile_cuda(tmp_path)


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_runtime_is_found_in_the_toolkit(setup, toolkit, monkeypatch, folder):
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    runtime = add_runtime(toolkit / folder)
    assert setup.find_cudart(toolkit) == runtime


def test_the_runtime_is_that_of_this_processor(setup, toolkit, monkeypatch):
    runtime = add_runtime(toolkit / "targets/sbsa-linux/lib")
    add_runtime(toolkit / "targets/x86_64-linux/lib")
    monkeypatch.setattr(setup.platform, "machine", lambda: "aarch64")
    assert setup.find_cudart(toolkit) == runtime


@pytest.mark.parametrize(("release", "package"), [("12.8", "cuda_runtime"), ("13.0", "cu13")])
def test_the_runtime_is_found_where_pip_puts_that_of_this_cuda(setup, toolkit, tmp_path, monkeypatch, release, package):
    for name in ("cuda_runtime", "cu13"):
        add_runtime(tmp_path / "site-packages/nvidia" / name / "lib")
    monkeypatch.setattr(setup, "cuda_version", lambda _: release)
    monkeypatch.setattr(setup, "pip_cuda_packages", lambda: [tmp_path / "none", tmp_path / "site-packages/nvidia"])
    assert setup.find_cudart(toolkit) == tmp_path / "site-packages/nvidia" / package / "lib"


def test_the_toolkit_is_found_where_pip_puts_it(setup, toolkit, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(setup.Path, "exists", lambda path: path.is_relative_to(tmp_path) and os.path.exists(path))
    assert setup.find_toolkit() is None
    pip = tmp_path / "site-packages/nvidia/cu13"
    shutil.copytree(toolkit, pip)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    assert setup.find_toolkit() == pip


def test_without_a_runtime_the_build_says_so_before_it_compiles(setup, toolkit, monkeypatch, capsys):
    monkeypatch.setattr(setup, "pip_cuda_packages", list)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup.find_cuda() is None
    missing = f"no libcudart_static.a was found in {toolkit} or among pip's packages"
    assert capsys.readouterr().out == (f"gdfq: torch is a CUDA build, but {missing}: on a GPU, pure PyTorch will run\n")
    setup.find_cuda.cache_clear()
    monkeypatch.setenv("GDFQ_CUDA", "require")
    with pytest.raises(SystemExit) as stop:
        setup.main()
    assert stop.value.code == f"gdfq: GDFQ_CUDA=require, but {missing}"


@pytest.mark.slow
def test_a_change_compiles_itself_alone_and_the_loader_knows_the_library_again(tmp_path, monkeypatch):
    """On sources that compile in no time."""
    shutil.copytree(ROOT / "gdfq_ext", tmp_path / "gdfq_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "python/gdfq/__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text('__version__ = "0.1.0"\n')
    csrc = tmp_path / "csrc"
    (csrc / "kernels").mkdir(parents=True)
    for name in ("cpu/a", "binding/cpu"):
        (csrc / name).parent.mkdir(parents=True)
        (csrc / f"{name}.cpp").write_text(f"int {Path(name).name}() {{ return 1; }}\n")
    (csrc / "binding/build_info.cpp").write_text("extern const char version[] = GDFQ_VERSION;\n")
    monkeypatch.setenv("GDFQ_EXT", "require")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])  # where ninja is

    def build() -> dict[str, int]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "GDFQ_CUDA": "off"}, capture_output=True)
        assert done.returncode == 0, done.stderr
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("build/**/*.o")}

    before = build()
    assert load_library(tmp_path / "gdfq_ext").library is not None
    assert build() == before
    (csrc / "cpu/a.cpp").write_text("int a() { return 2; }\n")
    os.utime(csrc / "cpu/a.cpp", (1e9, 1e9))  # as a copy of another folder's file may be
    with pytest.raises(ImportError, match="other sources"):
        load_library(tmp_path / "gdfq_ext")
    after = build()
    assert {name for name in after if after[name] != before[name]} == {"a.o", "stamp.o"}
    assert load_library(tmp_path / "gdfq_ext").library is not None
    package.write_text('__version__ = "70.1.0"\n')
    last = build()
    assert {name for name in last if last[name] != after[name]} == {"build_info.o"}
    assert any(b"70.1.0" in file.read_bytes() for file in (tmp_path / "gdfq_ext").glob("_build_info*.so"))
