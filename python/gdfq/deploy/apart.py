"""Operators that the writer does not know, taken apart into those that it does, as PyTorch itself decomposes them."""

from collections.abc import Container
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from gdfq.deploy.trial import SHAPE_ALONE
from gdfq.graph.added import free_name
from gdfq.graph.nodes import WEIGHTED, op_of

_BATCH = 2
# Of the namespace prims, what is as aten's of that name.
_SAME_PRIMS = ("abs", "add", "div", "exp", "log", "mul", "neg", "rsqrt", "sqrt", "sub", "where")


def taken_apart(student: fx.GraphModule, image_shape: tuple[int, int, int], known: Container[str]) -> fx.GraphModule:
    """Q, in which nodes that are not known are replaced by such that are, as far as there are any; Q itself, where all
    are known.

    Args:
        student: Q, which is left as it is.
        image_shape: `(channels, height, width)`.
        known: names of operators.
    """
    if not any(_is_unknown(node, known) for node in student.graph.nodes):
        return student
    graph = fx.Graph()
    graph.output(graph.graph_copy(student.graph, {}))
    result = fx.GraphModule(student, graph)
    inputs = _Inputs(result, known)
    with torch.no_grad():
        inputs.run(torch.randn(_BATCH, *image_shape, generator=torch.Generator().manual_seed(0)))
    for node in [node for node in graph.nodes if _is_unknown(node, known)]:
        _take_apart(result, node, inputs.values, known)
    graph.eliminate_dead_code()
    result.recompile()
    return result


def _is_unknown(node: fx.Node, known: Container[str]) -> bool:
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not node.meta.get("of_image"):
        return False
    op = op_of(node)
    if node.target.namespace == "prims" and op not in _SAME_PRIMS:
        return True
    return op not in known and op not in SHAPE_ALONE and node.target not in WEIGHTED


class _Inputs(fx.Interpreter):
    """Runs Q and keeps what unknown nodes read, by the nodes that give it."""

    def __init__(self, module: fx.GraphModule, known: Container[str]) -> None:
        super().__init__(module)
        self.known = known
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        if _is_unknown(n, self.known):
            self.values |= {source: self.env[source] for source in n.all_input_nodes}
        return super().run_node(n)


def _take_apart(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], known: Container[str]) -> None:
    """Replace a node, in `values` as well, if all that it is made of is known."""
    sources = node.all_input_nodes

    def call(*given: Any) -> Any:
        by_node = dict(zip(sources, given, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), by_node.__getitem__)
        return node.target(*args, **kwargs)

    table = {op: apart for op, apart in decomposition_table.items() if getattr(op, "_opname", "") not in known}
    try:
        with fx_config.patch(use_duck_shape=False), sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # type: ignore[attr-defined]
            trace = partial(make_fx, decomposition_table=table, tracing_mode="symbolic")
            given = [values[source] for source in sources]
            written_in_place = trace(call)(*given)
            parts = trace(torch.func.functionalize(written_in_place, remove="mutations"))(*given)
    except Exception:  # what cannot be traced stays, and is named by who meets it
        return
    parts.graph.eliminate_dead_code()
    for part in parts.graph.nodes:
        of_image = part.op == "placeholder" or any(source.meta["of_image"] for source in part.all_input_nodes)
        value = part.meta.get("val")
        part.meta = node.meta | {
            "of_image": of_image and not isinstance(value, torch.SymInt | torch.SymFloat),
            "val": value,
        }
    if any(_is_unknown(part, known) for part in parts.graph.nodes):
        return
    for part in parts.graph.find_nodes(op="get_attr"):
        name = free_name(module, "constant")
        module.register_buffer(name, getattr(parts, part.target))
        part.target = name
    with module.graph.inserting_before(node):
        copied = dict(zip(parts.graph.find_nodes(op="placeholder"), sources, strict=True))
        found = module.graph.graph_copy(parts.graph, copied)
    several = {} if isinstance(found, fx.Node) else {user: found[user.args[1]] for user in node.users}
    for old, new in (several or {node: found}).items():
        old.replace_all_uses_with(new)
        if old in values:
            values[new] = values[old]
    for old in [*several, node]:
        module.graph.erase_node(old)
