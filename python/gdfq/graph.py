"""Capture the user's model as a graph, and rewrite that graph into the teacher and the quantized model.

Everything goes through `torch.export`, so it does not matter how the model is written: modules or functional calls,
lambdas, in-place operators, one activation module used ten times. The captured graph is first brought to a normal form
(`capture`), in which BN and the activation behind it are one node. The teacher (`build_teacher`) and the quantized
model (`build_quantized`) are two rewritings of it. Parameters keep the names they have in the user's model.
"""

import copy
import math
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

import gdfq_ext
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.modules import ActivationQuantizer, BatchNormAct, BatchNormActQuantizer, WeightQuantizer

aten = torch.ops.aten

_CONVOLUTIONS = {
    overload: name
    for name, packet in (("conv1d", aten.conv1d), ("conv2d", aten.conv2d), ("conv3d", aten.conv3d))
    for overload in (packet.default, packet.padding)
}
_WEIGHTED = {**_CONVOLUTIONS, aten.linear.default: "linear"}
_FROZEN_BATCH_NORM = aten._native_batch_norm_legit_no_training.default

# Operators that move or pick values and compute none: what comes out is on the same grid as what went in. Zero is a
# point of every grid (the zero point of Eq. 6 is an integer), so padding with zeros is one of them.
_VALUE_PRESERVING = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.slice.Tensor, aten.select.int,
    aten.clone.default, aten.expand.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.flip.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.max_pool2d_with_indices.default,
    aten.adaptive_max_pool2d.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.channel_shuffle.default, aten.upsample_nearest2d.vec, aten.index_select.default, aten.expand_as.default,
    operator.getitem,
}  # fmt: skip
# Shape arithmetic and checks: no activation is computed there.
_BOOKKEEPING = {aten.sym_size.int, aten._assert_tensor_metadata.default, aten._assert_scalar.default}
_NOT_QUANTIZED = {
    "conv_transpose": "transposed convolution: Eq. 6 per output channel is not defined for its weight layout",
    "matmul": "matrix product outside a linear layer",
    "addmm": "matrix product outside a linear layer",
    "bmm": "matrix product outside a linear layer",
    "batch_norm": "BatchNorm without running statistics",
    "group_norm": "normalisation by the input's own statistics",
    "layer_norm": "normalisation by the input's own statistics",
    "instance_norm": "normalisation by the input's own statistics",
}


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


@dataclass(frozen=True)
class CapturedModel:
    """A model in normal form.

    Attributes:
        module: the graph; its parameters and buffers have the names of the user's model, and are a copy.
        image_shape: `(channels, height, width)`.
        num_classes: length of the logits.
    """

    module: fx.GraphModule
    image_shape: tuple[int, int, int]
    num_classes: int


@dataclass(frozen=True)
class WeightEntry:
    """A layer whose weight is quantized."""

    name: str
    op: str
    bits: int


@dataclass(frozen=True)
class ActivationEntry:
    """An activation that is quantized; `fused` names what the quantizer is one pass with."""

    name: str
    bits: int
    fused: str


@dataclass(frozen=True)
class FloatEntry:
    """Something that stayed float, and why."""

    name: str
    op: str
    reason: str


@dataclass
class Account:
    """What was quantized and what stayed float, and why. `str()` is for people, `to_dict()` for machines."""

    weights: list[WeightEntry] = field(default_factory=list)
    activations: list[ActivationEntry] = field(default_factory=list)
    stayed_float: list[FloatEntry] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"weights      {len(self.weights)} layers at {_bits(self.weights)} bits, per output channel"]
        fused = sum(entry.fused != "" for entry in self.activations)
        lines.append(
            f"activations  {len(self.activations)} at {_bits(self.activations)} bits, per tensor"
            + (f" ({fused} in one pass with their BatchNorm)" if fused else "")
        )
        by_reason: dict[str, list[str]] = {}
        for entry in self.stayed_float:
            by_reason.setdefault(f"{entry.op}: {entry.reason}", []).append(entry.name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"stayed float {len(names)} x {reason} ({shown})")
        return "\n".join(lines)


def _bits(entries: list) -> str:
    return "/".join(str(bits) for bits in sorted({entry.bits for entry in entries})) or "-"


# --- capture -----------------------------------------------------------------------------------------------------


