"""Which lines of the CUDA kernels test_kernels.py executes, in any of their instantiations.

    python tests/cuda_on_cpu/kernel_coverage.py

The exit code is 1 below 95 % of all lines.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cuda_on_cpu" / "coverage"
REQUIRED = 95.0


def run_tests() -> None:
    """Leaves a count of each line's executions beside the objects."""
    for old in BUILD.glob("*.gcda"):
        old.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "seed0"]
    environment = {**os.environ, "GDFQ_EMULATION": "coverage", "GDFQ_EXT": "reference"}
    subprocess.run([*command, "tests/cuda_on_cpu/test_kernels.py"], cwd=ROOT, env=environment, check=True)


def executed_lines() -> dict[str, dict[int, bool]]:
    """File name -> line number -> whether any instantiation executed it."""
    counts = sorted(BUILD.glob("*.gcda"))
    text = subprocess.run(
        ["gcov", "--json-format", "--stdout", *counts], cwd=BUILD, check=True, capture_output=True, text=True
    ).stdout
    executed = defaultdict(lambda: defaultdict(bool))
    for document in filter(None, text.splitlines()):
        for file in json.loads(document)["files"]:
            path = (BUILD / file["file"]).resolve()
            if path.parent == ROOT / "csrc/kernels":
                for line in file["lines"]:
                    executed[path.name][line["line_number"]] |= line["count"] > 0
    return executed


def main() -> int:
    run_tests()
    executed = executed_lines()
    total = [was_executed for lines in executed.values() for was_executed in lines.values()]
    for name, lines in sorted(executed.items()):
        missed = [number for number, was_executed in sorted(lines.items()) if not was_executed]
        print(f"{name:35} {percentage(lines.values()):6.1f} % of {len(lines):4}  " + " ".join(map(str, missed)))
    print(f"{'all':35} {percentage(total):6.1f} % of {len(total):4}")
    return int(percentage(total) < REQUIRED)


def percentage(flags) -> float:
    return 100 * sum(flags) / len(flags)


if __name__ == "__main__":
    sys.exit(main())
