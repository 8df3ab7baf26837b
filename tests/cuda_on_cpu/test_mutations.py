"""The list of planted bugs fits the kernels, and bugs are noticed; all of them: `python mutations.py`."""

import pytest
from mutations import BARRIER, MUTATIONS, TAIL, occurrences, outcomes


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}: {mutation.why}")
def test_the_bug_can_be_planted(mutation):
    assert occurrences(mutation) == 1
    assert mutation.new != mutation.old


@pytest.mark.slow
def test_planted_bugs_are_caught(tmp_path):
    assert [caught for _, caught in outcomes([BARRIER, TAIL], tmp_path)] == [True, True]
