"""Plants bugs in the CUDA kernels, one after another, and shows that the tests of this folder catch them.

    python tests/cuda_on_cpu/mutations.py planted       # those of planted_bugs.py
    python tests/cuda_on_cpu/mutations.py mechanical    # those of mechanical_bugs.py

All is done in copies. Each bug is compiled and tried by the tests that touch it: those of the operators whose sources
include the file. The mechanical bugs take hours; outcomes.jsonl has what became of them. --out, JSON lines, gets the
outcome of each as it is there, and what it has from before is kept: while the kernels that the bug's file is part of
are as they were, and for a survivor also the tests, unless survivors.toml says why no test has to catch it. The exit
code is 1 if a bug survives that it does not know.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "tests/gdfq_ext")]

import emulation  # noqa: E402
from mechanical_bugs import KERNELS, WIDE, Bug, mechanical_bugs  # noqa: E402
from planted_bugs import PLANTED, PlantedBug  # noqa: E402

from gdfq_ext._schemas import SCHEMAS  # noqa: E402

SURVIVORS = HERE / "survivors.toml"
OUTCOMES = HERE / "outcomes.jsonl"
TESTS = [HERE / name for name in ("test_kernels.py", "test_large_tensors.py")]
SECONDS = 20  # for a test: a bug may also make a kernel run for ever
RAISED = 70  # the code of a child whose function raised something
CAUGHT, SURVIVED, INVALID, SAME = "caught", "survived", "does not compile", "the same machine code"


def occurrences(bug: PlantedBug) -> int:
    return (KERNELS / bug.file).read_text().count(bug.old)


def planted_bugs(bugs: list[PlantedBug]) -> list[Bug]:
    """Raises LookupError where the kernels have changed so that a bug can no longer be planted."""
    for bug in bugs:
        if occurrences(bug) != 1:
            raise LookupError(f"{bug.file}: {bug.old!r} occurs {occurrences(bug)} times; adapt planted_bugs.py")
    return [
        Bug(bug.file, (KERNELS / bug.file).read_text().index(bug.old), bug.old, bug.new, f"{bug.file}: {bug.why}")
        for bug in bugs
    ]


# ---- compiling


class Compiler:
    """Libraries of the emulation with one file of csrc/kernels exchanged."""

    def __init__(self, folder: Path) -> None:
        flags, links = emulation.VARIANTS["mutant"]
        command = [*emulation.compile_command(flags), "-w"]
        header = folder / "cuda_runtime.h"  # compiled once, which is half of the time
        header.symlink_to(HERE / "include/cuda_runtime.h")
        subprocess.run([*command, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
        self.compile = [*command, "-include", header, "-x", "c++"]
        self.link = emulation.link_command(links)
        self.folder = folder
        self.sources = [f"csrc/kernels/{source.name}" for source in emulation.kernel_sources()]
        self.sources += [f"tests/cuda_on_cpu/{name}.cpp" for name in ("binding", "guarded_memory")]
        self.objects = {source: folder / f"{Path(source).stem}.o" for source in self.sources}
        for source, path in self.objects.items():
            subprocess.run([*self.compile, "-c", ROOT / source, "-o", path], check=True)
        self.plain = self._linked(self.objects, folder)

    @cache  # noqa: B019  (there is one compiler)
    def that_include(self, file: str) -> list[str]:
        """The sources that a file is part of."""
        found = []
        for source in self.sources:
            done = subprocess.run([*self.compile, "-MM", ROOT / source], check=True, capture_output=True, text=True)
            if file in {Path(word).name for word in done.stdout.split()}:
                found.append(source)
        return found

    def libraries(self, bug: Bug, number: int) -> Iterator[tuple[Path, set[str]] | None]:
        """For one kernel source after another that has the bug, a library and the operators that have it there; None
        where the source gives the same machine code.

        Raises:
            SyntaxError: it does not compile.
        """
        folder = self.folder / str(number)
        for name in ("csrc/kernels", "csrc/binding", "tests/cuda_on_cpu"):
            (folder / name).mkdir(parents=True)
            for path in (ROOT / name).glob("*.*"):
                (folder / name / path.name).symlink_to(path)
        (folder / "csrc/kernels" / bug.file).unlink()
        (folder / "csrc/kernels" / bug.file).write_text(bug.text())
        objects = dict(self.objects)
        try:
            # The binding first: it shares headers with the kernels.
            for source in sorted(self.that_include(bug.file), key=lambda source: not source.startswith("tests")):
                objects[source] = folder / self.objects[source].name
                command = [*self.compile, "-c", folder / source, "-o", objects[source]]
                done = subprocess.run(command, capture_output=True)
                if done.returncode != 0:
                    raise SyntaxError(done.stderr.decode())
                if operators_in(source):
                    is_same = objects[source].read_bytes() == self.objects[source].read_bytes()
                    yield None if is_same else (self._linked(objects, folder), operators_in(source))
                    objects[source] = self.objects[source]
        finally:
            shutil.rmtree(folder)

    def _linked(self, objects: dict[str, Path], folder: Path) -> Path:
        library = folder / "library.so"
        command = [*self.link, "-Wl,--no-undefined", *objects.values(), "-o", library]
        done = subprocess.run(command, capture_output=True)
        if done.returncode != 0:  # a function has other parameters than its declaration
            raise SyntaxError(done.stderr.decode())
        return library


@cache
def operators_in(source: str) -> set[str]:
    """The operators whose kernels a source holds; a single weight is quantized as several are."""
    text = (ROOT / source).read_text()
    return {op for op in SCHEMAS if re.search(rf"^void {op}s?\(", text, re.MULTILINE)}


# ---- testing


class Operators:
    """torch.ops.gdfq_cuda_on_cpu, in the place of a test module's OPS: notes which operators a test asks for."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def __getattr__(self, name: str):
        self.asked.add(name)
        return getattr(torch.ops.gdfq_cuda_on_cpu, name)


