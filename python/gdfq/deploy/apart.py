"""Operators that the writer does not know, taken apart into those that it does, as PyTorch itself decomposes them."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from gdfq.deploy.trial import SHAPE_ALONE, noise
from gdfq.graph.added import free_name
from gdfq.graph.nodes import WEIGHTED, holds_tensors, op_of

# Of the namespace prims, what is as aten's of that name.
_SAME_PRIMS = ("abs", "add", "div", "exp", "log", "mul", "neg", "rsqrt", "sqrt", "sub", "where")


def taken_apart(student: fx.GraphModule, image_shape: tuple[int, int, int], known: Collection[str]) -> fx.GraphModule:
    """Q, in which nodes that are not known are replaced by such that are, as far as there are any; Q itself, where all
    are known.

    Args:
        student: Q, which is left as it is.
        image_shape: `(channels, height, width)`.
        known: names of operators, those of layers and of constants aside.
    """
    known = {*known, *SHAPE_ALONE, *WEIGHTED.values()}
    if not any(_is_unknown(node, known) for node in student.graph.nodes):
        return student
    graph = fx.Graph()
    graph.output(graph.graph_copy(student.graph, {}))
    result = fx.GraphModule(student, graph)
    inputs = _Inputs(result, known)
    with torch.no_grad():
        inputs.run(next(noise(student, image_shape)))
    table = {op: parts for op, parts in decomposition_table.items() if getattr(op, "_opname", "") not in known}
    for node in [node for node in graph.nodes if _is_unknown(node, known)]:
        parts = _parts(node, [inputs.values[source] for source in node.all_input_nodes], table)
        if parts is not None and not any(_is_unknown(part, known) for part in parts.graph.nodes):
            _replace(result, node, parts, inputs.values)
    graph.eliminate_dead_code()
    result.recompile()
    return result


def _is_unknown(node: fx.Node, known: Collection[str]) -> bool:
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not node.meta.get("of_image"):
        return False
    op = op_of(node)
    return op not in known or (node.target.namespace == "prims" and op not in _SAME_PRIMS)


class _Inputs(fx.Interpreter):
    """Runs Q and keeps what unknown nodes read, by the nodes that give it."""

    def __init__(self, module: fx.GraphModule, known: Collection[str]) -> None:
        super().__init__(module)
        self.known = known
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if _is_unknown(n, self.known):
            self.values |= {source: self.env[source] for source in n.all_input_nodes}
        return super().run_node(n)


def _parts(node: fx.Node, given: list[Any], table: dict[Any, Any]) -> fx.GraphModule | None:
    """What a node is made of, a function of what it reads, which is `given`; None if PyTorch does not know it."""

    def call(*values: Any) -> Any:
        by_node = dict(zip(node.all_input_nodes, values, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_node.__getitem__)
        return node.target(*args, **kwargs)

    trace = partial(make_fx, decomposition_table=table, tracing_mode="symbolic")
    every_size_its_own = fx_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    try:
        with every_size_its_own, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            parts = trace(torch.func.functionalize(trace(call)(*given), remove="mutations"))(*given)
    except Exception:  # what cannot be traced stays, and is named by who meets it
        return None
    parts.graph.eliminate_dead_code()
    for part in parts.graph.nodes:
        part.meta = node.meta | {"val": part.meta.get("val")}
        of_image = any(source.meta["of_image"] for source in part.all_input_nodes)
        part.meta["of_image"] = part.op == "placeholder" or (of_image and holds_tensors(part))
    return parts


def _replace(module: fx.GraphModule, node: fx.Node, parts: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Put parts in the place of a node, in `values` as well."""
    for part in parts.graph.find_nodes(op="get_attr"):
        name = free_name(module, "constant")
        module.register_buffer(name, getattr(parts, part.target))
        part.target = name
    with module.graph.inserting_before(node):
        copied = dict(zip(parts.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
        found = module.graph.graph_copy(parts.graph, copied)
    several = {} if isinstance(found, fx.Node) else {user: found[user.args[1]] for user in node.users}
    for old, new in (several or {node: found}).items():
        old.replace_all_uses_with(new)
        if old in values:
            values[new] = values[old]
    for old in [*several, node]:
        module.graph.erase_node(old)
