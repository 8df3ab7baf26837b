"""DFQ (Nagel et al., ICCV 2019): weights equalized across layers, biases absorbed and corrected; no data, no training.

Everything is read off the BatchNorms: behind one of them a channel is taken as N(beta, gamma^2). Where DFQ folds BN
into the layer before it, BN is kept here, as in all of this package: a channel is scaled through gamma and beta, and
what a layer's output is shifted by goes into its bias or into the `running_mean` behind it.
"""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.special import ndtr

from gdfq.calibrate import calibrate, end_pass
from gdfq.graph import CapturedModel, QuantizedLayer, quantized_layers, quantizer_of
from gdfq.graph.nodes import BOUNDS, activation_name, aten, batch_norm_act
from gdfq.graph.query import batch_norm_of, called_by, unrounded
from gdfq.methods.calibration import calibrating
from gdfq.methods.method import Method
from gdfq.nn import BatchNormAct, BiasFakeQuantize, FakeQuantize, WeightFakeQuantize

_EQUALIZATION_SWEEPS, _EQUALIZATION_TOLERANCE = 100, 1e-3
_ABSORBED_DEVIATIONS = 3  # a channel stays above beta - 3 gamma with a probability of 0.9987
_RANGE_DEVIATIONS = 6
# Operators that leave the channels where they are, and their statistics nearly. (Max pooling raises the mean; its
# input's is the nearest thing known.)
_KEEPS_CHANNELS = {
    aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.reshape.default,
    aten.clone.default, aten.slice.Tensor,
}  # fmt: skip


def replace_relu6(captured: CapturedModel) -> CapturedModel:
    """A copy of the captured model with ReLU in place of every ReLU6 behind a BN, as DFQ does before it equalizes:
    relu(s x) = s relu(x), which does not hold for ReLU6."""
    module = copy.deepcopy(captured.module)
    for node in module.graph.nodes:
        if node.target is batch_norm_act and node.args[-1] == "relu6":
            node.args = (*node.args[:-1], "relu")
    module.recompile()
    return dataclasses.replace(captured, module=module)


def dfq(student: fx.GraphModule, calibration: Iterable[Tensor]) -> None:
    """Equalize, absorb and correct `student` in place and take its activation ranges from the BN statistics.

    Args:
        student: Q, from `build_quantized`, of a model that `replace_relu6` has been over.
        calibration: batches `(N, C, H, W)`, for the ranges of which BN says nothing (the input image, a sigmoid).

    Raises:
        GdfqError: a range came out NaN or infinite.
    """
    pairs = equalizable_pairs(student)
    equalize(student, pairs)
    absorb_high_biases(student, pairs)
    calibrate(student, calibration)
    take_ranges(student)
    correct_biases(student)


# --- cross-layer equalization ------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Two layers with nothing between them but the first one's BN and activation, and a max pooling."""

    first: QuantizedLayer
    batch_norm: fx.Node
    second: QuantizedLayer


def equalizable_pairs(student: fx.GraphModule) -> list[Pair]:
    """All pairs along which channels can be scaled: no branch between, ReLU or no activation, parameters used once."""
    layers = {layer.node: layer for layer in quantized_layers(student)}
    uses = _uses(student)
    pairs = []
    for first in layers.values():
        batch_norm = _only_user(first.node)
        module = batch_norm_of(student, batch_norm)
        node = _only_user(batch_norm) if module is not None and module.act != "relu6" else None
        while node is not None and (_is_quantizer(student, node) or node.target is aten.max_pool2d.default):
            node = _only_user(node)
        second = layers.get(node)
        if second is None or not all(_parameters(student, batch_norm)):
            continue
        scaled = [second.weight, *(node.target for node in _parameters(student, batch_norm)[2:])]
        if all(uses[name] == 1 for name in scaled):
            pairs.append(Pair(first, batch_norm, second))
    return pairs


@torch.no_grad()
def equalize(student: fx.GraphModule, pairs: list[Pair]) -> None:
    """Give each channel between two layers the same range on both sides, which changes no output (DFQ, section 4.1):

        s_i = sqrt(r1_i / r2_i)      gamma_i, beta_i / s_i      W2_i * s_i

    r1_i is the largest magnitude among the weights that make channel i, BN folded in (|gamma_i| / sigma_i * |W1_i|),
    r2_i among those that read it. Swept over all pairs until nothing moves; a channel that nobody makes or reads is
    left alone.
    """
    for _ in range(_EQUALIZATION_SWEEPS):
        moved = 0.0
        for first, batch_norm, second in pairs:
            _, running_var, gamma, beta = (_tensor(student, node) for node in _parameters(student, batch_norm))
            sigma = (running_var + batch_norm_of(student, batch_norm).eps).sqrt()
            made = student.get_parameter(first.weight).flatten(1).abs().amax(1) * gamma.abs() / sigma
            weight = _by_input_channel(student.get_parameter(second.weight), second.groups)
            read = weight.abs().amax((1, 3)).flatten()
            scale = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
            gamma /= scale
            beta /= scale
            weight *= scale.view(second.groups, 1, -1, 1)
            moved = max(moved, scale.log().abs().max().item())
        if moved < _EQUALIZATION_TOLERANCE:
            break


