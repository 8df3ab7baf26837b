"""The scripts of a visit to a GPU machine: what they run there, what is left when something goes wrong, and on a CPU
all of it at the smallest size."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from json import loads
from pathlib import Path

import pytest

from benchmarks import accuracy, accuracy_in_time, killed_run, step_suite, zero_numerators
from benchmarks.ops import __main__ as ops

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_session.sh"
CHARACTERS = 12_000  # of output come back
FILE_BYTES = 16 * 2**20  # of a file

# Stands for the interpreter: writes down what it is asked for, and then does what the test says.
PYTHON = """#!/usr/bin/env bash
[[ $2 == *sysconfig* ]] && exit
{
    for name in GDFQ_EXT GDFQ_WERROR GDFQ_CUDA GDFQ_COMMIT TORCH_CUDA_ARCH_LIST MAX_JOBS; do
        printf '%s\\0' "$name=${!name-unset}"
    done
    printf '%s\\0' "$@"
    printf '\\0'
} >> "$COMMANDS"
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$2" >> "$LIMITS"
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Command:
    environment: dict[str, str]
    arguments: list[str]

    @property
    def module(self) -> str:
        return self.arguments[1] if self.arguments[0] == "-m" else self.arguments[0]


class Machine:
    """A machine on which all commands are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "bin").mkdir()
        self.put("bin/python", PYTHON)
        self.put("bin/nvidia-smi", "#!/bin/sh\necho 9.0\n")
        self.put("bin/compute-sanitizer", '#!/bin/sh\nwhile [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n')
        self.variables = {
            **os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": f"{folder}/bin/python",
            "COMMANDS": f"{folder}/commands", "LIMITS": f"{folder}/limits", "TMPDIR": str(folder),
        }  # fmt: skip

    def put(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python_then(self, script: str) -> None:
        self.put("bin/python", PYTHON + script)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        variables = self.variables | environment
        return subprocess.Popen([SCRIPT, *arguments], stdout=subprocess.PIPE, text=True, env=variables)

    def session(self, call: str, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(call, str(self.out), **environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def commands(self) -> list[Command]:
        result = []
        for record in (self.folder / "commands").read_bytes().decode().split("\0\0")[:-1]:
            fields = record.split("\0")
            result.append(Command(dict(field.split("=", 1) for field in fields[:6]), fields[6:]))
        return result

    def command(self, module: str) -> list[Command]:
        return [command for command in self.commands if command.module == module]

    def shipped(self, call: str) -> dict[str, bytes]:
        """The files of the one archive."""
        assert [path.name for path in self.out.iterdir()] == [f"{call}.tar.gz"]
        with tarfile.open(self.out / f"{call}.tar.gz") as archive:
            return {member.name: archive.extractfile(member).read() for member in archive.getmembers()}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.fixture
def visit(machine):
    """A folder as gpu_prepare.sh fills it, of stand-ins."""
    for name in ("gdfq_ext/_C.so", "wheels/some.whl", "cifar10/test.npz"):
        machine.put(f"visit/{name}", "")
    machine.put("visit/commit", "0123456789")
    return machine.folder / "visit"


# --- what runs on the GPU ---


@pytest.mark.parametrize("call", ["first", "second"])
def test_commands_are_what_the_tools_take(machine, visit, call):
    code, output = machine.session(call, GDFQ_VISIT=str(visit))
    assert code == 0, output
    checked = []
    for command in machine.commands:
        module, arguments = command.module, command.arguments[2:]
        if module.startswith("benchmarks.") and module != "benchmarks.every_op_once":
            tools = (accuracy, accuracy_in_time, killed_run, step_suite, zero_numerators)
            tools = {tool.__name__: tool.parse for tool in tools}
            tools["benchmarks.ops"] = lambda arguments: ops.plan(ops.parse(arguments))  # which looks at names, too
            tools[module](arguments)
        elif module == "benchmarks.every_op_once":
            assert arguments == ["cuda"]
        checked.append(module)
    wanted = {
        "first": [
            "pytest", "benchmarks.zero_numerators", "benchmarks.ops", "benchmarks.step_suite", "benchmarks.step_suite",
        ],
        "second": [
            "benchmarks.accuracy", "benchmarks.accuracy_in_time", "benchmarks.killed_run", "pytest", "pytest",
            "benchmarks.every_op_once",
        ],
    }[call]  # fmt: skip
    assert [module for module in checked if module not in ("pip", "setup.py", "-c")] == wanted


def test_first_call_measures_what_was_asked(machine):
    machine.session("first")
    (ops,) = machine.command("benchmarks.ops")
    assert ops.arguments[ops.arguments.index("--layout") + 1] == "channels_last"
    small, large = (step_suite.parse(command.arguments[2:]) for command in machine.command("benchmarks.step_suite"))
    assert (small.networks, small.batch, small.bits) == (["resnet20"], 200, 8)
    assert (large.networks, large.batch) == (["resnet18"], 16)
    compared = ["released", "compile", "compile-reduce-overhead", "ours", "floor"]
    assert small.providers == compared
    assert {*compared, "ours@contiguous", "ours@tf32", "ours@bfloat16"} <= set(large.providers)


def test_kernels_are_tested_in_eight_processes_without_what_takes_long(machine):
    machine.session("first")
    (tests,) = machine.command("pytest")
    assert tests.arguments[tests.arguments.index("-n") + 1] == "8"
    assert "-x" not in tests.arguments
    collect = [sys.executable, "-m", *tests.arguments[1:], "--collect-only"]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    assert "test_gpu.py::test_larger_shapes" in done.stdout, done.stdout
    assert "test_training.py::test_graphs" in done.stdout
    for word in ("opcheck", "compile", "more_elements_than_32_bits"):
        assert word not in done.stdout


def test_the_build_is_for_the_gpu_that_is_there_and_nothing_runs_without_kernels(machine):
    machine.session("first", GDFQ_WERROR="1", GDFQ_EXT="auto", MAX_JOBS="5")
    (build,) = machine.command("setup.py")
    assert build.arguments == ["setup.py", "build_ext", "--inplace"]
    expected = {"GDFQ_WERROR": "unset", "GDFQ_CUDA": "require", "TORCH_CUDA_ARCH_LIST": "9.0", "MAX_JOBS": "5"}
    assert build.environment.items() >= expected.items()
    later = machine.commands[machine.commands.index(build) :]
    assert len(later) == 7
    assert {command.environment["GDFQ_EXT"] for command in later} == {"require"}


def test_a_copy_without_history_names_its_commit(machine, visit, tmp_path):
    """On the machine there is no .git."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: {".git", ".venv", "build", "visit"} & set(names))
    subprocess.run(
        [copy / "benchmarks/gpu_session.sh", "first", machine.out], env=machine.variables | {"GDFQ_VISIT": str(visit)},
        check=True, capture_output=True,
    )  # fmt: skip
    assert {command.environment["GDFQ_COMMIT"] for command in machine.commands} == {"0123456789"}


