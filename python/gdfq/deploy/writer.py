"""Q's graph as an ONNX file that integer runtimes read: Q/DQ around operators, BN folded, weights in 4 or 8 bits."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.calibrate import check_ranges
from gdfq.deploy.apart import taken_apart
from gdfq.deploy.builder import Builder
from gdfq.deploy.call import INPUT, Call
from gdfq.deploy.grids import Grid, activation_grid
from gdfq.deploy.layers import Affine, LayerResult, LayerSpec, Weight, convolution, is_linear, linear
from gdfq.deploy.moves import MOVES
from gdfq.deploy.operators import OPERATORS
from gdfq.deploy.trial import try_batches
from gdfq.deploy.values import Clamped, Computed, Moved, Value, quantized
from gdfq.errors import GdfqError
from gdfq.graph.nodes import BOUNDS, CONVOLUTIONS, WEIGHTED, is_image, name_of, op_of, preserves_values
from gdfq.graph.query import quantized_weight, rounds_biases
from gdfq.graph.summary import FloatEntry
from gdfq.models import check_finite
from gdfq.nn import (
    BatchNormAct,
    BatchNormActFakeQuantize,
    FakeQuantize,
    per_channel,
)

if TYPE_CHECKING:
    import onnx

OUTPUT, BATCH = "logits", "N"
_BATCH_NORM = "BatchNormalization"
_INT16_TOP = 2**15 - 1


@dataclass(frozen=True)
class Normalization:
    """What is done to pixels of 0..255: (pixel / 255 - mean) / std, a number for each channel."""

    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class QuantizedTensor:
    """The codes of one of Q's activation quantizers.

    Attributes:
        tensor: the name of the ONNX tensor that holds them, of the shape that the quantizer sees in Q.
        grid: their step, zero point, lowest and highest.
    """

    tensor: str
    grid: Grid


@dataclass(frozen=True)
class WrittenLayer:
    """A convolution or linear layer.

    Attributes:
        name: the user's.
        node: the name of the ONNX node.
        stays_float: why it is not computed in integers, empty where it is.
        largest_pair: the largest amount that two products of a carrier and a code can have together.
    """

    name: str
    node: str
    stays_float: str
    largest_pair: int

    @property
    def can_saturate(self) -> bool:
        """Whether processors that add two products in 16 bits (AVX2 without VNNI) can compute something else."""
        return self.largest_pair > _INT16_TOP


@dataclass(frozen=True)
class Written:
    """An ONNX model and what is known of it.

    Attributes:
        model: input `images`, output `logits`; any batch.
        codes: by the names of Q's activation quantizers.
        layers: in the order of the forward pass.
        floats: what is computed in float, and why.
    """

    model: "onnx.ModelProto"
    codes: dict[str, QuantizedTensor]
    layers: list[WrittenLayer]
    floats: list[FloatEntry] = field(default_factory=list)


def write(
    student: fx.GraphModule,
    image_shape: tuple[int, int, int],
    *,
    pixels: Normalization | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = 21,
) -> Written:
    """Q, from `build_quantized`, as an ONNX model that computes the same.

    Args:
        student: with ranges observed.
        image_shape: `(channels, height, width)`; the model takes no other.
        pixels: the input is uint8, `(N, channels, height, width)` of 0..255, and this is done to it first; None: it is
            float32, as Q takes it.
        metadata: kept in the file, text by name.
        opset: of ONNX, 21 or later.

    Raises:
        GdfqError: `onnx` is not installed; a range was never observed, a weight is NaN or infinite; an operator that
            ONNX, or this writer, does not know (with its place).
    """
    builder = Builder(opset)
    _check_finite(student)
    check_ranges(student)
    parts = taken_apart(student, image_shape, {*OPERATORS, *MOVES})
    return _Writer(builder, parts, tuple(image_shape), pixels).written(dict(metadata or {}))


def _check_finite(student: fx.GraphModule) -> None:
    """As `check_finite`; that ranges have not been observed yet is said as such."""
    try:
        check_finite(student)
    except GdfqError:
        check_ranges(student)
        raise


class _Writer:
    def __init__(
        self, builder: Builder, student: fx.GraphModule, image_shape: tuple[int, int, int], pixels: Normalization | None
    ) -> None:
        self.builder = builder
        self.student = student
        self.image_shape = image_shape
        self.pixels = pixels
        self.seen = try_batches(student, image_shape)
        self.rounds_bias = rounds_biases(student)
        self.values: dict[fx.Node, Any] = {}
        self.codes: dict[str, QuantizedTensor] = {}
        self.layers: list[LayerResult] = []
        self.computed: dict[fx.Node, Computed] = {}
        self.floats: list[FloatEntry] = []

    def written(self, metadata: dict[str, str]) -> Written:
        result = next(node for node in self.student.graph.nodes if node.op == "output").args[0]
        for node in self.student.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._image()
            elif node.op != "output" and self.seen[node].of_image:
                self.values[node] = self._value(node)
        self.builder.rename(self.values[result].as_float, OUTPUT)
        dtype = "float32" if self.pixels is None else "uint8"
        given, returned = [BATCH, *self.image_shape], [BATCH, self.seen[result].shape[1]]
        model = self.builder.model([(INPUT, dtype, given)], [(OUTPUT, "float32", returned)], metadata)
        layers = [self._entry(layer) for layer in self.layers if layer.node]
        return Written(model, self.codes, layers, self._floats())

    # --- nodes ---

    def _image(self) -> Value:
        if self.pixels is None:
            return Computed(self.builder, INPUT)
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.pixels.mean, self.pixels.std))
        add, constant = self.builder.add, self.builder.constant
        x = add("Cast", INPUT, to=self.builder.type_of("float32"))
        x = add("Div", x, constant(255, np.float32))
        return Computed(self.builder, add("Div", add("Sub", x, constant(mean)), constant(std)))

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return self._module(node, self.student.get_submodule(node.target))
        if node.target is operator.getitem:
            source, index = node.args
            if index >= len(self.values[source]):  # the places of a pool's values
                raise Call(self.builder, source, self.seen, self.values).unknown()
            return self.values[source][index]
        if not hasattr(node.target, "_schema"):
            raise self._unknown(node)
        call = Call(self.builder, node, self.seen, self.values)
        if node.target in WEIGHTED:
            return self._layer(call)
        op = op_of(node)
        if op in MOVES and (preserves_values(node) or op == "_unsafe_view"):
            source = call.value("self")
            moves = MOVES[op](call)
            if isinstance(moves, list):
                return [source.moved(move, len(moves) == 1 and call.only_reader_of_source) for move in moves]
            return source.moved(moves, call.only_reader_of_source)
        if op not in OPERATORS:
            raise call.unknown()
        result = OPERATORS[op](call)
        if isinstance(result, Computed):
            self.computed[node] = result
        return result

    def _module(self, node: fx.Node, module: torch.nn.Module) -> Any:
        if isinstance(module, FakeQuantize):
            return self._quantized(node, node.target, module, self.values[node.args[0]])
        if isinstance(module, BatchNormActFakeQuantize):
            value = self._batch_norm(node, module.batch_norm_act)
            return self._quantized(node, f"{node.target}.quantizer", module.quantizer, value)
        if isinstance(module, BatchNormAct):
            return self._batch_norm(node, module)
        raise self._unknown(node)

    def _quantized(self, node: fx.Node, name: str, quantizer: FakeQuantize, value: Value) -> Value:
        grid = activation_grid(quantizer).in_a_byte()
        if grid is None:
            return self._rounded_in_float(node, activation_grid(quantizer), value)
        result = quantized(value, grid)
        self.codes[name] = QuantizedTensor(result.codes, grid)
        return result

    def _rounded_in_float(self, node: fx.Node, grid: Grid, value: Value) -> Value:
        """On a grid whose zero point is too far out for codes of a byte: the same values in float."""
        add, constant = self.builder.add, self.builder.constant
        step = constant(grid.step, np.float32)
        bounds = (constant(code - grid.zero_point, np.float32) for code in (grid.lowest, grid.highest))
        levels = add("Clip", add("Round", add("Div", value.as_float, step)), *bounds)
        reason = f"its zero point is {grid.zero_point}, which no byte holds"
        self.floats.append(FloatEntry(name_of(node), "activation quantizer", reason))
        return Computed(self.builder, add("Mul", levels, step))

    def _batch_norm(self, node: fx.Node, module: BatchNormAct) -> Value:
        source, *tensors = node.args
        mean, variance, gamma, beta = (None if t is None else self._constant(t) for t in tensors)
        gamma = np.ones_like(mean) if gamma is None else gamma
        beta = np.zeros_like(mean) if beta is None else beta
        value = self.values[source]
        layer = value.base if isinstance(value, Moved) else value
        if isinstance(layer, LayerResult) and source.target in WEIGHTED and len(source.users) == 1:
            factor = gamma / np.sqrt(variance + module.eps)
            folded = layer.behind(Affine(factor, beta - mean * factor))
            self.layers.append(folded)
            value = folded if value is layer else Moved(folded, value.move, True)
        else:
            parameters = (self.builder.constant(values, np.float32) for values in (gamma, beta, mean, variance))
            name = self.builder.add(_BATCH_NORM, value.as_float, *parameters, name=name_of(node), epsilon=module.eps)
            value = self.computed[node] = Computed(self.builder, name, _BATCH_NORM)
        return value if module.act == "none" else Clamped(value, *BOUNDS[module.act])

    # --- layers ---

    def _layer(self, call: Call) -> Value:
        node = call.node
        weight = self._weight(node.args[1])
        source = call.value("input")
        rank = len(call.shape("input"))
        if node.target in CONVOLUTIONS:
            spec = convolution(call, weight)
            if is_linear(call, spec):
                return self._reshaped(call, linear(call, weight.as_matrix()), source)
        else:
            spec = linear(call, weight)
            if rank != 2:
                return self._reshaped(call, spec, source)
        return self._result(spec, source)

    def _reshaped(self, call: Call, spec: LayerSpec, source: Value) -> Value:
        """A linear layer of `(rows, features)`, whatever the shapes of its input and its result."""
        add, features = self.builder.add, spec.weight.shape[1]
        rows, shape = self.builder.constant([-1, features], np.int64), call.as_reshape(call.shape())
        flat = source.moved(lambda x, zero: add("Reshape", x, rows), call.only_reader_of_source)
        return self._result(spec, flat).moved(lambda x, zero: add("Reshape", x, shape), True)

    def _result(self, spec: LayerSpec, source: Value) -> LayerResult:
        self.layers.append(LayerResult(self.builder, replace(spec, rounds_bias=self.rounds_bias), source))
        return self.layers[-1]

    def _weight(self, node: fx.Node) -> Weight:
        found = quantized_weight(self.student, node)
        if found is None:
            return Weight(values=self._tensor(node).cpu().numpy(), stays_float="its weight is not quantized")
        weight = self._tensor(found.weight)
        step, zero_point, *_ = found.quantizer.grid(found.index, weight)
        carriers = found.quantizer.codes(found.index, weight) - per_channel(zero_point, weight)
        largest = carriers.abs().max().item() if carriers.numel() else 0
        if largest > 127:
            reason = f"codes of its weight, less their zero point, reach {largest:.0f}, which int8 does not hold"
            return Weight(values=self._tensor(node).cpu().numpy(), stays_float=reason)
        return Weight(carriers.to(torch.int8).cpu().numpy(), step.double().cpu().numpy())

    def _constant(self, node: fx.Node) -> np.ndarray:
        return self._tensor(node).double().cpu().numpy()

    def _tensor(self, node: fx.Node) -> Tensor:
        """What does not depend on the image, float32."""
        if self.seen[node].of_image:
            raise GdfqError(f"{name_of(node)}: a parameter that is computed from the image cannot be written to ONNX")
        return self.seen[node].value.detach().float()

    # --- account ---

    def _entry(self, layer: LayerResult) -> WrittenLayer:
        grid, carriers = layer.input_grid, layer.carriers
        pair = 0
        if grid is not None and carriers is not None:
            largest = grid.highest + (128 if grid.lowest < 0 else 0)  # int8 codes are moved to 0..255
            pair = largest * _largest_pair(carriers.reshape(len(carriers), -1))
        return WrittenLayer(layer.spec.name, layer.node, layer.stays_float, pair)

    def _floats(self) -> list[FloatEntry]:
        layers = [
            FloatEntry(layer.spec.name, layer.spec.operator, layer.stays_float)
            for layer in self.layers if layer.node and layer.stays_float
        ]  # fmt: skip
        others = [
            FloatEntry(name_of(node), value.operator, _why_float(node, value))
            for node, value in self.computed.items() if value.operator and not value.in_integers
        ]  # fmt: skip
        return self.floats + layers + others

    def _unknown(self, node: fx.Node) -> GdfqError:
        return GdfqError(f"{name_of(node)}: the ONNX writer does not know the operator {op_of(node)}")


def _largest_pair(carriers: np.ndarray) -> int:
    """The largest amount that two carriers of a channel have together, of one sign."""
    if carriers.size == 0:
        return 0
    count = min(2, carriers.shape[1])
    of_sign = (np.partition(signed, -count, axis=1)[:, -count:].astype(int) for signed in (carriers, -carriers))
    return max(int(two.clip(min=0).sum(1).max()) for two in of_sign)


def _why_float(node: fx.Node, value: Computed) -> str:
    if is_image(node):
        return "it prepares the image"
    if value.operator == _BATCH_NORM:
        return "it is not behind a convolution that it could be folded into"
    if not value.reads_codes:
        return "its input is not quantized"
    return "its result is not quantized" if not value.only_rounded else "runtimes compute it in float"