@torch.no_grad()
def absorb_high_biases(student: fx.GraphModule, pairs: list[Pair]) -> None:
    """Move what a channel never falls below into the next layer, where activations need no range for it:

        c = max(0, beta - 3 gamma)      beta - c      bias of the next layer + W2 c

    for pairs through a ReLU: relu(x - c) = relu(x) - c wherever x > c. Where the next layer pads with zeros, which c is
    not part of, its output is off at the border; DFQ takes no notice of that.
    """
    for _, batch_norm, second in pairs:
        if batch_norm_of(student, batch_norm).act == "relu":
            gamma, beta = (_tensor(student, node) for node in _parameters(student, batch_norm)[2:])
            absorbed = (beta - _ABSORBED_DEVIATIONS * gamma.abs()).clamp_min(0)
            weight = student.get_parameter(second.weight)
            if _shift_output(student, second, _response(weight, absorbed, second.groups)):
                beta -= absorbed


# --- statistics of the activations -------------------------------------------------------------------------------


class ChannelStatistics(NamedTuple):
    """What BN says of an activation, channel by channel: `(C,)` float64 each.

    Attributes:
        mean, variance: of the activation.
        lower, upper: between them practically all of it lies: mean -+ 6 standard deviations before any activation.
    """

    mean: Tensor
    variance: Tensor
    lower: Tensor
    upper: Tensor


def normal(mean: Tensor, variance: Tensor) -> ChannelStatistics:
    """N(mean, variance)."""
    reach = _RANGE_DEVIATIONS * variance.sqrt()
    return ChannelStatistics(mean, variance, mean - reach, mean + reach)


def activated(statistics: ChannelStatistics, act: str) -> ChannelStatistics:
    """What `none`, `relu` or `relu6` makes of normal channels: the clipped normal distribution (DFQ, appendix C).

    With standardized ends a, b of [l, u], the normal density f and its integral F:

        mean           l F(a) + u (1 - F(b)) + m (F(b) - F(a)) + s (f(a) - f(b))
        mean square    l^2 F(a) + u^2 (1 - F(b)) + (m^2 + s^2) (F(b) - F(a)) + 2 m s (f(a) - f(b))
                       + s^2 (a f(a) - b f(b))
    """
    if act == "none":
        return statistics
    m, s = statistics.mean, statistics.variance.sqrt().clamp_min(1e-12)
    lower, upper = (bound.clamp(*BOUNDS[act]) for bound in (statistics.lower, statistics.upper))
    a, b = (lower - m) / s, (upper - m) / s
    below, inside, above = ndtr(a), ndtr(b) - ndtr(a), ndtr(-b)
    f_a, f_b = (torch.exp(-end.square() / 2) / math.sqrt(2 * math.pi) for end in (a, b))
    mean = lower * below + upper * above + m * inside + s * (f_a - f_b)
    square = lower.square() * below + upper.square() * above + (m.square() + s.square()) * inside
    square = square + 2 * m * s * (f_a - f_b) + s.square() * (a * f_a - b * f_b)
    return ChannelStatistics(mean, (square - mean.square()).clamp_min(0), lower, upper)


def channel_statistics(student: fx.GraphModule) -> dict[fx.Node, ChannelStatistics]:
    """Statistics of every activation of Q that follows from its BNs alone.

    They pass through quantizers, pooling and concatenation. A sum is taken as normal, its terms as independent.
    """
    known: dict[fx.Node, ChannelStatistics] = {}
    for node in student.graph.nodes:
        statistics = _statistics(student, node, known)
        if statistics is not None:
            known[node] = statistics
    return known


def _statistics(
    student: fx.GraphModule, node: fx.Node, known: dict[fx.Node, ChannelStatistics]
) -> ChannelStatistics | None:
    batch_norm = batch_norm_of(student, node)
    if batch_norm is not None:
        return _behind_batch_norm(student, node, batch_norm)
    is_sum = node.target is aten.add.Tensor and len(node.args) == 2
    is_concatenation = node.target is aten.cat.default and node.args[1:] == (1,)
    inputs = node.args[0] if is_concatenation else node.args[: 2 if is_sum else 1]
    sources = [known.get(source) if isinstance(source, fx.Node) else None for source in inputs]
    if not sources or None in sources:
        return None
    if is_sum:
        return normal(sources[0].mean + sources[1].mean, sources[0].variance + sources[1].variance)
    if is_concatenation:
        return ChannelStatistics(*(torch.cat(parts) for parts in zip(*sources, strict=True)))
    if activation_name(node):
        return activated(sources[0], activation_name(node))
    spatial_mean = node.target is aten.mean.dim and {dim % 4 for dim in node.args[1]} == {2, 3}
    if _is_quantizer(student, node) or spatial_mean or node.target in _KEEPS_CHANNELS:
        return sources[0] if node.meta["val"].shape[1] == len(sources[0].mean) else None
    return None