def test_limits_leave_time_for_the_last_stage(machine):
    machine.put("bin/timeout", TIMEOUT)
    _, output = machine.session("first")
    total = int(output.partition("first call, ")[2].split()[0])
    assert total + 5 < 420
    *limits, last = map(int, (machine.folder / "limits").read_text().split())
    assert len(limits) == 7
    assert total - sum(limits) >= 45
    assert last >= 80


# --- what it leaves when something goes wrong ---


def test_a_failed_build_without_another_library_ends_the_visit(machine):
    machine.python_then('[[ $1 == setup.py ]] && { echo "error: nothing compiles"; exit 1; }; exit 0')
    code, output = machine.session("first")
    assert code == 1
    assert "there are no compiled kernels that fit" in output
    assert "error: nothing compiles" in output.partition("== build.log")[2]
    assert machine.commands[-1].module == "setup.py"
    assert b"error: nothing compiles" in machine.shipped("first")["results/build.log"]


@pytest.mark.parametrize("fits", [True, False])
def test_the_prebuilt_library_serves_if_it_fits(machine, visit, fits):
    machine.python_then(f"[[ $1 == setup.py ]] && exit 1; [[ $1 == -c && $3 == cuda ]] && exit {1 - fits}; exit 0")
    code, output = machine.session("first", GDFQ_VISIT=str(visit))
    assert ("library: the prebuilt one" in output) == fits
    assert bool(machine.command("benchmarks.step_suite")) == fits
    assert code == (0 if fits else 1)


