"""PyTorch's compiler on a GPU: what it is told of the ops holds, and what it makes of them computes the same.

Minutes of tracing and compiling, hence apart from the kernels' own tests.
"""

import pytest
import torch
from op_cases import COMBINATIONS, OPS, Inputs
from test_gpu import DEVICE, cases
from test_kernels import placed
from torch.library import opcheck

import gdfq_ext

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")]


@pytest.mark.parametrize(("name", "dtype", "layout"), COMBINATIONS)
def test_opcheck(name, dtype, layout):
    for arguments in cases(name, dtype, layout):
        opcheck(getattr(OPS, name), arguments)


class Block(torch.nn.Module):
    """Most of the ops in a row. No convolution: a product is rounded alike by every compiler, so that levels agree."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 9, 9, generator=torch.Generator().manual_seed(0)))
        for name, value, count in [("low", -1.0, 1), ("high", 1.0, 1), ("zeros", 0.0, 8), ("ones", 1.0, 8)]:
            self.register_buffer(name, torch.full((count,), value))

    def forward(self, x):
        limits, norm = (self.low, self.high), (self.zeros, self.ones)
        x = gdfq_ext.fake_quantize(x, *limits, 4, straight_through="clipped") * gdfq_ext.fake_quantize_weight(
            self.weight, 4
        )
        y, mean, var = gdfq_ext.batch_norm_act_moments(x, *norm, None, None, act="relu")
        y = gdfq_ext.batch_norm_act_fake_quantize(
            y, *norm, self.ones, self.zeros, *limits, 8, straight_through="clipped"
        )
        return y.square().mean() + gdfq_ext.bns_loss([mean], [var], [self.zeros], [self.ones])


def test_torch_compile():
    block = Block().to(DEVICE)
    x = placed(Inputs(torch.float32, torch.contiguous_format).x(2, 8, 9, 9), DEVICE, 0).requires_grad_()
    wanted = (x, block.weight)
    loss, compiled = block(x), torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(compiled, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(loss, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
