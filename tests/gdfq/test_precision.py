"""TF32 is as asked inside the block, and as it was outside."""

import pytest
import torch

from gdfq.precision import products_in_tf32


def told() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


@pytest.mark.parametrize("allowed", [False, True])
def test_backends_are_told(allowed):
    before = told()
    with products_in_tf32(allowed):
        assert told() == [allowed, allowed]
    assert told() == before
    with pytest.raises(ZeroDivisionError), products_in_tf32(allowed):
        raise ZeroDivisionError
    assert told() == before