def test_a_build_that_does_not_load_counts_as_failed(machine):
    machine.python_then("[[ $1 == -c && $3 == cuda ]] && exit 1; exit 0")
    code, output = machine.session("first")
    assert code == 1
    assert "library: none was carried" in output
    assert not machine.command("pytest")


def test_a_stage_that_fails_stops_none_that_follow(machine):
    machine.python_then('[[ $2 == benchmarks.ops ]] && { echo "no figures"; exit 3; }; exit 0')
    code, output = machine.session("first")
    assert code == 1
    assert "ops: failed with code 3" in output
    assert len(machine.command("benchmarks.step_suite")) == 2
    assert machine.shipped("first")["results/ops.log"] == b"no figures\n"


def test_output_and_archive_keep_their_limits(machine):
    (machine.folder / "large").write_bytes(random.Random(0).randbytes(FILE_BYTES + 1))
    machine.python_then(
        """
        seq 40000
        while [[ $# -gt 0 && $1 != --out ]]; do shift; done
        if [[ -n $2 && $2 != *.json ]]; then
            mkdir -p "$2"
            seq 40000 | tee "$2/results.txt" > "$2/suite.txt"
            cp "$TMPDIR/large" "$2/checkpoint.safetensors"
        fi
        """
    )
    _, output = machine.session("first")
    assert 8_000 < len(output) <= CHARACTERS
    for part in ("ops/results.txt", "zero-numerators.log", "resnet18/suite.txt", "resnet20/suite.txt", "gpu-tests.log"):
        assert f"== {part}" in output
    files = machine.shipped("first")
    assert "results/resnet20/suite.txt" in files
    assert not any("checkpoint" in name for name in files)
    assert (machine.out / "first.tar.gz").stat().st_size < FILE_BYTES


SLOW_STAGE = """
    if [[ $2 == benchmarks.zero_numerators ]]; then
        echo "half of it"
        echo $$ > "$TMPDIR/slow-stage"
        exec sleep 60
    fi
    exit 0
"""


def test_a_stage_that_is_cut_off_leaves_what_it_had(machine):
    machine.python_then(SLOW_STAGE)
    code, output = machine.session("first", GDFQ_SECONDS="9")
    assert code == 1
    assert "zero-numerators: cut off" in output
    assert "ops: skipped, the time is up" in output
    assert "half of it" in output.partition("== zero-numerators.log")[2]
    assert machine.shipped("first")["results/zero-numerators.log"] == b"half of it\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_session_that_is_ended_leaves_what_it_had(machine, number):
    machine.python_then(SLOW_STAGE)
    process = machine.start("first", str(machine.out))
    pid = machine.folder / "slow-stage"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    begun = time.monotonic()
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
        os.kill(int(pid.read_text()), signal.SIGKILL)
        assert b"gpu-tests: ok" in machine.shipped("first")["results/summary.txt"]
        return
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begun < 10
    assert process.returncode == 143
    assert "half of it" in output.partition("== zero-numerators.log")[2]
    files = machine.shipped("first")
    assert files["results/zero-numerators.log"] == b"half of it\n"
    assert b"stopped by a signal" in files["results/summary.txt"]
    assert len(machine.command("benchmarks.ops")) == 0


