"""What the nodes of a captured graph are: layers, activations, operators that only move values, and their names."""

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

CONVOLUTIONS = {
    overload: name
    for name, packet in (("conv1d", aten.conv1d), ("conv2d", aten.conv2d), ("conv3d", aten.conv3d))
    for overload in (packet.default, packet.padding)
}
WEIGHTED = {**CONVOLUTIONS, aten.linear.default: "linear"}

# Operators that move or pick values of their first argument and compute none (views, copies, picks): what comes out is
# on the same grid as what went in. Zero is a point of every grid (the zero point of Eq. 6 is an integer), so padding
# with zeros is one of them. `tests/gdfq/graph/test_operators.py` finds out which operators do that.
_MOVES = """
    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_to chunk detach diagonal dsplit expand
    expand_as flatten hsplit lift_fresh linalg_diagonal mH mT matrix_H movedim narrow numpy_T permute positive ravel
    real reshape reshape_as resolve_conj resolve_neg select slice split split_with_sizes squeeze t tensor_split
    transpose unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as vsplit
    alias_copy as_strided_copy channel_shuffle clone combinations im2col conj_physical diag diag_embed diagflat
    diagonal_copy expand_copy fft_fftshift fft_ifftshift flip fliplr flipud lift_fresh_copy narrow_copy
    permute_copy pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 split_with_sizes_copy
    squeeze_copy t_copy tile to transpose_copy tril triu unbind_copy unfold_copy unsqueeze_copy view_copy
    _to_copy _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin aminmax cummax cummin embedding gather
    hardshrink index index_select kthvalue masked_select max max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d median min mode msort
    nanmedian sort take take_along_dim topk
"""
MOVES = frozenset(_MOVES.split())
BOUNDS: dict[str, tuple[float, float | None]] = {"relu": (0.0, None), "relu6": (0.0, 6.0)}  # what they clamp to
_CLAMPS = (
    aten.clamp.default, aten.clip.default, aten.hardtanh.default, aten.clamp_min.default, aten.clamp_max.default,
)  # fmt: skip
_UNCHANGED_BY = {"add": 0, "sub": 0, "mul": 1, "div": 1}  # as Python's `sum` begins
_SHAPE_OF_SECOND = {"expand_as", "reshape_as", "view_as"}  # operators that read of another tensor its shape alone


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
) -> Tensor:
    """The normal form's node for a frozen BN and its activation. It marks a place to rewrite and is never run."""
    raise AssertionError("a batch_norm_act node was left in a rewritten graph")


def activation_name(node: fx.Node) -> str:
    """`relu`, `relu6`, or an empty string if `node` is neither, however it was written."""
    if node.op != "call_function":
        return ""
    if node.target in (aten.relu.default, aten.relu6.default):
        return op_of(node)
    if node.target is aten.threshold.default:
        return "relu" if node.args[1:] == (0, 0) else ""
    if node.target is aten.clamp_max.default or not is_clamp(node):
        return ""
    bounds = tuple(node.args[1:]) + tuple(node.kwargs.get(name) for name in ("min", "max") if name in node.kwargs)
    return next((name for name, clamped in BOUNDS.items() if (*bounds, None)[:2] == clamped), "")


def is_clamp(node: fx.Node) -> bool:
    return node.target in _CLAMPS


def name_of(node: fx.Node) -> str:
    """What the user calls this place: the layer's or module's path, or path and operator for a functional call."""
    if node.target in WEIGHTED and node.args[1].op == "get_attr":
        return node.args[1].target.removesuffix(".weight")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], str(stack[-1][1])) if stack else ("", "")
    is_layer = kind.startswith("torch.nn.modules.") and not kind.startswith("torch.nn.modules.container")
    if path and is_layer and not (node.target in WEIGHTED and _is_one_of_several(node)):
        return path
    return f"{path}.{node.name}".lstrip(".")


def _is_one_of_several(layer: fx.Node) -> bool:
    """Whether the same call of a module calls another layer, too, as attention does."""
    call = list(layer.meta["nn_module_stack"])
    layers = [node for node in layer.graph.nodes if node.target in WEIGHTED and node.args[1].op != "get_attr"]
    return sum(list(node.meta.get("nn_module_stack") or ()) == call for node in layers) > 1


