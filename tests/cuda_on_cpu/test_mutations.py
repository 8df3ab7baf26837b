"""The lists of bugs and of survivors fit the kernels, and bugs are noticed; all of them: `python mutations.py`."""

import json

import pytest
from mechanical_bugs import Bug, mechanical_bugs
from mutations import CAUGHT, explained, occurrences, planted_bugs, try_bugs
from planted_bugs import BARRIER, PLANTED, TAIL


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


@pytest.mark.slow
def test_bugs_are_caught(tmp_path):
    harmless = Bug("reduce.cuh", 0, "//", "// Harmless:", "a comment")
    try_bugs([*planted_bugs([BARRIER, TAIL]), harmless], tmp_path / "outcomes.jsonl", jobs=1)
    outcomes = [json.loads(line)["outcome"] for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert outcomes == [CAUGHT, CAUGHT, "the same machine code"]
