"""PyTorch's own consistency checks of schema, fake kernel, autograd registration and tracing, for every op."""

import pytest
from op_cases import CASES, DTYPES, FLOAT32_ONLY, LAYOUTS, OPS, Inputs
from torch.library import opcheck

from gdfq_ext._schemas import SCHEMAS


def test_every_op_has_cases():
    assert set(CASES) == set(SCHEMAS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype, layout):
    if name in FLOAT32_ONLY and (dtype, layout) != (DTYPES[0], LAYOUTS[0]):
        return
    cases = list(CASES[name](Inputs(dtype, layout)))
    for arguments in cases if (dtype, layout) == (DTYPES[0], LAYOUTS[0]) else cases[:1]:
        opcheck(getattr(OPS, name), arguments)
