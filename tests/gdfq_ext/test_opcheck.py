"""PyTorch's own consistency checks of schema, fake kernel, autograd registration and tracing, for every op."""

import pytest
from op_cases import CASES, COMBINATIONS, OPS, PLAIN, Inputs
from torch.library import opcheck

from gdfq_ext._schemas import SCHEMAS


def test_every_op_has_cases():
    assert set(CASES) == set(SCHEMAS)


@pytest.mark.parametrize(("name", "dtype", "layout"), COMBINATIONS)
def test_opcheck(name, dtype, layout):
    cases = list(CASES[name](Inputs(dtype, layout)))
    for arguments in cases if (dtype, layout) == PLAIN else cases[:1]:
        opcheck(getattr(OPS, name), arguments)