def capture(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
) -> CapturedModel:
    """Capture `model` in eval mode with a dynamic batch. The model itself is not changed.

    Args:
        model: takes one image batch `(N, channels, height, width)` and returns logits `(N, classes)`.
        image_size: height and width, or one number for both; default: what the model says of itself (`in_size` of
            pytorchcv, `default_cfg` of timm).
        channels: default: the input channels of its first convolution.
        device: where the copy lives.

    Raises:
        GdfqError: no BN layer with running statistics, shape not known or rejected, not capturable (with the line).
    """
    shape = _image_shape(model, image_size, channels)
    try:
        model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    except Exception as error:
        raise GdfqError(f"the model cannot be copied: {error}") from error
    example = torch.randn(2, *shape, device=device)
    num_classes = _try_model(model, example)
    module = fx.GraphModule(*_export(model, example))
    _to_normal_form(module)
    if not any(node.target is batch_norm_act for node in module.graph.nodes):
        raise GdfqError(
            "the model has no BatchNorm layer with running statistics: the generator learns from them, so there is "
            "nothing to learn from. If BatchNorm was folded into the convolutions, use the model from before that."
        )
    return CapturedModel(module, shape, num_classes)


def _image_shape(
    model: nn.Module, image_size: int | tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    timm_shape = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if image_size is None:
        image_size = getattr(model, "in_size", None) or (timm_shape and timm_shape[1:])
        if image_size is None:
            raise GdfqError(
                "the image size cannot be read off the model: give it as `image_size` (`--image-size` on the command "
                "line), for example 32 for CIFAR or 224 for most ImageNet models"
            )
    if channels is None:
        convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
        channels = timm_shape[0] if timm_shape else getattr(next(convolutions, None), "in_channels", 3)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return channels, int(height), int(width)


@torch.no_grad()
def _try_model(model: nn.Module, example: Tensor) -> int:
    """Run the model once and return the number of classes."""
    shape = tuple(example.shape[1:])
    try:
        logits = model(example)
    except Exception as error:
        raise GdfqError(
            f"the model rejects images of shape {shape} (channels, height, width){_user_line(error)}: "
            f"{_first_line(error)}\nGive the right shape as `image_size` and `channels`."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(example):
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise GdfqError(
            f"the model must return logits (N, classes) for images (N, channels, height, width), but returned {what} "
            f"for {tuple(example.shape)}; wrap it in a module that picks the logits"
        )
    if not logits.isfinite().all():
        raise GdfqError("the model's logits are NaN or Inf on Gaussian noise: its weights or BN statistics are broken")
    return logits.shape[1]


def _export(model: nn.Module, example: Tensor) -> tuple[nn.Module, fx.Graph]:
    """Export, functionalise (no in-place operator is left) and return root and graph with one input, one output."""
    dynamic_batch = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic_batch, strict=False)
            module = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise GdfqError(
            f"the model cannot be captured as a graph{_user_line(error)}: {_first_line(error)}\n"
            "Its forward pass must not depend on the values of tensors, nor on the batch size."
        ) from error
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copied)
    graph.output(output[0] if isinstance(output, (tuple, list)) else output)
    graph.set_codegen(CodeGen())
    return module, graph


