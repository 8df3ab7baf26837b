"""Plants bugs in a copy of the CUDA kernels, one after another, and shows that test_kernels.py catches each of them.

    python tests/cuda_on_cpu/mutations.py

The exit code is 1 if a bug survives, or if the kernels have changed so that it can no longer be planted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("csrc", "gdfq_ext", "tests/cuda_on_cpu", "tests/gdfq_ext/op_cases.py", "pyproject.toml")
SECONDS = 600  # a bug may also make a kernel run for ever


class Mutation(NamedTuple):
    file: str
    """In csrc/kernels."""
    old: str
    """What stands there, exactly once."""
    new: str
    why: str
    """What kind of mistake this is."""


BARRIER = Mutation(
    "channels.cuh",
    "__syncthreads();\n      // The threads of the block's first rows",
    "// The threads of the block's first rows",
    "no barrier between writing and adding the threads' sums",
)
TAIL = Mutation(
    "fake_quantize.cu",
    "first + v < numel; ++v) y[",
    "first + v + 1 < numel; ++v) y[",
    "the last element of a ragged tensor is not written",
)
MUTATIONS = [
    BARRIER,
    TAIL,
    Mutation(
        "channels.cuh",
        "#pragma unroll\n    for (int k = 0; k < Operation::kSums; ++k) {\n      __syncthreads();",
        "#pragma unroll\n    for (int k = 0; k < Operation::kSums; ++k) {",
        "no barrier between adding one sum and writing the next",
    ),
    Mutation(
        "reduce.cuh",
        "  __syncthreads();  // an earlier result may still be being read\n",
        "",
        "no barrier between reading one result and writing the next",
    ),
    Mutation(
        "reduce.cuh",
        "if (lane == 0) of_warp[warp] = value;\n  __syncthreads();",
        "if (lane == 0) of_warp[warp] = value;",
        "no barrier between the warps' results and their join",
    ),
    Mutation(
        "reduce.cuh",
        "for (int distance = kWarp / 2;",
        "for (int distance = kWarp / 4;",
        "shuffles over half a warp",
    ),
    Mutation(
        "reduce.cuh",
        "lane < warps ? of_warp[lane]",
        "lane < warps - 1 ? of_warp[lane]",
        "the last warp is left out",
    ),
    Mutation(
        "reduce.cuh",
        "(b > a || b != b) ? b : a",
        "b > a ? b : a",
        "a maximum that loses NaN",
    ),
    Mutation(
        "channels.cuh",
        "if (first + u * blockDim.x < end) apply",
        "if (first + u * blockDim.x <= end) apply",
        "one vector too many at the end of a share of planes",
    ),
    Mutation(
        "channels.cuh",
        "in_one_plane ? into_plane * N : 0",
        "in_one_plane ? into_plane : 0",
        "a share's offset counted in vectors instead of elements",
    ),
    Mutation(
        "channels.cuh",
        "share_end < shape.rows ? share_end : shape.rows",
        "share_end",
        "the last share of rows runs past the tensor",
    ),
    Mutation(
        "channels.cuh",
        "+ of_sample) * gridDim.y + blockIdx.y] = sum",
        "+ of_sample) * gridDim.y] = sum",
        "all shares of a channel write to one place",
    ),
    Mutation(
        "channels.cuh",
        "i < partial.shares; i += kWarp",
        "i < partial.shares; i += 2 * kWarp",
        "every other 32 of the shares are left out",
    ),
    Mutation(
        "divider.h",
        "/ static_cast<std::uint64_t>(d) + 1)",
        "/ static_cast<std::uint64_t>(d))",
        "a multiplier rounded down: multiples of the divisor come out one too low",
    ),
    Mutation(
        "fake_quantize.cu",
        "distance < lanes; distance *= 2) byte",
        "distance <= lanes; distance *= 2) byte",
        "mask bytes mixed with those of the neighbouring lanes",
    ),
    Mutation(
        "fake_quantize.cu",
        "if (first + N > numel) flags &=",
        "if (first > numel) flags &=",
        "mask bits past the end are not cleared",
    ),
    Mutation(
        "fake_quantize_weight.cu",
        "if (block < layers.at[middle].first_block)",
        "if (block <= layers.at[middle].first_block)",
        "a layer's first block works on the layer before",
    ),
    Mutation(
        "observe_range.cu",
        "if (rest < numel)",
        "if (rest + 1 < numel)",
        "the last element is not looked at",
    ),
    Mutation(
        "bns_loss.cu",
        "batch_terms += count;",
        "",
        "the terms of a second launch overwrite those of the first",
    ),
    Mutation(
        "distillation_loss.cu",
        "label >= 0 && label < classes",
        "label >= 0 && label <= classes",
        "a label one past the last class counts as one",
    ),
    Mutation(
        "conditional_batch_norm_act.cu",
        "if (groups.norm.labels[n] == row) return;",
        "if (groups.norm.labels[n] == row) break;",
        "all samples of a label write to its row, the last one to run wins",
    ),
]


def occurrences(mutation: Mutation) -> int:
    return (ROOT / "csrc/kernels" / mutation.file).read_text().count(mutation.old)


def outcomes(mutations: Sequence[Mutation | None], folder: Path) -> Iterator[tuple[str, bool]]:
    """For each mutation, planted in a copy in `folder`: what became of it, and whether the tests failed as they should.

    None stands for the kernels as they are.
    """
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for mutation in mutations:
        if mutation is None:
            yield run_tests(folder)
            continue
        file = folder / "csrc/kernels" / mutation.file
        text = file.read_text()
        file.write_text(text.replace(mutation.old, mutation.new))
        yield run_tests(folder)
        file.write_text(text)


def run_tests(folder: Path) -> tuple[str, bool]:
    tests = ["tests/cuda_on_cpu/test_kernels.py", "-x", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *tests]
    environment = {**os.environ, "GDFQ_EMULATION": "plain", "GDFQ_EXT": "reference"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "never ends", True
    if done.returncode == 0:
        return "SURVIVED", False
    if "Error building extension" in done.stdout:
        return "DOES NOT COMPILE", False
    if done.returncode < 0:
        return f"crash, signal {-done.returncode}", True
    failed = [line.split()[1].partition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return (failed[0], True) if failed else (f"exit code {done.returncode} of pytest", False)


def main() -> int:
    gone = [mutation for mutation in MUTATIONS if occurrences(mutation) != 1]
    for mutation in gone:
        print(f"{mutation.file}: {mutation.old!r} occurs {occurrences(mutation)} times; adapt this list")
    if gone:
        return 1
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        results = outcomes([None, *MUTATIONS], Path(folder))
        if next(results)[0] != "SURVIVED":
            print("the tests fail before any bug is planted")
            return 1
        for mutation, (outcome, caught) in zip(MUTATIONS, results, strict=True):
            survivors += not caught
            print(f"{mutation.file:30} {mutation.why:80} {outcome}", flush=True)
    print(f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} bugs are caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
