"""The lists of bugs and of survivors fit the kernels, and bugs are noticed; all of them: `python mutations.py`."""

import json
import subprocess
import sys

import pytest
from mechanical_bugs import mechanical_bugs
from mutations import OUTCOMES, ROOT, SURVIVED, explained, occurrences
from planted_bugs import PLANTED


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: f"{bug.file}: {bug.why}")
def test_the_bug_can_be_planted(bug):
    assert occurrences(bug) == 1
    assert bug.new != bug.old


def test_mechanical_bugs_have_names_of_their_own_and_change_what_they_say():
    bugs = list(mechanical_bugs())
    assert len({bug.name for bug in bugs}) == len(bugs) > 800
    (bug,) = [bug for bug in bugs if bug.name == "reduce.cuh: if (lane == 0) of_warp[warp] = value; [9: == -> !=]"]
    assert "  if (lane != 0) of_warp[warp] = value;\n" in bug.text()


def test_survivors_are_bugs_that_there_are():
    assert explained().keys() <= {bug.name for bug in mechanical_bugs()}


def test_every_survivor_has_its_reason():
    outcomes = {entry["name"]: entry["outcome"] for entry in map(json.loads, OUTCOMES.read_text().splitlines())}
    survived = {bug.name for bug in mechanical_bugs() if outcomes.get(bug.name) == SURVIVED}
    assert survived <= explained().keys()


@pytest.mark.long
def test_a_bug_is_caught(tmp_path):
    command = [sys.executable, "tests/cuda_on_cpu/mutations.py", "planted", "--only", "divider.h"]
    done = subprocess.run([*command, "--out", tmp_path / "bugs.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n1 caught, 0 survived, 0 the same machine code, 0 does not compile\n" in done.stdout