def _behind_batch_norm(student: fx.GraphModule, node: fx.Node, batch_norm: BatchNormAct) -> ChannelStatistics:
    _, *others = _parameters(student, node)
    variance, gamma, beta = (None if given is None else _tensor(student, given).double() for given in others)
    # Of a channel whose variance is hardly more than eps, BN gives less than gamma^2.
    variance = variance / (variance + batch_norm.eps) * (1 if gamma is None else gamma.square())
    return activated(normal(torch.zeros_like(variance) if beta is None else beta, variance), batch_norm.act)


@torch.no_grad()
def take_ranges(student: fx.GraphModule) -> None:
    """Activation ranges from the BN statistics, beta -+ 6 gamma cut by the activation, the widest channel's for all;
    an activation of which they say nothing keeps the range that it has."""
    for node, statistics in channel_statistics(student).items():
        quantizer = quantizer_of(student, node)
        if quantizer is not None:
            quantizer.range.copy_(torch.stack([statistics.lower.min(), statistics.upper.max()]))
    end_pass(student)


# --- bias correction ---------------------------------------------------------------------------------------------


@torch.no_grad()
def correct_biases(student: fx.GraphModule) -> None:
    """Take the mean error that quantizing the weights makes from every layer's output (DFQ, section 4.2):

        E[y_quantized] - E[y] = (W_quantized - W) E[x]

    with E[x] from `channel_statistics`. A layer whose input they do not reach, or with neither a bias nor a BN behind
    it, is left alone.
    """
    known = channel_statistics(student)
    for layer in quantized_layers(student):
        statistics = known.get(layer.node.args[0])
        if statistics is not None:
            weight = student.get_parameter(layer.weight)
            error = layer.quantizer.quantized(layer.index, weight) - weight
            _shift_output(student, layer, -_response(error.double(), statistics.mean, layer.groups))


# --- the graph ---------------------------------------------------------------------------------------------------


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _uses(student: fx.GraphModule) -> Counter[str]:
    """How many operators use each parameter and buffer."""
    uses = Counter(layer.weight for layer in quantized_layers(student))
    for node in student.graph.nodes:
        for user in node.users if node.op == "get_attr" else ():
            quantizes = isinstance(called_by(student, user), WeightFakeQuantize | BiasFakeQuantize)
            uses[node.target] += not quantizes or node is unrounded(student, user)
    return uses


def _tensor(student: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter or buffer that a `get_attr` node stands for."""
    path, _, name = node.target.rpartition(".")
    return getattr(student.get_submodule(path), name)


def _is_quantizer(student: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(called_by(student, node), FakeQuantize)


def _parameters(
    student: fx.GraphModule, batch_norm: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node | None]:
    """running_mean, running_var, gamma and beta of a BN."""
    mean, variance, gamma, beta = batch_norm.args[1:]
    return mean, variance, gamma, unrounded(student, beta)


def _by_input_channel(weight: Tensor, groups: int) -> Tensor:
    """A view `(groups, outputs per group, inputs per group, kernel positions)` of a layer's weight."""
    return weight.detach().view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _response(weight: Tensor, channels: Tensor, groups: int) -> Tensor:
    """What a layer gives, `(outputs,)`, for an input that is constant, `channels (inputs,)`, over its whole kernel."""
    weight = _by_input_channel(weight, groups).sum(3)
    return (weight * channels.view(groups, 1, -1)).sum(2).flatten()


def _shift_output(student: fx.GraphModule, layer: QuantizedLayer, shift: Tensor) -> bool:
    """Add `shift (outputs,)` to a layer's bias or, without one, to what the BNs behind it see. False if that cannot be
    done: there is neither, or other layers share it."""
    uses = _uses(student)
    if layer.bias is not None:
        if uses[layer.bias] == 1:
            student.get_parameter(layer.bias).add_(shift)
        return uses[layer.bias] == 1
    users = list(layer.node.users)
    means = [user.args[1] for user in users if batch_norm_of(student, user) is not None]
    if not users or len(means) < len(users) or any(uses[mean.target] > 1 for mean in means):
        return False
    for mean in means:
        _tensor(student, mean).sub_(shift)
    return True


DFQ = Method(
    "dfq",
    "no training; weights equalized, biases absorbed and corrected",
    calibrating(lambda task, batches: dfq(task.student, batches), "gaussian"),
    prepare=replace_relu6,
)
