"""A GDFQ_EXT that cannot be met, as people meet it: a message at the command line, an exception in Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gdfq
import gdfq_ext

UNKNOWN = "GDFQ_EXT='native' is not known; allowed are auto, reference, require"


@pytest.fixture
def environment(tmp_path):
    """gdfq with a gdfq_ext that has no library, and a command as an installation would put there."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(gdfq_ext.__file__).parent, tmp_path / "gdfq_ext", ignore=ignored)
    command = tmp_path / "gdfq"
    command.write_text(f"#!{sys.executable}\nfrom gdfq.cli import main\nmain()\n")
    command.chmod(0o755)
    path = os.pathsep.join(map(str, (tmp_path, Path(gdfq.__file__).parents[1])))
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("mode", ["native", "require"])
@pytest.mark.parametrize("command", [["gdfq", "doctor"], [sys.executable, "-m", "gdfq.demo"]], ids=["gdfq", "demo"])
def test_the_command_line_ends_with_one_message(environment, command, mode, tmp_path):
    done = subprocess.run(command, env=environment | {"GDFQ_EXT": mode}, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    expected = UNKNOWN if mode == "native" else "GDFQ_EXT=require, but no compiled library (_C*.so) lies in"
    assert line.startswith(f"gdfq: {expected}")


@pytest.mark.parametrize(("mode", "error"), [("native", ValueError), ("require", ImportError)])
def test_python_code_can_catch_it(environment, mode, error, tmp_path):
    code = f"try:\n    import gdfq\nexcept {error.__name__} as error:\n    print('caught', error)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment | {"GDFQ_EXT": mode}, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("caught GDFQ_EXT="), done.stderr


def test_other_errors_keep_their_traceback(environment, tmp_path):
    (tmp_path / "gdfq_ext/ops.py").write_text("raise ImportError('a defect')")
    done = subprocess.run(["gdfq", "doctor"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