def layer_inputs(node: fx.Node) -> list[fx.Node]:
    """What a convolution or linear layer reads, its weight aside."""
    return [node.args[0]] if node.target in WEIGHTED else []


def sum_inputs(node: fx.Node) -> list[fx.Node]:
    """Both of a residual add."""
    if node.target is not aten.add.Tensor:
        return []
    sources = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg.meta.get("of_image")]
    dims = [_dimensions(source) for source in sources]
    return sources if len(sources) == 2 and min(dims) > 1 else []


def average_pool_inputs(node: fx.Node) -> list[fx.Node]:
    """That of a pooling by averages, a mean over all places of an image included."""
    if is_image(node) or not node.meta.get("of_image"):
        return []
    source, count = node.args[0], _dimensions(node.args[0])
    if node.target is aten.mean.dim and count > 2 and node.args[1]:
        return [source] if all(dim % count >= 2 for dim in node.args[1]) else []
    return [source] if re.fullmatch(r"(adaptive_)?avg_pool[123]d", op_of(node)) else []


def concatenation_inputs(node: fx.Node) -> list[fx.Node]:
    """Those of a concatenation; of one among them, its own are quantized already."""
    if node.target is not aten.cat.default or is_image(node):
        return []
    return [source for source in node.args[0] if source.meta.get("of_image") and source.target is not node.target]


INPUTS: dict[str, Callable[[fx.Node], list[fx.Node]]] = {  # by what a target says of them
    "layer_inputs": layer_inputs,
    "sum_inputs": sum_inputs,
    "average_pool_inputs": average_pool_inputs,
    "concatenation_inputs": concatenation_inputs,
}


def _dimensions(node: fx.Node | Any) -> int:
    return getattr(node.meta.get("val"), "ndim", 0) if isinstance(node, fx.Node) else 0


def preserves_values(node: fx.Node) -> bool:
    """Whether `node` only moves or picks values of its first input, so that they stay on their grid."""
    if node.op != "call_function" or not node.args or node.all_input_nodes[:1] != [node.args[0]]:
        return False
    if node.target is operator.getitem:
        return True
    op, value = op_of(node), node.args[2] if len(node.args) > 2 else 0
    if op == "constant_pad_nd" or op == "masked_fill":
        return value == 0
    if op == "pad":
        return value != "constant" or not any(node.args[3:])
    if op in _UNCHANGED_BY and len(node.all_input_nodes) == 1:
        return node.args[1] == _UNCHANGED_BY[op] and _types(node) == _types(node.args[0])
    others = [] if op in _SHAPE_OF_SECOND else node.all_input_nodes[1:]
    return (
        op in MOVES
        and getattr(node.target, "namespace", "") == "aten"
        and _types(node) == _types(node.all_input_nodes[0])
        and not any(_types(other) for other in others)  # indices and masks alone; `max` has two operands, too
    )


def _types(node: fx.Node) -> set[torch.dtype]:
    """Of the floating numbers at `node`."""
    found = node.meta.get("val")
    values = found if isinstance(found, (tuple, list)) else [found]
    return {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}


def computes(node: fx.Node) -> bool:
    """Whether `node` makes new numbers of the image's, other than by ReLU or ReLU6."""
    if node.op != "call_function" or not _types(node):
        return False  # sizes, indices, masks
    if not node.meta.get("of_image"):
        return False  # constants, weights
    return not (preserves_values(node) or activation_name(node))


def holds_tensors(node: fx.Node) -> bool:
    return any(isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta.get("val")))


def is_image(node: fx.Node) -> bool:
    """Whether `node` is the network's input, as far as its bits go: see `gdfq.graph.image`."""
    return node.meta.get("image", False)


def op_of(node: fx.Node) -> str:
    target: Callable | str = node.target
    return WEIGHTED.get(target) or getattr(target, "_opname", None) or getattr(target, "__name__", str(target))


def some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
