"""Rewrite the captured model into the quantized one, Q: quantizers where the target has them, bits by layer."""

import copy
import operator
import re
from fnmatch import fnmatchcase

from torch import Tensor, fx, nn

from gdfq.config import LayerBits, QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph.added import call_ahead, free_name
from gdfq.graph.capture import CapturedModel
from gdfq.graph.leaving import Leaving
from gdfq.graph.nodes import (
    INPUTS,
    WEIGHTED,
    activation_name,
    batch_norm_act,
    computes,
    is_image,
    name_of,
    op_of,
    preserves_values,
)
from gdfq.graph.pixels import reach_of
from gdfq.graph.query import batch_norm_of, quantized_weight, quantizer_behind
from gdfq.graph.summary import ActivationEntry, FloatEntry, Summary, WeightEntry
from gdfq.nn import BatchNormAct, BatchNormActFakeQuantize, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize
from gdfq.observers import LearnedStep
from gdfq.target import Target, target_of

_NOT_QUANTIZED = {  # by what an operator's name matches
    r".*conv_transpose.*|convolution": (
        "transposed convolution: Eq. 6 per output channel is not defined for its weight layout"
    ),
    r".*(mm|mv|matmul|dot|einsum)|.*dot_product_attention.*": "matrix product outside a linear layer",
    r".*batch_norm.*": "BatchNorm without running statistics",
    r".*(group|layer|instance|rms)_norm.*": "normalization by the input's own statistics",
}
_ADDED = ("weight_quantizers", "activation_quantizers", "bias_quantizers", "batch_norms")
_AS_SET = "the setting 'quantizer.layers' says so"


def build_quantized(captured: CapturedModel, config: QuantizerConfig) -> tuple[fx.GraphModule, Summary]:
    """Rewrite the captured model into Q: quantizers where the target has them, ranges not observed yet.

    The parameters are a copy that takes gradients. New modules are `weight_quantizers.*`, `activation_quantizers.*`,
    `bias_quantizers.*` and `batch_norms.*`, with a `_` behind a name that the model has already; only what they store
    (ranges, what observers keep, weight quantizers that were stored) enters the state dict, everything else in it has
    its old name.

    Returns:
        the model, an ordinary module `(N, C, H, W) -> (N, classes)`, and the summary of what was done.

    Raises:
        GdfqError: a pattern of `quantizer.layers` fits no layer.
    """
    student, summary = _Rewriter(captured, config).run()
    call_ahead(student, "image_sizes", captured.sizes)
    call_ahead(student, "leaving", Leaving())
    return student, summary