def test_failures_are_said_when_they_happen(tmp_path):
    """Also by xdist's workers: a run that is cut off has no summary."""
    shutil.copy(ROOT / "tests/gpu/conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pathlib, time\n\ndef test_wrong():\n    assert 'this' == 'that'\n\n"
        "def test_long():\n    pathlib.Path('reached').touch()\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "--rootdir=."]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log)
    try:
        end = time.monotonic() + 30
        while "FAILED" not in (tmp_path / "log").read_text() and time.monotonic() < end:
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        process.kill()
    assert "FAILED test_it.py::test_wrong" in (tmp_path / "log").read_text()
    assert "assert 'this' == 'that'" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("arguments", [(), ("first",), ("third", "out"), ("first", "out", "--dryrun")])
def test_usage(tmp_path, arguments):
    done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    assert not list(tmp_path.iterdir())


# --- what is carried ---


def test_preparing(machine):
    machine.python_then(
        """
        previous=
        for argument; do
            [[ $previous == --dest ]] && mkdir -p "$argument" && touch "$argument/${*: -1}.whl"
            [[ $previous == --build-lib ]] && mkdir -p "$argument/gdfq_ext" && touch "$argument/gdfq_ext/_C.so"
            previous=$argument
        done
        exit 0
        """
    )
    images, weights = machine.put("images", "1"), machine.put("weights", "2")
    folder = machine.folder / "visit"
    command = [ROOT / "benchmarks/gpu_prepare.sh", folder, "--images", images, "--weights", weights]
    subprocess.run(command, check=True, env=machine.variables, cwd=machine.folder)
    assert (folder / "cifar10/test.npz").read_text() == "1"
    assert (folder / "cifar10/resnet20.safetensors").read_text() == "2"
    assert (folder / "gdfq_ext/_C.so").exists()
    assert len(list((folder / "wheels").iterdir())) == 2
    assert len((folder / "commit").read_text().strip().removesuffix("-dirty")) == 40
    (build,) = machine.command("setup.py")
    assert build.environment["GDFQ_CUDA"] == "require"
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    downloads = " ".join(argument for command in machine.command("pip") for argument in command.arguments)
    assert "pydantic tomli-w" in downloads
    assert "--no-deps pytorchcv" in downloads


# --- all of it on a CPU ---


@pytest.mark.long
def test_dry_run(tmp_path):
    """Nothing is carried for the first call, which builds; for the second, the library that lies in the tree is."""
    variables = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    variables.pop("GDFQ_VISIT", None)
    (tmp_path / "visit/gdfq_ext").mkdir(parents=True)
    for library in (ROOT / "gdfq_ext").glob("*.so"):
        shutil.copy2(library, tmp_path / "visit/gdfq_ext")
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')  # a third of the time
    compiler.chmod(0o755)
    files = {}
    for call, environment in (("first", {"CXX": str(compiler)}), ("second", {"GDFQ_VISIT": str(tmp_path / "visit")})):
        done = subprocess.run(
            [SCRIPT, call, tmp_path / "out", "--dry-run"], env=variables | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
        assert len(done.stdout) + len(done.stderr) <= CHARACTERS
        with tarfile.open(tmp_path / f"out/{call}.tar.gz") as archive:
            files |= {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.tar.gz", "second.tar.gz"]

    assert b" skipped in " in files["results/gpu-tests.log"]
    for name in ("resnet20/suite.json", "resnet18/suite.json"):
        (cell,) = loads(files[f"results/{name}"])["cells"].values()
        assert all("is loaded" in row["backend"] for name, row in cell["providers"].items() if name != "floor")
    assert loads(files["results/ops/results.json"])["rows"]
    assert len(loads(files["results/zero-numerators.json"])["rows"]) == 10
    (row,) = loads(files["results/reconstruction.json"])["rows"]
    assert (row["method"], row["bank"]) == ("reconstruction", "made")
    trained = loads(files["results/accuracy.json"])
    assert trained["exit_code"] == 130  # SIGTERM ended it, and it had saved
    assert 0 < trained["iterations"] < trained["planned_iterations"]
    assert 0 < trained["top1"]["quantized"] <= 100
    killed = loads(files["results/killed-run.json"])
    assert killed["equal"]
    assert killed["killed_after"] < killed["iterations"][1] == killed["iterations"][0]
    assert b"calls on cpu" in files["results/memcheck.log"]
