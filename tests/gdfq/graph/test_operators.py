"""What the rewritings believe of an operator, held against what it does: on all samples that torch has of its own."""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from gdfq.graph.nodes import MOVES, preserves_values

# Operators that give values of their input and are not counted as moving them, and why.
EXCEPT = {
    "relu": "an activation, which has a quantizer of its own",
    "clamp_min": "relu, where the samples clamp at 0",
    "nan_to_num": "picks unless a value is infinite",
    "fractional_max_pool2d": "is random",
    "fractional_max_pool3d": "is random",
    "linalg_cholesky_ex": "fails on samples that are not positive definite",
    "linalg_pinv": "has no sample but those of zeros",
    **dict.fromkeys(["_unique2", "unique_dim", "unique_consecutive"], "how many come out depends on values"),
    "masked_fill": "by its value: 0 alone",
    "native_dropout": "is none in eval mode",
}

UNTRIED = {"_to_copy", "alias", "lift_fresh"}  # arise in export alone


@pytest.fixture(scope="module")
def samples() -> list:
    """Torch's own, by operator. They come with its tests, which want a package that is not needed here."""
    stub = types.ModuleType("expecttest")
    stub.TestCase = stub.assert_expected_inline = object
    sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db

    # That import forbids the whole process to set flags of cuDNN and others.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return [operator for operator in op_db if torch.float32 in operator.dtypes]


class Watched(fx.Interpreter):
    """Runs a graph and yields its nodes with the values of their first argument and of their results."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.seen: list[tuple[fx.Node, Tensor, list[Tensor]]] = []

    def run_node(self, node: fx.Node):
        result = super().run_node(node)
        first = self.env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(first, Tensor) and first.is_floating_point() and node.op == "call_function":
            found = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
            self.seen.append((node, first, [value for value in found if value.is_floating_point()]))
        return result


def calls(operator) -> Iterator[tuple[fx.Node, Tensor, list[Tensor]]]:
    """Calls of aten's operators that samples of `operator` come down to, on values of every magnitude."""
    random = torch.Generator().manual_seed(0)
    samples = list(operator.sample_inputs("cpu", torch.float32))
    for sample in samples[:4] + samples[4 :: len(samples) // 6 | 1]:
        leaves, spec = pytree.tree_flatten(sample.input)
        leaves = [
            torch.randn(leaf.shape, generator=random) * torch.randn(leaf.shape, generator=random).mul(4).exp()
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for leaf in leaves
        ]

        def call(*leaves, sample=sample, spec=spec):
            return operator.op(pytree.tree_unflatten(list(leaves), spec), *sample.args, **sample.kwargs)

        try:
            watched = Watched(make_fx(call, pre_dispatch=True)(*leaves))
            watched.run(*leaves)
        except Exception:  # samples of lists without tensors, of values that must be positive definite, ...
            continue
        yield from watched.seen


def _is_ordinary(value: Tensor) -> bool:
    return value.layout is torch.strided and value.numel() > 0 and bool(value.isfinite().all())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_operators_that_move_values_are_known_and_no_others(samples):
    wrong: set[str] = set()
    moved: dict[str, list[bool]] = {}
    believed: set[str] = set()
    for operator in samples:
        for node, before, after in calls(operator):
            if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
                continue
            if not after or before.numel() < 2 or not all(map(_is_ordinary, [before, *after])):
                continue
            name = node.target._opname
            allowed = torch.cat([before.flatten(), torch.zeros(1, dtype=before.dtype)])
            moves = all(value.dtype == before.dtype and torch.isin(value, allowed).all() for value in after)
            moved.setdefault(name, []).append(bool(moves))
            if preserves_values(node):
                believed.add(name)
                if not moves:
                    wrong.add(str(node.target))
    assert not wrong
    assert len(moved) > 300
    assert {name for name, found in moved.items() if all(found)} - believed - EXCEPT.keys() == set()
    assert MOVES - believed == UNTRIED