class Tester:
    """A plugin of pytest that runs the collected tests once for every bug, each time in a process of its own.

    Attributes:
        plain: the library without a bug; None runs all tests for every bug, not those that touch it.
        work: of every bug what `Compiler.libraries` gives, the first to come.
        results: where outcomes are noted.
    """

    def __init__(self, plain: Path | None, work: list[tuple[Bug, Future, Iterator]], results: Path) -> None:
        self.plain = plain
        self.work = work
        self.results = results
        self.operators = Operators()
        self.touched: dict[str, list[str]] = {}
        self.failed = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for module in {item.module for item in session.items}:
            module.OPS = self.operators
        if self.plain is not None:
            self.touched = json.loads(_in_a_child(lambda: self._touched(session)))
        for bug, first, rest in self.work:
            outcome = self._outcome(bug, first, rest, session.items)
            with self.results.open("a") as file:
                print(json.dumps({"name": bug.name, **outcome, **fingerprints(bug.file)}), file=file)
            print(f"{outcome['outcome']:10} {outcome.get('by', ''):60} {bug.name}", flush=True)
        return True

    def _outcome(self, bug: Bug, first: Future, rest: Iterator, items: list[pytest.Item]) -> dict[str, str]:
        outcome = {"outcome": SAME}
        try:
            for library in itertools.chain([first.result()], rest):
                if library is not None:
                    outcome = self._try(bug, *library, items)
                if outcome["outcome"] == CAUGHT:
                    break
        except SyntaxError:
            return {"outcome": INVALID}
        finally:
            rest.close()
        return outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.partition("::")[2]

    def _touched(self, session: pytest.Session) -> str:
        """The operators of every test, as JSON; they all have to pass."""
        touched = {}
        for item in self._run(self.plain, session.items):
            touched[item.nodeid] = sorted(self.operators.asked)
            self.operators.asked.clear()
        if self.failed:
            raise RuntimeError(f"the tests fail before any bug is planted: {self.failed}")
        return json.dumps(touched)

    def _try(self, bug: Bug, library: Path, operators: set[str], items: list[pytest.Item]) -> dict[str, str]:
        """What the tests say that touch one of the operators."""
        items = [item for item in items if operators & set(self.touched.get(item.nodeid, operators))]
        # The most telling first: the plain order of threads, and where an integer is narrow, large tensors.
        items.sort(key=lambda item: (_seed(item), ("large" in item.path.name) != (WIDE in bug.old)))

        def first_failure() -> str:
            for module in {item.module for item in items if hasattr(item.module, "compare")}:
                # Most tests of many operators compare one after the other.
                module.compare = lambda ops, name, arguments, compare=module.compare: (
                    compare(ops, name, arguments) if name in operators else None
                )
            for _ in self._run(library, items):
                if self.failed:
                    break
            return self.failed

        try:
            failed = _in_a_child(first_failure)
        except ChildProcessError as error:
            return {"outcome": CAUGHT, "by": str(error)}
        return {"outcome": CAUGHT, "by": failed} if failed else {"outcome": SURVIVED}

    def _run(self, library: Path, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        """Run the tests with a library; gives each after it has run."""
        loaded = emulation.load_library(library)
        emulation.library = lambda: loaded
        for item, following in zip(items, [*items[1:], None], strict=True):
            signal.alarm(SECONDS)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            yield item


def _seed(item: pytest.Item) -> int:
    """Of the order of threads in a test; 0 is the plain one."""
    return item.callspec.params.get("seed", 0) if hasattr(item, "callspec") else 0


def _in_a_child(function: Callable[[], str]) -> str:
    """What the function returns in a process of its own, whose output is nobody's.

    Raises:
        ChildProcessError: the process crashed, or a test took too long.
        RuntimeError: the function raised something.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            answer, code = function(), 0
        except BaseException as error:
            answer, code = repr(error), RAISED
        with os.fdopen(writing, "w") as pipe:
            pipe.write(answer)
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == RAISED:
        raise RuntimeError(answer)
    if code != 0:
        raise ChildProcessError("it never ends" if code == -signal.SIGALRM else f"it crashes with code {code}")
    return answer


# ---- results


def included_by(file: str) -> set[str]:
    """A file of csrc/kernels and those of that folder that it includes."""
    names = re.findall(r'#include "(?:.*/)?([\w.]+)"', (KERNELS / file).read_text())
    return {file}.union(*(included_by(name) for name in names))


@cache
def fingerprints(file: str) -> dict[str, str]:
    """Of the kernels that a file is part of, but for comments and spaces, and of what tries them."""
    sources = [included_by(path.name) for path in KERNELS.glob("*.cu")]
    kernels = set().union(*(names for names in sources if file in names))
    tests = [*HERE.glob("*.cpp"), *HERE.glob("include/*"), HERE / "emulation.py", *TESTS]
    tests += [ROOT / name for name in ("gdfq_ext/reference.py", "gdfq_ext/quantizer.py", "tests/gdfq_ext/op_cases.py")]

    def digest(paths: list[Path]) -> str:
        texts = (re.sub(r"//.*|\s+", "", path.read_text()) for path in sorted(paths))
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    return {"kernels": digest([KERNELS / name for name in kernels]), "tests": digest(tests)}


def outcomes(results: Path) -> dict[str, str]:
    """Name -> outcome, as far as the file's are valid; the others leave the file."""
    valid = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        entry = json.loads(line)
        now = fingerprints(entry["name"].partition(":")[0])
        is_final = entry["outcome"] != SURVIVED or entry["tests"] == now["tests"] or entry["name"] in explained()
        if entry["kernels"] == now["kernels"] and is_final:
            valid[entry["name"]] = entry
    results.write_text("".join(json.dumps(valid[name]) + "\n" for name in sorted(valid)))
    return {name: entry["outcome"] for name, entry in valid.items()}


@cache
def explained() -> dict[str, str]:
    """Survivor -> why no test has to catch it."""
    groups = tomllib.loads(SURVIVORS.read_text())["survivors"]
    return {name: group["reason"] for group in groups for name in group["names"]}


def try_bugs(bugs: list[Bug], results: Path, jobs: int, all_tests: bool) -> None:
    """Compile and try all bugs; outcomes are noted in `results` and printed as they come.

    Args:
        all_tests: try each by all tests, instead of running all once to see which tests touch which operator.

    Raises:
        RuntimeError: the tests do not run, or fail without a bug.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        compiler = Compiler(Path(folder))
        work = []
        for number, bug in enumerate(bugs):
            libraries = compiler.libraries(bug, number)
            work.append((bug, pool.submit(next, libraries, None), libraries))
        tester = Tester(None if all_tests else compiler.plain, work, results)
        arguments = ["-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:benchmark", "-s"]
        code = pytest.main([*arguments, *map(str, TESTS)], plugins=[tester])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):  # as it seems to pytest
            pool.shutdown(cancel_futures=True)
            raise RuntimeError(f"pytest ended with code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("planted", "mechanical"))
    files = sorted(path.name for path in KERNELS.iterdir())
    parser.add_argument("--only", nargs="+", choices=files, metavar="FILE", help="bugs of these files alone")
    parser.add_argument("--out", type=Path, help="default: build/planted_bugs.jsonl or outcomes.jsonl beside this file")
    parser.add_argument("--jobs", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    bugs = planted_bugs(PLANTED) if args.kind == "planted" else mechanical_bugs()
    bugs = [bug for bug in bugs if bug.file in (args.only or files)]
    results = args.out or (ROOT / "build/planted_bugs.jsonl" if args.kind == "planted" else OUTCOMES)
    results.parent.mkdir(parents=True, exist_ok=True)
    done = outcomes(results)
    missing = [bug for bug in bugs if bug.name not in done]
    print(f"{len(bugs)} bugs, {len(missing)} of them to be tried", flush=True)
    if missing:
        try_bugs(missing, results, args.jobs, all_tests=args.kind == "planted")
    done = outcomes(results)
    unexplained = [bug.name for bug in bugs if done[bug.name] == SURVIVED and bug.name not in explained()]
    kinds = (CAUGHT, SURVIVED, SAME, INVALID)
    print(", ".join(f"{sum(done[bug.name] == kind for bug in bugs)} {kind}" for kind in kinds))
    print("\n".join(["survivors without a reason:", *unexplained]) if unexplained else "every survivor has its reason")
    return int(bool(unexplained))


if __name__ == "__main__":
    torch.set_num_threads(1)  # tests run in forks of this process
    sys.exit(main())