def _user_line(error: BaseException) -> str:
    """Where in the user's code `error` arose: the innermost frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} (`{frames[-1].line}`)" if frames else ""


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _to_normal_form(module: fx.GraphModule) -> None:
    """Bring the graph to the form that the rewritings start from: see the module's docstring."""
    graph = module.graph
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for node in list(graph.nodes):
        if node.op == "get_attr":  # a layer that the model has under several names goes by its first
            node.target = names.get(id(operator.attrgetter(node.target)(module)), node.target)
        elif node.target is aten.view.default:  # a view of a contiguous tensor; a channels_last one must be copied
            node.target = aten.reshape.default
        elif node.target is aten.copy.default:  # what `y[...] = x` becomes; it has no derivative
            destination, source = node.args[:2]
            node.target, node.args = aten.expand_as.default, (source, destination)
        elif node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
        elif node.target is _FROZEN_BATCH_NORM:
            _merge_batch_norm(graph, node)
    for node in graph.nodes:
        if node.target is batch_norm_act and len(node.users) == 1:
            (user,) = node.users
            act = activation_name(user)
            if act:
                node.args = (*node.args[:-1], act)
                node.meta["name"] = node.meta.get("name") or _name(node)
                user.replace_all_uses_with(node)
                graph.erase_node(user)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _merge_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Replace the BN operator, which returns three tensors of which one is used, by a `batch_norm_act` node."""
    x, weight, bias, running_mean, running_var, _momentum, eps = node.args
    with graph.inserting_before(node):
        merged = graph.call_function(batch_norm_act, (x, running_mean, running_var, weight, bias, eps, "none"))
    merged.meta = {**node.meta, "val": None}
    for getitem in list(node.users):
        merged.meta["val"] = getitem.meta.get("val")
        getitem.replace_all_uses_with(merged)
        graph.erase_node(getitem)
    graph.erase_node(node)


def activation_name(node: fx.Node) -> str:
    """`relu`, `relu6`, or an empty string if `node` is neither, however it was written."""
    if node.op != "call_function":
        return ""
    bounds = tuple(node.args[1:]) + tuple(node.kwargs.get(name) for name in ("min", "max") if name in node.kwargs)
    clamped = node.target in (aten.clamp.default, aten.hardtanh.default, aten.clamp_min.default)
    if node.target is aten.relu.default or (clamped and bounds in ((0,), (0, None))):
        return "relu"
    if node.target is aten.relu6.default or (clamped and bounds == (0, 6)):
        return "relu6"
    return ""


def _name(node: fx.Node) -> str:
    """What the user calls this place: the layer's or module's path, or path and operator for a functional call."""
    if node.target in _WEIGHTED and node.args[1].op == "get_attr":
        return node.args[1].target.removesuffix(".weight")
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (stack[-1][0], str(stack[-1][1])) if stack else ("", "")
    is_layer = kind.startswith("torch.nn.modules.") and not kind.startswith("torch.nn.modules.container")
    if path and is_layer:
        return path
    return f"{path}.{node.name}".lstrip(".")


# --- the teacher -------------------------------------------------------------------------------------------------


class BatchNormStatistics(NamedTuple):
    """Of the input of every BN layer, `(C_l,)` float32 each: the arguments of `gdfq_ext.bns_loss` (Eq. 5).

    Attributes:
        means, variances: over the batch, the variance biased, with gradients to the images.
        running_means, running_vars: what the model remembers of its training.
    """

    means: list[Tensor]
    variances: list[Tensor]
    running_means: list[Tensor]
    running_vars: list[Tensor]


class Teacher(nn.Module):
    """The full-precision model P, frozen, in eval mode, able to say what its BN layers saw.

    `teacher(x)` gives logits `(N, classes)`, `teacher.with_statistics(x)` the logits and the `BatchNormStatistics`.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module.requires_grad_(False)

    def with_statistics(self, x: Tensor) -> tuple[Tensor, BatchNormStatistics]:
        logits, statistics = self.graph_module(x)
        return logits, BatchNormStatistics(*statistics)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph_module(x)[0]


def build_teacher(captured: CapturedModel) -> Teacher:
    """Rewrite the captured model so that every BN also gives the moments of its input, in the same pass."""
    module = copy.deepcopy(captured.module)
    graph = module.graph
    statistics = BatchNormStatistics([], [], [], [])
    for node in _batch_norms(graph):
        *tensors, eps, act = node.args
        with graph.inserting_before(node):
            fused = graph.call_function(gdfq_ext.batch_norm_act_moments, tuple(tensors), {"eps": eps, "act": act})
            y, mean, var = (graph.call_function(operator.getitem, (fused, i)) for i in range(3))
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        for values, value in zip(statistics, (mean, var, *tensors[1:3]), strict=True):
            values.append(value)
    output = _output(graph)
    output.args = ((output.args[0], tuple(statistics)),)
    graph.lint()
    module.recompile()
    return Teacher(module)


def _batch_norms(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in list(graph.nodes) if node.target is batch_norm_act)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


# --- the quantized model -----------------------------------------------------------------------------------------


def build_quantized(captured: CapturedModel, config: QuantizerConfig) -> tuple[fx.GraphModule, Account]:
    """Rewrite the captured model into Q: quantizers inserted by placement, ranges not observed yet.

    The parameters are a copy that takes gradients. New modules are `weight_quantizer`, `activation_quantizers.*` and
    `batch_norms.*`; of these only the activation ranges enter the state dict, everything else in it has its old name.

    Returns:
        the model, an ordinary module `(N, C, H, W) -> (N, classes)`, and the account of what was done.
    """
    return _Rewriter(copy.deepcopy(captured.module), config).run()


