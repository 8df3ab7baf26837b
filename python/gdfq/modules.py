"""The modules that a rewritten graph calls: quantizers, and BatchNorm with what follows it.

They hold what quantization adds (ranges as buffers) and nothing of the user's: weights, biases and BN statistics stay
where the user's model has them and are passed in by the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdfq_ext


class WeightQuantizer(nn.Module):
    """Quantizes the weights of all layers in one call: Eq. 6 per output channel, ranges taken anew every time.

    Args:
        bits: 2 to 8, for every weight.
        straight_through: `identity` or `clipped` (see `gdfq_ext.fake_quantize`).
    """

    def __init__(self, bits: int, straight_through: str) -> None:
        super().__init__()
        self.bits = bits
        self.straight_through = straight_through

    def forward(self, weights: list[Tensor]) -> list[Tensor]:
        return gdfq_ext.fake_quantize_weights(weights, self.bits, ste=self.straight_through)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, straight_through={self.straight_through!r}"


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor: Eq. 6 per tensor, with a range that is observed first and then fixed.

    The range is NaN until it has been observed, so that a model that was never calibrated gives NaN and not noise.

    Args:
        bits: 2 to 8.
        straight_through: `identity` or `clipped` (see `gdfq_ext.fake_quantize`).

    Attributes:
        observing: while true, every forward pass first moves the range (moving average 0.9, bias corrected).
        range: `(2,)` float32, the lower and the upper end.
        range_state: `(3,)` float32, the state of the moving average (see `gdfq_ext.observe_range`).
    """

    def __init__(self, bits: int, straight_through: str) -> None:
        super().__init__()
        self.bits = bits
        self.straight_through = straight_through
        self.observing = False
        self.register_buffer("range", torch.full((2,), torch.nan))
        self.register_buffer("range_state", torch.zeros(3))

    def reset(self) -> None:
        """Forget the range, as if nothing had been observed."""
        self.range.fill_(torch.nan)
        self.range_state.zero_()

    def observe(self, x: Tensor) -> None:
        self.range.copy_(gdfq_ext.observe_range(x.detach(), self.range_state))

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.observe(x)
        return gdfq_ext.fake_quantize(x, self.range[0], self.range[1], self.bits, ste=self.straight_through)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, straight_through={self.straight_through!r}"


class BatchNormAct(nn.Module):
    """BatchNorm and the activation behind it, on statistics and parameters that the graph passes in.

    Args:
        eps: of the BN.
        act: `none`, `relu` or `relu6`.
        momentum: of the running statistics, used only while they are not frozen.

    Attributes:
        frozen: true is "fixed BNS" of the paper: the running statistics are used and do not move. False normalises by
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
        x = F.batch_norm(x, running_mean, running_var, weight, bias, not self.frozen, self.momentum, self.eps)
        return _ACTIVATIONS[self.act](x)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, act={self.act!r}"


class BatchNormActQuantizer(nn.Module):
    """BatchNorm, activation and quantizer: one fused pass once the range is fixed.

    Args:
        batch_norm_act: what stands before the quantizer.
        quantizer: what quantizes its result.
    """

    def __init__(self, batch_norm_act: BatchNormAct, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.batch_norm_act = batch_norm_act
        self.quantizer = quantizer

    def forward(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        bn, quantizer = self.batch_norm_act, self.quantizer
        if quantizer.observing or not bn.frozen:
            return quantizer(bn(x, running_mean, running_var, weight, bias))
        return gdfq_ext.batch_norm_act_fake_quantize(
            x, running_mean, running_var, weight, bias, quantizer.range[0], quantizer.range[1], quantizer.bits,
            eps=bn.eps, act=bn.act, ste=quantizer.straight_through,
        )  # fmt: skip


_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers of `model` by name, in the order of the forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


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
