"""Modules of quantized networks: quantizers, and BatchNorm with what follows it.

They hold what quantization adds (ranges, steps) and nothing of the user's: weights, biases and BN statistics stay
where the user's model has them and are passed in by the graph.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdfq_ext
from gdfq import ranks
from gdfq.observers import LearnedStep, MovingAverage, Observer
from gdfq_ext import Grid, Scheme, code_bounds, quantizer_grid


class WeightFakeQuantize(nn.Module):
    """Quantizes the weights of several layers in one call, per output channel.

    A weight's range is its minimum and maximum, taken anew in every forward pass, until `store` gives it a step, a zero
    point and a rounding of its own: what methods that choose these need.

    Args:
        bits: of every weight, 2 to 8.
        straight_through: `identity` or `clipped` (see `gdfq_ext.fake_quantize`).
        schemes: of every weight (see `gdfq_ext.fake_quantize`); default: Eq. 6.
    """

    def __init__(
        self, bits: list[int], straight_through: str = "identity", schemes: list[Scheme] | None = None
    ) -> None:
        super().__init__()
        self.bits = bits
        self.schemes = schemes or ["eq6"] * len(bits)
        self.straight_through = straight_through
        self.stored = nn.ModuleDict()

    def store(self, index: int, step: Tensor, zero_point: Tensor, rounding: Tensor | None = None) -> None:
        """From now on the weight of this index is quantized by what is given, see `StoredQuantizer`."""
        self.stored[str(index)] = StoredQuantizer(
            self.bits[index], self.straight_through, step, zero_point, rounding, self.schemes[index]
        )

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        anew = [index for index in range(len(weights)) if str(index) not in self.stored]
        if len(anew) == len(weights):
            return self._anew(weights, anew)
        result = {int(index): quantizer(weights[int(index)]) for index, quantizer in self.stored.items()}
        if anew:
            quantized = self._anew([weights[index] for index in anew], anew)
            result |= dict(zip(anew, quantized, strict=True))
        return [result[index] for index in range(len(weights))]

    def _anew(self, weights: list[Tensor], indices: list[int]) -> list[Tensor]:
        bits, schemes = ([values[index] for index in indices] for values in (self.bits, self.schemes))
        return gdfq_ext.fake_quantize_weights(weights, bits, scheme=schemes, straight_through=self.straight_through)

    def quantized(self, index: int, weight: Tensor) -> Tensor:
        """The weight of this index alone, quantized."""
        return self.stored[str(index)](weight) if str(index) in self.stored else self._anew([weight], [index])[0]

    def grid(self, index: int, weight: Tensor) -> Grid:
        """Steps and zero points `(channels,)` of the weight of this index."""
        if str(index) in self.stored:
            return self.stored[str(index)].grid
        rows = weight.detach().flatten(1)
        return quantizer_grid(rows.amin(1), rows.amax(1), self.bits[index], self.schemes[index])

    def codes(self, index: int, weight: Tensor) -> Tensor:
        """Codes of the weight of this index, of its shape, as float32: y = (code - zero_point) * step."""
        step, zero_point, *_ = self.grid(index, weight)
        return (self.quantized(index, weight.detach()) / per_channel(step, weight)).round() + per_channel(
            zero_point, weight
        )

    def extra_repr(self) -> str:
        return f"bits={self.bits}, schemes={self.schemes}, straight_through={self.straight_through!r}"

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Weights that were stored when the state was saved are stored again."""
        for key in [key for key in state_dict if key.startswith(f"{prefix}stored.") and key.endswith(".step")]:
            of_weight = key.removesuffix("step")
            step, zero_point = state_dict[key], state_dict[f"{of_weight}zero_point"]
            index = int(of_weight.removeprefix(f"{prefix}stored.").removesuffix("."))
            self.store(index, step, zero_point, state_dict.get(f"{of_weight}rounding"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class StoredQuantizer(nn.Module):
    """Quantizes a weight per output channel with a given step, zero point and rounding:

        q = clamp(r(w / step) + zero_point, lowest, highest)      y = (q - zero_point) * step

    Args:
        bits: k, 2 to 8.
        straight_through: `identity` or `clipped`: whether the gradient passes where q was clamped.
        step, zero_point: `(channels,)` float32; the zero point holds integers.
        rounding: integers of the weight's shape, r(x) = floor(x) + rounding; None: to the nearest, half to even.
        scheme: says the lowest and the highest code: 0 and 2^k - 1, or as many above as below zero (`symmetric`).
    """

    def __init__(
        self,
        bits: int,
        straight_through: str,
        step: Tensor,
        zero_point: Tensor,
        rounding: Tensor | None = None,
        scheme: Scheme = "eq6",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.straight_through = straight_through
        self.lowest, self.highest = code_bounds(bits, scheme)
        self.register_buffer("step", step.detach().clone().float())
        self.register_buffer("zero_point", zero_point.detach().clone().float())
        self.register_buffer("rounding", None if rounding is None else rounding.detach().clone().to(torch.int8))

    @property
    def grid(self) -> Grid:
        return Grid(self.step, self.zero_point, self.lowest, self.highest)

    def codes(self, weight: Tensor) -> Tensor:
        """q of the weight, `(channels, ...)`, as float32."""
        return self._levels(weight).clamp(self.lowest, self.highest)

    def forward(self, weight: Tensor) -> Tensor:
        levels = self._levels(weight)
        codes = levels.clamp(self.lowest, self.highest)
        quantized = (codes - per_channel(self.zero_point, weight)) * per_channel(self.step, weight)
        through = weight if self.straight_through == "identity" else torch.where(levels == codes, weight, quantized)
        return through + (quantized - through).detach()

    def _levels(self, weight: Tensor) -> Tensor:
        in_steps = weight.detach() / per_channel(self.step, weight)
        rounded = in_steps.round() if self.rounding is None else in_steps.floor() + self.rounding
        return rounded + per_channel(self.zero_point, weight)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, straight_through={self.straight_through!r}"


class FakeQuantize(nn.Module):
    """Quantizes one activation tensor, with a range that an observer finds and that is then fixed.

    The range is NaN until it has been observed, so that a model that was never calibrated gives NaN and not noise.

    Args:
        bits: 2 to 8.
        straight_through: `identity` or `clipped` (see `gdfq_ext.fake_quantize`).
        observer: where the range comes from, see `gdfq.observers`; default: a moving average.
        reach: `(2,)` float32, what the range holds at least, whatever was observed.
        scheme: how a range is made into levels (see `gdfq_ext.fake_quantize`).

    Attributes:
        observing: while true, the observer sees every input first.
        range: `(2,)` float32, the lower and the upper end.
    """

    def __init__(
        self,
        bits: int,
        straight_through: str = "identity",
        observer: Observer | None = None,
        reach: Tensor | None = None,
        scheme: Scheme = "eq6",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.straight_through = straight_through
        self.scheme: Scheme = scheme
        self.observer = observer or MovingAverage()
        self.observing = False
        self.register_buffer("range", torch.full((2,), torch.nan))
        self.register_buffer("reach", reach, persistent=False)

    def reset(self) -> None:
        """Forget the range, as if nothing had been observed."""
        self.range.fill_(torch.nan)
        self.observer.reset()

    def observe(self, x: Tensor) -> None:
        self.observer.observe(x.detach(), self.range)
        self._widen()

    def end_pass(self) -> None:
        """All images that the range is observed on have been seen."""
        self.observer.end_pass(self.range, self.bits)
        self._widen()

    def grid(self) -> Grid:
        """Step and zero point `()` that the range means, and the lowest and the highest code."""
        if isinstance(self.observer, LearnedStep) and not self.observing:
            return self.observer.grid(self.bits)
        return quantizer_grid(self.range[0], self.range[1], self.bits, self.scheme)

    def _widen(self) -> None:
        if self.reach is not None:
            self.range[0].clamp_(max=self.reach[0])
            self.range[1].clamp_(min=self.reach[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
            if not self.observer.quantizes:
                return x
        elif isinstance(self.observer, LearnedStep):
            return self.observer.quantize(x, self.range, self.bits)
        return gdfq_ext.fake_quantize(
            x, self.range[0], self.range[1], self.bits, scheme=self.scheme, straight_through=self.straight_through
        )

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scheme={self.scheme!r}, straight_through={self.straight_through!r}"


class BatchNormAct(nn.Module):
    """BatchNorm and the activation behind it, on statistics and parameters that the graph passes in.

    Args:
        eps: of the BN.
        act: `none`, `relu` or `relu6`.
        momentum: of the running statistics, used only while they are not frozen.

    Attributes:
        frozen: true is "fixed BNS" of the paper: the running statistics are used and do not move. False normalizes by
            the batch's own statistics and moves the running ones (the ablation of Table 4).
    """

    def __init__(self, eps: float, act: str, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.act = act
        self.momentum = momentum
        self.frozen = True

    def forward(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if self.frozen or ranks.count() == 1:
            x = F.batch_norm(x, running_mean, running_var, weight, bias, not self.frozen, self.momentum, self.eps)
        else:
            x = batch_norm_of_all_ranks(x, running_mean, running_var, self.momentum, self.eps)
            x = F.batch_norm(x, torch.zeros_like(running_mean), torch.ones_like(running_var), weight, bias, eps=0.0)
        return _ACTIVATIONS[self.act](x)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, act={self.act!r}"


class BatchNormActFakeQuantize(nn.Module):
    """BatchNorm, activation and quantizer: one fused pass once the range is fixed.

    Args:
        batch_norm_act: what stands before the quantizer.
        quantizer: what quantizes its result.
    """

    def __init__(self, batch_norm_act: BatchNormAct, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.batch_norm_act = batch_norm_act
        self.quantizer = quantizer

    def forward(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        bn, quantizer = self.batch_norm_act, self.quantizer
        if quantizer.observing or not bn.frozen or isinstance(quantizer.observer, LearnedStep):
            return quantizer(bn(x, running_mean, running_var, weight, bias))
        return gdfq_ext.batch_norm_act_fake_quantize(
            x, running_mean, running_var, weight, bias, quantizer.range[0], quantizer.range[1], quantizer.bits,
            scheme=quantizer.scheme, eps=bn.eps, act=bn.act, straight_through=quantizer.straight_through,
        )  # fmt: skip


class BiasFakeQuantize(nn.Module):
    """Rounds what is added to a layer's products to what integers can add to them: multiples of step_x * step_w.

        no BN behind the layer:   b = bias                                   unit = step_x * step_w
        BN behind it:             b = beta + (bias - mean) * gamma / sigma   unit = step_x * step_w * |gamma| / sigma

    The gradient passes unchanged. While the input's range is not known yet, nothing is rounded.

    Args:
        weights: what quantizes the layer's weight, together with others.
        index: which of them it is.
        activation: what quantizes the layer's input.
        eps: of the BN.
    """

    def __init__(self, weights: WeightFakeQuantize, index: int, activation: FakeQuantize, eps: float = 0.0) -> None:
        super().__init__()
        self.of = (weights, index, activation)  # they belong to others: in a tuple, they are no submodules of this one
        self.eps = eps

    def forward(
        self,
        weight: Tensor,
        bias: Tensor | None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor | None:
        """The rounded beta, or bias where there is no BN, `(channels,)` float32.

        Args:
            weight, bias: the layer's.
            running_mean, running_var, gamma, beta: of the BN behind it.
        """
        if running_mean is None:
            return bias if bias is None else bias + (self._rounded(bias, weight, 1.0) - bias).detach()
        beta = torch.zeros_like(running_mean) if beta is None else beta
        with torch.no_grad():
            factor = (running_var + self.eps).rsqrt() * (1.0 if gamma is None else gamma)
            shift = beta + ((0.0 if bias is None else bias) - running_mean) * factor
            difference = self._rounded(shift, weight, factor.abs()) - shift
        return beta + difference.to(beta.dtype)

    def _rounded(self, values: Tensor, weight: Tensor, factor: Tensor | float) -> Tensor:
        weights, index, activation = self.of
        if activation.observing and not activation.observer.quantizes:
            return values
        unit = activation.grid().step * weights.grid(index, weight).step * factor
        levels = values / unit
        rounded = torch.where(levels.isfinite(), levels.round() * unit, values)  # of a dead channel the unit is nothing
        return rounded.to(values.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def batch_norm_of_all_ranks(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> Tensor:
    """A rank's share `(N, C, ...)` of a batch, normalized by the moments of the whole batch, which move the running
    statistics: BatchNorm in training, without parameters."""
    variance, mean = torch.var_mean(x.float(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
    means, variances = ranks.moments([mean], [variance], [running_mean], len(x))
    count = ranks.rows(len(x)) * math.prod(x.shape[2:])
    with torch.no_grad():
        running_mean.lerp_(means[0], momentum)
        running_var.lerp_(variances[0] * (count / (count - 1)), momentum)
    shape = (-1, *[1] * (x.dim() - 2))
    return ((x - means[0].view(shape)) * (variances[0] + eps).rsqrt().view(shape)).to(x.dtype)


_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values (channels,)` shaped to go with `x (channels, ...)`."""
    return values.view(-1, *[1] * (x.dim() - 1))


def activation_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """All activation quantizers of `model` by name, in the order of the forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Inside the block every forward pass of `model` moves the activation ranges."""
    quantizers = activation_quantizers(model).values()
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observing = False


@contextmanager
def moving_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block no BN of `model` is frozen (`BatchNormAct.frozen`): the opposite of the paper's "fixed BNS"."""
    layers = [module for module in model.modules() if isinstance(module, BatchNormAct)]
    for layer in layers:
        layer.frozen = False
    try:
        yield
    finally:
        for layer in layers:
            layer.frozen = True


def to_channels_last(model: nn.Module) -> None:
    """What `Module.to(memory_format=...)` does, which refuses a model that has 5-D weights (Conv3d) beside 4-D ones."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