class _Rewriter:
    """One pass over a captured graph that turns it into a quantized one."""

    def __init__(self, module: fx.GraphModule, config: QuantizerConfig) -> None:
        self.module = module
        self.graph = module.graph
        self.config = config
        self.account = Account()
        self.on_grid: set[fx.Node] = set()
        module.weight_quantizer = WeightQuantizer(config.weight_bits, config.straight_through)
        module.activation_quantizers = nn.ModuleDict()
        module.batch_norms = nn.ModuleDict()

    def run(self) -> tuple[fx.GraphModule, Account]:
        wanted = self._values_to_quantize()
        for node in list(self.graph.nodes):
            result = self._rewrite_batch_norm(node, node in wanted) if node.target is batch_norm_act else node
            if node in wanted and result not in self.on_grid and not self._keeps_grid(result):
                self._quantize_value(result)
            elif self._keeps_grid(result):
                self.on_grid.add(result)
        self._account_for_float()
        self._quantize_weights()
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return self.module, self.account

    def _values_to_quantize(self) -> set[fx.Node]:
        """The activations that the placement names (`paper` or `deploy`)."""
        nodes = list(self.graph.nodes)
        if self.config.placement == "paper":
            return {
                node
                for node in nodes
                if activation_name(node) or (node.target is batch_norm_act and node.args[-1] != "none")
            }
        return {source for node in nodes for source in _quantized_inputs(node)}

    def _keeps_grid(self, node: fx.Node) -> bool:
        return _preserves_values(node) and node.all_input_nodes[0] in self.on_grid

    def _rewrite_batch_norm(self, node: fx.Node, quantize: bool) -> fx.Node:
        *tensors, eps, act = node.args
        name = node.meta.get("name") or _name(node)
        new: nn.Module = BatchNormAct(eps, act)
        container = "batch_norms"
        if quantize:
            new = BatchNormActQuantizer(new, self._new_quantizer(node))
            container = "activation_quantizers"
        with self.graph.inserting_before(node):
            result = self._call(container, name, new, tuple(tensors))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        if quantize:
            self._record(result, "batch_norm" if act == "none" else f"batch_norm, {act}", new.quantizer.bits)
        return result

    def _quantize_value(self, node: fx.Node) -> None:
        quantizer = self._new_quantizer(node)
        with self.graph.inserting_after(node):
            result = self._call("activation_quantizers", _name(node), quantizer, (node,))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        self._record(result, "", quantizer.bits)

    def _new_quantizer(self, node: fx.Node) -> ActivationQuantizer:
        bits = self.config.input_bits if is_image(node) else self.config.activation_bits
        return ActivationQuantizer(bits, self.config.straight_through)

    def _call(self, container: str, name: str, module: nn.Module, args: tuple) -> fx.Node:
        modules = self.module.get_submodule(container)
        base = name.replace(".", "_")
        key = next(k for k in (base if i == 0 else f"{base}_{i}" for i in range(len(modules) + 1)) if k not in modules)
        modules[key] = module
        return self.graph.call_module(f"{container}.{key}", args)

    def _record(self, result: fx.Node, fused: str, bits: int) -> None:
        self.on_grid.add(result)
        self.account.activations.append(ActivationEntry(str(result.target).split(".", 1)[1], bits, fused))

    def _account_for_float(self) -> None:
        """Name every input of a quantized layer or residual add, and every operator, that stays float."""
        for node in self.graph.nodes:
            for source in _quantized_inputs(node):
                if source not in self.on_grid:
                    what = "image" if is_image(source) else "activation"
                    reason = f"placement '{self.config.placement}' quantizes the outputs of ReLU and ReLU6 only"
                    self.account.stayed_float.append(FloatEntry(_name(node), f"input {what} of {_op(node)}", reason))
            if _computes_in_float(node):
                op = _op(node)
                reason = next(
                    (why for key, why in _NOT_QUANTIZED.items() if key in op), "computed in float between quantizers"
                )
                self.account.stayed_float.append(FloatEntry(_name(node), op, reason))

    def _quantize_weights(self) -> None:
        """All parameters that are weights in one call at the top; weights that the graph computes, where they arise."""
        users = [node for node in self.graph.nodes if node.target in _WEIGHTED]
        weights = list(dict.fromkeys(node.args[1] for node in users))
        entries = [WeightEntry(_name(node), _op(node), self.config.weight_bits) for node in users]
        self.account.weights.extend(dict.fromkeys(entries))  # a layer that is called twice is one layer
        stored = [weight for weight in weights if weight.op == "get_attr"]
        groups = [stored] if stored else []
        groups += [[weight] for weight in weights if weight.op != "get_attr"]
        for group in groups:
            last = max(group, key=list(self.graph.nodes).index)
            with self.graph.inserting_after(last):
                quantized = self.graph.call_module("weight_quantizer", (group,))
            for index, weight in reversed(list(enumerate(group))):
                with self.graph.inserting_after(quantized):
                    item = self.graph.call_function(operator.getitem, (quantized, index))
                for user in [user for user in weight.users if user.target in _WEIGHTED]:
                    user.update_arg(1, item)


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear layer of Q whose quantized weight is a stored parameter.

    Attributes:
        node: where Q's graph calls it.
        weight, bias: names of its parameters; `bias` is None where it has none.
        groups: of the convolution; 1 for a linear layer.
    """

    node: fx.Node
    weight: str
    bias: str | None
    groups: int


def quantized_layers(student: fx.GraphModule) -> list[QuantizedLayer]:
    """The layers of Q, from `build_quantized`, in the order of the forward pass; those are left out whose weight the
    graph computes."""
    layers = []
    for node in student.graph.nodes:
        if node.target in _WEIGHTED:
            call, index = node.args[1].args  # the item that the call of `weight_quantizer` gives for this layer
            weight, bias = call.args[0][index], node.args[2] if len(node.args) > 2 else None
            if weight.op == "get_attr":
                groups = node.args[6] if len(node.args) > 6 else 1
                layers.append(QuantizedLayer(node, weight.target, bias and str(bias.target), groups))
    return layers


def quantizer_of(student: fx.GraphModule, node: fx.Node) -> ActivationQuantizer | None:
    """The quantizer that `node` of Q's graph calls, alone or in one pass with a BN."""
    module = student.get_submodule(node.target) if node.op == "call_module" else None
    module = module.quantizer if isinstance(module, BatchNormActQuantizer) else module
    return module if isinstance(module, ActivationQuantizer) else None


