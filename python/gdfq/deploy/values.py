"""Values on their way through the graph, written as late as possible.

Rounding to a grid commutes with whatever is monotone or only moves values: Q(relu(x)) = clip(Q(x)), Q(flatten(x)) =
flatten(Q(x)), Q(cat(x, y)) = cat(Q(x), Q(y)). So clamps, moves and concatenations are kept back until somebody asks:
a quantizer is written where the number arises, directly behind the layer that computes it, and the rest acts on codes.
Somebody who wants floating numbers gets all of it in float.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from gdfq.deploy.builder import Builder
from gdfq.deploy.grids import Grid

# Writes an operator that moves or picks values of a tensor, which it is given by name, as is the number that stands
# for zero there: 0.0, or the zero point of codes. Returns the name of the result.
Move = Callable[[str, np.generic], str]

# Operators that onnxruntime computes in integers between codes and a quantizer.
INTEGER_OPERATORS = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid", "Softmax")


class Value:
    """A tensor that a node of Q gives. What a class adds is how it is written."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder

    @cached_property
    def as_float(self) -> str:
        """The name of the tensor in float32."""
        raise NotImplementedError

    def rounded(self, grid: Grid, low: int, high: int) -> str:
        """The name of its codes on `grid`, clipped to `low` and `high`."""
        return _rounded(self.builder, self.as_float, grid, low, high)

    def moved(self, move: Move, only_reader: bool) -> "Value":
        """What `move` makes of it; `only_reader`: nobody else reads the value."""
        return Moved(self, move, only_reader)


class Arising(Value):
    """Numbers that a layer or another operator computes.

    Attributes:
        readers: how often they are read in float.
        quantizers: how often they are rounded to codes.
    """

    def __init__(self, builder: Builder) -> None:
        super().__init__(builder)
        self.readers = 0
        self.quantizers = 0

    @property
    def tensor(self) -> str:
        """The name of the tensor that holds them in float32."""
        raise NotImplementedError

    @property
    def as_float(self) -> str:  # every reader is counted
        self.readers += 1
        return self.tensor

    def rounded(self, grid: Grid, low: int, high: int) -> str:
        self.quantizers += 1
        return _rounded(self.builder, self.tensor, grid, low, high)

    @property
    def only_rounded(self) -> bool:
        """Whether one quantizer is all that reads them: what a runtime needs to give codes at once."""
        return (self.readers, self.quantizers) == (0, 1)


class Computed(Arising):
    """What is there in float: the image, a constant, or what an operator computes.

    Args:
        tensor: its name.
        operator: ONNX's name of it, empty where it is none.
        reads_codes: whether every input is on a grid.
    """

    tensor = ""

    def __init__(self, builder: Builder, tensor: str, operator: str = "", reads_codes: bool = False) -> None:
        super().__init__(builder)
        self.tensor = tensor
        self.operator = operator
        self.reads_codes = reads_codes

    @property
    def in_integers(self) -> bool:
        """Whether onnxruntime computes it in integers."""
        return self.operator in INTEGER_OPERATORS and self.reads_codes and self.only_rounded


class Codes(Value):
    """Values on a grid.

    Args:
        codes: the name of a tensor of the grid's type.
    """

    def __init__(self, builder: Builder, codes: str, grid: Grid) -> None:
        super().__init__(builder)
        self.codes = codes
        self.grid = grid

    @cached_property
    def as_float(self) -> str:
        return self.builder.add("DequantizeLinear", self.codes, *_step_and_zero_point(self.builder, self.grid))

    def moved(self, move: Move, only_reader: bool) -> "Codes":
        return Codes(self.builder, move(self.codes, self.grid.dtype.type(self.grid.zero_point)), self.grid)


class Clamped(Value):
    """Another value, no less than `low` and no more than `high`; None is no bound."""

    def __init__(self, base: Value, low: float | None, high: float | None) -> None:
        super().__init__(base.builder)
        self.base = base
        self.low = low
        self.high = high

    @cached_property
    def as_float(self) -> str:
        if (self.low, self.high) == (0, None):
            return self.builder.add("Relu", self.base.as_float)
        bounds = ("" if b is None else self.builder.constant(b, np.float32) for b in (self.low, self.high))
        return self.builder.add("Clip", self.base.as_float, *bounds)

    def rounded(self, grid: Grid, low: int, high: int) -> str:
        low = low if self.low is None else min(max(low, grid.code(self.low)), high)
        high = high if self.high is None else max(min(high, grid.code(self.high)), low)
        return self.base.rounded(grid, low, high)


class Moved(Value):
    """What an operator that moves or picks values makes of another."""

    def __init__(self, base: Value, move: Move, only_reader: bool) -> None:
        super().__init__(base.builder)
        self.base = base
        self.move = move
        self.only_reader = only_reader

    @cached_property
    def as_float(self) -> str:
        return self.move(self.base.as_float, np.float32(0))

    def rounded(self, grid: Grid, low: int, high: int) -> str:
        if not self.only_reader:
            return super().rounded(grid, low, high)
        return self.move(self.base.rounded(grid, low, high), grid.dtype.type(grid.zero_point))


class Joined(Value):
    """The concatenation of values; `only_reader` as for `Value.moved`."""

    def __init__(self, parts: list[Value], axis: int, only_reader: bool, name: str) -> None:
        super().__init__(parts[0].builder)
        self.only_reader = only_reader
        self.parts = parts
        self.axis = axis
        self.name = name

    @cached_property
    def as_float(self) -> str:
        return self._join([part.as_float for part in self.parts])

    def rounded(self, grid: Grid, low: int, high: int) -> str:
        if not self.only_reader or all(isinstance(part, Codes) for part in self.parts):
            return super().rounded(grid, low, high)
        return self._join([part.rounded(grid, low, high) for part in self.parts])

    def _join(self, names: list[str]) -> str:
        return self.builder.add("Concat", *names, name=self.name, axis=self.axis)


def quantized(value: Value, grid: Grid) -> Codes:
    """`value` on `grid`, which fits into a byte."""
    return Codes(value.builder, value.rounded(grid, grid.lowest, grid.highest), grid)


def _rounded(builder: Builder, name: str, grid: Grid, low: int, high: int) -> str:
    codes = builder.add("QuantizeLinear", name, *_step_and_zero_point(builder, grid))
    limits = np.iinfo(grid.dtype)
    if (low, high) == (limits.min, limits.max):
        return codes
    return builder.add("Clip", codes, *(builder.constant(bound, grid.dtype) for bound in (low, high)))


def _step_and_zero_point(builder: Builder, grid: Grid) -> tuple[str, str]:
    return builder.constant(grid.step, np.float32), builder.constant(grid.zero_point, grid.dtype)
