"""Layer by layer: whether a file computes the levels that the simulation has, given the simulation's own as input.

One model is cut at all levels at once: what reads a tensor of codes reads an input in its stead, and the codes
themselves become an output. So every layer begins with the simulation's codes, one call checks all of them, and no
layer's error hides behind that of an earlier one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from gdfq.deploy.runtime import imported, run, values_of
from gdfq.deploy.writer import QuantizedTensor
from gdfq.errors import GdfqError
from gdfq.nn import BatchNormActFakeQuantize

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from onnxruntime import InferenceSession

EPSILON = 1e-6
"""Of a quantizer's range, or of what its channel reaches where that is more. What float32 makes of a sum of products: a
value as close as this to the middle between two levels may be rounded to either. Of a range of 4 bits it is 1.5e-5 of a
step, of 8 bits 2.6e-4."""
LOGITS = 1e-5
"""Of the largest logit: how far logits in float may be apart."""
GIVEN = "__given"  # behind the name of a tensor of codes, the input that is read instead
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class LayerCheck:
    """What was compared of one layer's results.

    Attributes:
        name: of the layers between the codes that were given and those that are compared; of the quantizer, where none
            is there.
        codes: how many.
        boundary: those that differ by one, where the simulation's value lies within `EPSILON` of the middle.
        wrong: all others that differ.
        farthest: of the former, from the middle, as a share of the range or reach.
    """

    name: str
    codes: int = 0
    boundary: int = 0
    wrong: int = 0
    farthest: float = 0.0

    def __add__(self, other: "LayerCheck") -> "LayerCheck":
        counts = {name: getattr(self, name) + getattr(other, name) for name in ("codes", "boundary", "wrong")}
        return replace(self, **counts, farthest=max(self.farthest, other.farthest))


def cut(model: "ModelProto", codes: Mapping[str, QuantizedTensor]) -> "ModelProto":
    """A copy of a model in which all tensors of codes are outputs, and inputs to what reads them, see `GIVEN`."""
    onnx = imported("onnx")
    result = type(model)()
    result.CopyFrom(model)
    values = values_of(model)
    outputs = [value.name for value in model.graph.output]
    tensors = {of.tensor for of in codes.values()} - {value.name for value in model.graph.input}
    for node in result.graph.node:
        node.input[:] = [name + GIVEN if name in tensors else name for name in node.input]
    for name in sorted(tensors):
        result.graph.input.append(onnx.helper.make_value_info(name + GIVEN, values[name].type))
        if name not in outputs:
            result.graph.output.append(values[name])
    return result


def layers_before(model: "ModelProto", codes: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """For each quantizer, and for `logits`, the names of the layers that its codes are computed by, from other codes
    on."""
    producers = {name: node for node in model.graph.node for name in node.output}
    ends = {of.tensor for of in codes.values()}
    wanted = {name: of.tensor for name, of in codes.items()} | {"logits": model.graph.output[0].name}
    return {name: ", ".join(_layers(producers, tensor, ends)) or name for name, tensor in wanted.items()}


def _layers(producers: dict[str, "NodeProto"], tensor: str, ends: set[str]) -> list[str]:
    found, pending, seen = [], [tensor], set()
    while pending:
        node = producers.get(pending.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type in LAYERS:
            found.append(node.name)
        pending += [name for name in node.input if name not in ends]
    return sorted(found)


class Simulation:
    """Q on the CPU, with what its quantizers see and give.

    Args:
        student: Q.
        codes: by name of a quantizer of Q, what its levels are.
    """

    def __init__(self, student: nn.Module, codes: Mapping[str, QuantizedTensor]) -> None:
        self.student = student
        self.codes = codes

    @torch.inference_mode()
    def levels(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The codes of every quantizer, uint8 or int8, and the logits, for images `(N, C, H, W)`.

        Raises:
            GdfqError: a quantizer gives what is no level.
        """
        found: dict[str, Tensor] = {}

        def see(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            grid = self.codes[name].grid
            in_steps = output.double() / grid.step + grid.zero_point
            level = in_steps.round()
            is_level = (in_steps - level).abs() < 0.01  # not NaN
            if not bool((is_level & (level >= grid.lowest) & (level <= grid.highest)).all()):
                raise GdfqError(
                    f"{name} gives values that are no levels of step {grid.step:.6g} and zero point {grid.zero_point}: "
                    "its range was not observed, or the file is of another model"
                )
            found[name] = level.to(torch.int8 if grid.lowest < 0 else torch.uint8)

        with self._seeing(see):
            logits = self.student(images)
        return found, logits

    @torch.inference_mode()
    def values(self, images: Tensor, where: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """What quantizers read, in steps, as their codes are counted, where the mask `where[name]` is true; and how
        many steps the numbers reach that it is computed from, at least the quantizer's range."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if not where:
            return found

        def see(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in where:
                module, grid = self._module(name), self.codes[name].grid
                is_fused = isinstance(module, BatchNormActFakeQuantize)
                value = module.batch_norm_act(*inputs) if is_fused else inputs[0]
                reach = _reach_of_channels(inputs[0])
                if is_fused:
                    _, mean, variance, gamma, _ = inputs
                    factor = (variance + module.batch_norm_act.eps).rsqrt() * (1.0 if gamma is None else gamma.abs())
                    reach = (reach + mean.abs()) * factor
                reach = (reach.double() / grid.step).clamp_min(grid.highest - grid.lowest)
                reach = reach.view(1, -1, *[1] * (value.dim() - 2)).expand_as(value)
                found[name] = value[where[name]].double() / grid.step + grid.zero_point, reach[where[name]]

        with self._seeing(see):
            self.student(images)
        return found

    def _module(self, name: str) -> nn.Module:
        """What the graph calls: of a quantizer that is one with its BN, both."""
        return self.student.get_submodule(name.removesuffix(".quantizer"))

    @contextmanager
    def _seeing(self, see) -> Iterator[None]:
        handles = [
            self._module(name).register_forward_hook(
                lambda module, inputs, output, name=name: see(name, inputs, output)
            )
            for name in self.codes
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _reach_of_channels(x: Tensor) -> Tensor:
    """The largest amount of each channel of `x (N, C, ...)`, `(C,)`."""
    return x.abs().transpose(0, 1).flatten(1).amax(1)


def computed_levels(
    session: "InferenceSession",
    levels: Mapping[str, Tensor],
    codes: Mapping[str, QuantizedTensor],
    feed: dict[str, np.ndarray],
) -> tuple[dict[str, Tensor], Tensor]:
    """What a cut model computes of the simulation's levels.

    Args:
        session: of `cut(model, codes)`.
        levels: of the simulation, see there.
        feed: the images that they are of.

    Returns:
        Its levels, in the shapes of `levels`, and its logits.
    """
    shapes = {value.name: value.shape[1:] for value in session.get_inputs()}
    tensors = {name: of.tensor for name, of in codes.items() if of.tensor not in feed}
    given = {
        tensor + GIVEN: levels[name].reshape(len(levels[name]), *shapes[tensor + GIVEN]).numpy()
        for name, tensor in tensors.items()
        if tensor + GIVEN in shapes
    }
    *found, logits = run(session, {**feed, **given}, [*tensors.values(), session.get_outputs()[0].name])
    computed = {name: torch.from_numpy(of).view_as(levels[name]) for name, of in zip(tensors, found, strict=True)}
    return computed, torch.from_numpy(logits)


def compare(
    simulation: Simulation,
    images: Tensor,
    levels: Mapping[str, Tensor],
    computed: Mapping[str, Tensor],
    names: Mapping[str, str],
) -> dict[str, LayerCheck]:
    """Judge where `computed` differs from the simulation's `levels`; the other arguments are as in the functions above.

    Returns:
        By quantizer what was found.
    """
    differs = {name: codes != levels[name] for name, codes in computed.items()}
    values = simulation.values(images, {name: mask for name, mask in differs.items() if mask.any()})
    checks = {}
    for name, mask in differs.items():
        check = LayerCheck(names[name], mask.numel())
        if name in values:
            ours, theirs = (of[name][mask].double() for of in (levels, computed))
            value, reach = values[name]
            distance = (value - (ours + theirs) / 2).abs() / reach
            at_boundary = ((ours - theirs).abs() == 1) & (distance <= EPSILON)
            count = int(at_boundary.sum())
            farthest = float(distance[at_boundary].max()) if count else 0.0
            check = replace(check, boundary=count, wrong=len(ours) - count, farthest=farthest)
        checks[name] = check
    return checks