def _quantized_inputs(node: fx.Node) -> list[fx.Node]:
    """What an integer runtime reads as integers at `node`: the input of a layer, both inputs of a residual add."""
    if node.target in _WEIGHTED:
        return [node.args[0]]
    if node.target is aten.add.Tensor and len(node.args) == 2:
        sources = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        dims = [getattr(source.meta.get("val"), "ndim", 0) for source in sources]
        return sources if len(sources) == 2 and min(dims) > 1 else []
    return []


def _preserves_values(node: fx.Node) -> bool:
    """Whether `node` only moves or picks values of its first input, so that they stay on their grid."""
    if not node.all_input_nodes:
        return False
    if node.target in _VALUE_PRESERVING:
        return True
    if node.target is aten.constant_pad_nd.default:
        return not node.args[2:] or node.args[2] == 0
    return node.target is aten.pad.default and (
        not node.args[2:] or node.args[2] != "constant" or not any(node.args[3:])
    )


def _computes_in_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, Tensor) or not value.is_floating_point():
        return False  # sizes, indices, masks
    if not any(isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes):
        return False  # constants
    known = node.target in _WEIGHTED or node.target in _BOOKKEEPING
    return not (known or _preserves_values(node) or activation_name(node) or _quantized_inputs(node))


def is_image(node: fx.Node) -> bool:
    """Whether `node` is the network's input, padded or cut at most."""
    return node.op == "placeholder" or (_preserves_values(node) and is_image(node.all_input_nodes[0]))


def _op(node: fx.Node) -> str:
    target: Callable | str = node.target
    return _WEIGHTED.get(target) or getattr(target, "_opname", None) or getattr(target, "__name__", str(target))


def size_in_bytes(captured: CapturedModel, account: Account) -> tuple[int, int]:
    """Bytes of the parameters in float32 and with the quantized weights packed at their bits (ranges not counted)."""
    parameters = {name: value.numel() for name, value in captured.module.named_parameters()}
    bits = {f"{entry.name}.weight": entry.bits for entry in account.weights}
    return 4 * sum(parameters.values()), math.ceil(sum(n * bits.get(name, 32) for name, n in parameters.items()) / 8)
