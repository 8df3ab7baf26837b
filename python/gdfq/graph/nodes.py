"""What the nodes of a captured graph are: layers, activations, operators that only move values, and their names."""

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CONVOLUTIONS = {
    overload: name
    for name, packet in (("conv1d", aten.conv1d), ("conv2d", aten.conv2d), ("conv3d", aten.conv3d))
    for overload in (packet.default, packet.padding)
}
WEIGHTED = {**CONVOLUTIONS, aten.linear.default: "linear"}

# Operators that move or pick values and compute none: what comes out is on the same grid as what went in. Zero is a
# point of every grid (the zero point of Eq. 6 is an integer), so padding with zeros is one of them.
VALUE_PRESERVING = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
    aten.clone.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.flip.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.max_pool2d_with_indices.default,
    aten.adaptive_max_pool2d.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.channel_shuffle.default, aten.upsample_nearest2d.vec, aten.index_select.default, aten.expand_as.default,
    operator.getitem,
}  # fmt: skip
_ACTIVATIONS = {aten.relu.default: "relu", aten.relu6.default: "relu6"}
BOUNDS: dict[str, tuple[float, float | None]] = {"relu": (0.0, None), "relu6": (0.0, 6.0)}  # what they clamp to
# Shape arithmetic and checks: no activation is computed there.
BOOKKEEPING = {aten.sym_size.int, aten._assert_tensor_metadata.default, aten._assert_scalar.default}


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
    if node.target in _ACTIVATIONS:
        return _ACTIVATIONS[node.target]
    if node.target not in (aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default):
        return ""
    bounds = tuple(node.args[1:]) + tuple(node.kwargs.get(name) for name in ("min", "max") if name in node.kwargs)
    return next((name for name, clamped in BOUNDS.items() if (*bounds, None)[:2] == clamped), "")


def name_of(node: fx.Node) -> str:
    """What the user calls this place: the layer's or module's path, or path and operator for a functional call."""
    if node.target in WEIGHTED and node.args[1].op == "get_attr":
        return node.args[1].target.removesuffix(".weight")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], str(stack[-1][1])) if stack else ("", "")
    is_layer = kind.startswith("torch.nn.modules.") and not kind.startswith("torch.nn.modules.container")
    if path and is_layer:
        return path
    return f"{path}.{node.name}".lstrip(".")


def quantized_inputs(node: fx.Node) -> list[fx.Node]:
    """What an integer runtime reads as integers at `node`: the input of a layer, both inputs of a residual add."""
    if node.target in WEIGHTED:
        return [node.args[0]]
    if node.target is aten.add.Tensor and len(node.args) == 2:
        sources = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        dims = [getattr(source.meta.get("val"), "ndim", 0) for source in sources]
        return sources if len(sources) == 2 and min(dims) > 1 else []
    return []


def preserves_values(node: fx.Node) -> bool:
    """Whether `node` only moves or picks values of its first input, so that they stay on their grid."""
    if not node.all_input_nodes:
        return False
    if node.target in VALUE_PRESERVING:
        return True
    if node.target is aten.constant_pad_nd.default:
        return not node.args[2:] or node.args[2] == 0
    return node.target is aten.pad.default and (
        not node.args[2:] or node.args[2] != "constant" or not any(node.args[3:])
    )


def computes_in_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False  # sizes, indices, masks
    if not any(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes):
        return False  # constants
    known = node.target in WEIGHTED or node.target in BOOKKEEPING
    return not (known or preserves_values(node) or activation_name(node) or quantized_inputs(node))


def is_image(node: fx.Node) -> bool:
    """Whether `node` is the network's input, padded or cut at most."""
    return node.op == "placeholder" or (preserves_values(node) and is_image(node.all_input_nodes[0]))


def op_of(node: fx.Node) -> str:
    target: Callable | str = node.target
    return WEIGHTED.get(target) or getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
