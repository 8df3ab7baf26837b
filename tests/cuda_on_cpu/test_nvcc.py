"""What nvcc makes of the CUDA kernels: no warnings, no spilled registers, 16-byte loads and stores.

Registers per kernel are left in build/registers.txt.
"""

import ast
import os
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

import emulation
import pytest

ARCHITECTURES = ["80", "90", "100", "120"]
REPORTS = emulation.ROOT / "build" / "registers"
# pip's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm put theirs among the packages.
TOOLS = [*Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), Path(os.environ.get("CUDA_HOME") or ".", "bin")]
PATH = os.pathsep.join([os.environ["PATH"], *map(str, TOOLS), "/usr/local/cuda/bin"])
NVCC, CUOBJDUMP, NVDISASM = (shutil.which(tool, path=PATH) for tool in ("nvcc", "cuobjdump", "nvdisasm"))

pytestmark = [pytest.mark.long, pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")]

# Kernels that read whole vectors in all their instantiations, or in those with N > 1.
READS_VECTORS = re.compile(r"weights_kernel|_kernel<[^<>]*(<[^<>]*>)?[^<>]*, [48][,>]")
TOO_SMALL = {"bns_loss", "distillation_loss"}  # for vectors to matter
# What only sums or counts has no output.
WRITES_NOTHING = re.compile(r"bounds_kernel|changed_weights_kernel|<(Moments|Sums)<")


@pytest.mark.parametrize("source", emulation.kernel_sources(), ids=lambda source: source.stem)
def test_kernels_use_registers_and_vectors_well(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = [*nvcc_flags(), "-Werror=all-warnings", "-Xptxas=-v", "--threads=2"]
    command = [NVCC, *flags, *targets, "-c", source, "-o", tmp_path / "kernels.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = resources(demangled(done.stderr))
    assert {architecture for _, architecture in kernels} == {f"sm_{a}" for a in ARCHITECTURES}
    report(source.stem, kernels)
    assert not {kernel: used for kernel, used in kernels.items() if used["spilled"]}

    if not (CUOBJDUMP and NVDISASM):
        pytest.skip("no spills; vectors not looked at: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    assembly = subprocess.run(
        [CUOBJDUMP, "-sass", "-arch", "sm_90", tmp_path / "kernels.o"],
        env={**os.environ, "PATH": PATH},
        capture_output=True,
        text=True,
        check=True,
    )
    parts = re.split(r"^\s*Function : (.*)", demangled(assembly.stdout), flags=re.MULTILINE)[1:]
    functions = dict(zip(parts[::2], parts[1::2], strict=True))
    assert functions.keys() == {kernel for kernel, _ in kernels}
    vectorized = {name: code for name, code in functions.items() if READS_VECTORS.search(name)}
    assert bool(vectorized) == (source.stem not in TOO_SMALL)
    for name, code in vectorized.items():
        assert re.search(r"\bLDG\S*\.128\b", code), f"{name} loads no 16 bytes at once"
        assert WRITES_NOTHING.search(name) or re.search(r"\bSTG\S*\.128\b", code), f"{name} stores no 16 bytes"


def nvcc_flags() -> list[str]:
    """NVCC_FLAGS of setup.py, which cannot be imported."""
    for statement in ast.parse((emulation.ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NVCC_FLAGS":
            return ast.literal_eval(statement.value)
    raise LookupError("NVCC_FLAGS")


def demangled(text: str) -> str:
    """The kernels' names as in the source, without namespaces and arguments."""
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    text = text.replace("(anonymous namespace)::", "").replace("gdfq::cuda::", "").replace("gdfq::", "")
    return re.sub(r"(?:void )?(\w+_kernel(?:<[^()]*>)?)\([^\n']*\)", r"\1", text)


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """What `ptxas -v` says of each kernel on each architecture."""
    used = defaultdict(dict)
    for line in log.splitlines():
        if entry := re.search(r"entry function '(.*)' for '(sm_\d+)'", line):
            kernel = used[entry[1], entry[2]]
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel["spilled"] = int(spills[1]) + int(spills[2])
        elif registers := re.search(r"Used (\d+) registers", line):
            kernel["registers"] = int(registers[1])
    return used


def report(name: str, kernels: dict[tuple[str, str], dict[str, int]]) -> None:
    """One line for each kernel, one column for each architecture."""
    rows = [f"{name:100}" + "".join(f"{'sm_' + a:>8}" for a in ARCHITECTURES)]
    for kernel in sorted({kernel for kernel, _ in kernels}):
        rows.append(f"  {kernel:98}" + "".join(f"{kernels[kernel, f'sm_{a}']['registers']:8}" for a in ARCHITECTURES))
    print("\n".join(rows))
    REPORTS.mkdir(parents=True, exist_ok=True)
    (REPORTS / f"{name}.txt").write_text("\n".join(rows) + "\n")
    parts = [part.read_text() for part in sorted(REPORTS.glob("*.txt"))]
    REPORTS.with_suffix(".txt").write_text("\n".join(parts))