class _Rewriter:
    """One pass over a captured graph that turns it into a quantized one."""

    def __init__(self, captured: CapturedModel, config: QuantizerConfig) -> None:
        self.module = module = copy.deepcopy(captured.module)
        self.graph = module.graph
        self.config = config
        self.target: Target = target_of(config)
        self.summary = Summary()
        self.on_grid: set[fx.Node] = set()
        self.of_layer = _bits_by_layer(self.graph, self.target, config)
        self.pixels = captured.pixels
        # Under names that the model has not taken itself.
        self.added = {name: free_name(module, name) for name in _ADDED}
        for name in self.added.values():
            module.add_module(name, nn.ModuleDict())

    def run(self) -> tuple[fx.GraphModule, Summary]:
        wanted = self._values_to_quantize()
        affine = [value for value in wanted if value.meta["affine"]]
        reaches = reach_of(self.module, affine, self.pixels) if self.pixels else {}
        for node in list(self.graph.nodes):
            bits = wanted.get(node)
            result = self._rewrite_batch_norm(node, bits, reaches.get(node)) if node.target is batch_norm_act else node
            if bits and result not in self.on_grid and not self._keeps_grid(result):
                self._quantize_value(result, bits, reaches.get(node))
            elif self._keeps_grid(result):
                self.on_grid.add(result)
        self._account_for_float()
        self._quantize_weights()
        if self.target.rounds_bias:
            self._round_biases()
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        for name in self.added.values():
            self.module.get_submodule(name).to(next(self.module.parameters()).device)
        for parameter in self.module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return self.module, self.summary

    # --- activations ---

    def _values_to_quantize(self) -> dict[fx.Node, int]:
        """The activations that the target quantizes, and their bits."""
        values: list[fx.Node] = []
        for node in self.graph.nodes:
            if "relu_outputs" in self.target.quantized:
                has_activation = node.target is batch_norm_act and node.args[-1] != "none"
                values += [node] if activation_name(node) or has_activation else []
            values += map(self._where_it_arises, self._quantized_inputs(node))
        bits = {value: self._bits_of_value(value) for value in dict.fromkeys(values)}
        return {value: number for value, number in bits.items() if number is not None}

    def _quantized_inputs(self, node: fx.Node) -> list[fx.Node]:
        """What the target reads in integers at `node`."""
        return [source for place in self.target.quantized if place in INPUTS for source in INPUTS[place](node)]

    def _where_it_arises(self, value: fx.Node) -> fx.Node:
        """What `value` is only moved or picked from, as far as nobody reads that in float: what computes it can then
        give integers, and they are moved."""
        origin = value
        while preserves_values(value) and self._is_read_in_integers(value.all_input_nodes[0]):
            value = value.all_input_nodes[0]
            origin = value if isinstance(value.meta.get("val"), Tensor) else origin  # not the several of a split
        return origin

    def _is_read_in_integers(self, value: fx.Node) -> bool:
        return all(
            value in self._quantized_inputs(user)
            or (preserves_values(user) and user.all_input_nodes[0] is value and self._is_read_in_integers(user))
            for user in value.users
        ) and bool(value.users)

    def _bits_of_value(self, value: fx.Node) -> int | None:
        """The most that a reader of the value, or of values picked from it, wants; None where all want float."""
        readers = self._readers(value)
        default = self.config.input_bits if is_image(value) else self.config.activation_bits
        if readers and not any(reader.target in WEIGHTED for reader in readers):
            default = max(default, self.target.unweighted_bits or 0)
        wanted = [self.of_layer.get(reader) for reader in readers]
        numbers = [default if bits is None else bits.activations for bits in wanted] or [default]
        return max((number for number in numbers if number != "float"), default=None)

    def _readers(self, value: fx.Node) -> list[fx.Node]:
        """What reads `value`, or what is only picked from it, in integers."""
        readers = []
        for user in value.users:
            if value in self._quantized_inputs(user):
                readers.append(user)
            elif preserves_values(user) and user.all_input_nodes[0] is value:
                readers += self._readers(user)
        return readers

    def _keeps_grid(self, node: fx.Node) -> bool:
        return preserves_values(node) and node.all_input_nodes[0] in self.on_grid

    def _rewrite_batch_norm(self, node: fx.Node, bits: int | None, reach: Tensor | None) -> fx.Node:
        *tensors, eps, act = node.args
        name = node.meta.get("name") or name_of(node)
        new: nn.Module = BatchNormAct(eps, act)
        container = "batch_norms"
        if bits:
            new = BatchNormActFakeQuantize(new, self._new_quantizer(bits, reach))
            container = "activation_quantizers"
        with self.graph.inserting_before(node):
            result = self._call(container, name, new, tuple(tensors))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)
        if bits:
            is_fused = self.config.observer != "learned_step"
            self._record(result, ("batch_norm" if act == "none" else f"batch_norm, {act}") if is_fused else "", bits)
        return result

    def _quantize_value(self, node: fx.Node, bits: int, reach: Tensor | None) -> None:
        quantizer = self._new_quantizer(bits, reach)
        with self.graph.inserting_after(node):
            result = self._call("activation_quantizers", name_of(node), quantizer, (node,))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        self._record(result, "", bits)

    def _new_quantizer(self, bits: int, reach: Tensor | None) -> FakeQuantize:
        scheme = self.target.activation_scheme
        observer = LearnedStep(scheme) if self.config.observer == "learned_step" else None
        return FakeQuantize(bits, self.config.straight_through, observer, reach, scheme)

    def _call(self, container: str, name: str, module: nn.Module, args: tuple) -> fx.Node:
        container = self.added[container]
        modules = self.module.get_submodule(container)
        base = name.replace(".", "_")
        key = next(k for k in (base if i == 0 else f"{base}_{i}" for i in range(len(modules) + 1)) if k not in modules)
        modules[key] = module
        return self.graph.call_module(f"{container}.{key}", args)

    def _record(self, result: fx.Node, fused: str, bits: int) -> None:
        self.on_grid.add(result)
        self.summary.activations.append(ActivationEntry(str(result.target).split(".", 1)[1], bits, fused))

    # --- what stays float ---

    def _account_for_float(self) -> None:
        """Name every input of a quantized layer or residual add, every weight, and every operator, that stays float."""
        for node in self.graph.nodes:
            bits = self.of_layer.get(node)
            as_set = bits is not None and bits.activations == "float"
            read = [source for place in ("layer_inputs", "sum_inputs") for source in INPUTS[place](node)]
            for source in dict.fromkeys(read + self._quantized_inputs(node)):
                if source in self.on_grid:
                    if as_set:
                        self.summary.overruled.append(name_of(node))
                else:
                    what = "image" if is_image(source) else "activation"
                    only = "quantizes ReLU and ReLU6 only" if "relu_outputs" in self.target.quantized else "reads it so"
                    reason = _AS_SET if as_set else f"target '{self.target.name}' {only}"
                    self._stays_float(node, f"input {what} of {op_of(node)}", reason)
            if bits is not None and bits.weights == "float":
                self._stays_float(node, f"weight of {op_of(node)}", _AS_SET)
            if computes(node) and not read and not self._quantized_inputs(node):
                op = op_of(node)
                reasons = (reason for name, reason in _NOT_QUANTIZED.items() if re.fullmatch(name, op))
                reason = next(reasons, "computed in float between quantizers")
                self._stays_float(node, op, reason)

    def _stays_float(self, node: fx.Node, op: str, reason: str) -> None:
        self.summary.stayed_float.append(FloatEntry(name_of(node), op, reason))

    # --- weights ---

    def _quantize_weights(self) -> None:
        """All parameters that are weights in one call at the top; weights that the graph computes, where they arise."""
        bits_of: dict[fx.Node, int] = {}
        entries = []
        for node in self.graph.nodes:
            if node.target in WEIGHTED:
                bits = self.of_layer[node].weights if node in self.of_layer else self.config.weight_bits
                if bits != "float":
                    weight = node.args[1]
                    bits_of.setdefault(weight, bits)
                    parameter = weight.target if weight.op == "get_attr" else ""
                    entries.append(WeightEntry(name_of(node), op_of(node), bits_of[weight], parameter))
        self.summary.weights.extend(dict.fromkeys(entries))  # a layer that is called twice is one layer
        stored = [weight for weight in bits_of if weight.op == "get_attr"]
        groups = {"stored": stored} if stored else {}
        groups |= {weight.name: [weight] for weight in bits_of if weight.op != "get_attr"}
        order = list(self.graph.nodes)
        for name, group in groups.items():
            bits = [bits_of[weight] for weight in group]
            schemes = [self.target.scheme_of_weight(number) for number in bits]
            module = WeightFakeQuantize(bits, self.config.straight_through, schemes)
            with self.graph.inserting_after(max(group, key=order.index)):
                quantized = self._call("weight_quantizers", name, module, (group,))
            for index, weight in reversed(list(enumerate(group))):
                with self.graph.inserting_after(quantized):
                    item = self.graph.call_function(operator.getitem, (quantized, index))
                for user in [user for user in weight.users if self._has_quantized_weight(user)]:
                    user.update_arg(1, item)

    def _has_quantized_weight(self, node: fx.Node) -> bool:
        return node.target in WEIGHTED and (node not in self.of_layer or self.of_layer[node].weights != "float")

    # --- biases ---

    def _round_biases(self) -> None:
        """Of layers whose weight and input are quantized: their own, or what the BN behind them makes of it."""
        for node in [node for node in self.graph.nodes if node.target in WEIGHTED]:
            quantized = quantized_weight(self.module, node.args[1])
            activation = quantizer_behind(self.module, node.args[0])
            if quantized is None or activation is None:
                continue
            bias = node.args[2] if len(node.args) > 2 else None
            batch_norm = next(iter(node.users)) if len(node.users) == 1 else None
            of_batch_norm = batch_norm_of(self.module, batch_norm)
            if of_batch_norm is None and bias is None:
                continue
            eps = 0.0 if of_batch_norm is None else of_batch_norm.eps
            rounded = BiasFakeQuantize(quantized.quantizer, quantized.index, activation, eps)
            statistics = () if of_batch_norm is None else batch_norm.args[1:]
            reader, position = (node, 2) if of_batch_norm is None else (batch_norm, 4)
            with self.graph.inserting_before(reader):
                result = self._call("bias_quantizers", name_of(node), rounded, (quantized.weight, bias, *statistics))
            result.meta = {"of_image": False}
            reader.update_arg(position, result)


def _bits_by_layer(graph: fx.Graph, target: Target, config: QuantizerConfig) -> dict[fx.Node, LayerBits]:
    """What the target and `quantizer.layers` say of single layers: where several patterns fit, the last one."""
    layers = [node for node in graph.nodes if node.target in WEIGHTED]
    ends = {"<first>": layers[:1], "<last>": layers[-1:]}
    found: dict[fx.Node, LayerBits] = {}
    for patterns, all_known in ((target.layers, False), (config.layers, True)):
        for pattern, bits in patterns.items():
            fitting = ends.get(pattern) or [node for node in layers if fnmatchcase(name_of(node), pattern)]
            if not fitting and all_known:
                names = list(dict.fromkeys(name_of(node) for node in layers))
                shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise GdfqError(f"setting 'quantizer.layers': '{pattern}' fits no layer; there are: {shown}")
            found |= dict.fromkeys(fitting, bits)
    return found
