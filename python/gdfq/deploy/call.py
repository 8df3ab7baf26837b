"""One call of an operator in Q's graph, as those that write it see it."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from gdfq.deploy.builder import Builder
from gdfq.deploy.trial import Seen
from gdfq.deploy.values import Codes, Computed, Value
from gdfq.errors import GdfqError
from gdfq.graph.nodes import name_of, op_of

INPUT = "images"
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


class Call:
    """A node that calls an aten operator. Arguments go by their names in its schema, the first one by `self` as well.

    Attributes:
        node: of Q's graph.
        name: the user's name of the place.
        op: the operator's, without namespace and overload.
        only_reader: whether one node alone reads the result.
        only_reader_of_source: whether it is all that reads its first input.
    """

    def __init__(
        self, builder: Builder, node: fx.Node, seen: Mapping[fx.Node, Seen], values: Mapping[fx.Node, Any]
    ) -> None:
        self.builder = builder
        self.node = node
        self.name = name_of(node)
        self.op = op_of(node)
        self.only_reader = len(node.users) == 1
        self.only_reader_of_source = bool(node.all_input_nodes) and len(node.all_input_nodes[0].users) == 1
        self._seen = seen
        self._values = values
        schema = node.target._schema.arguments
        self.arguments = {argument.name: argument.default_value for argument in schema}
        self.arguments |= dict(zip(self.arguments, node.args, strict=False)) | node.kwargs
        self.arguments.setdefault("self", node.args[0])

    def fixed(self, name: str) -> Any:
        """An argument that is no tensor of the image: a number, a list of them, a tensor.

        Raises:
            GdfqError: it depends on the batch size.
        """
        one, other = (
            fx.node.map_arg(self.arguments[name], lambda node, of=of: getattr(self._seen[node], of))
            for of in ("value", "other")
        )
        if not _same(one, other):
            raise GdfqError(f"{self.place}: '{name}' depends on the batch size, which ONNX files have not written in")
        return one

    def array(self, name: str) -> np.ndarray | None:
        """A tensor that does not depend on the image."""
        value = self.fixed(name)
        return None if value is None else value.detach().cpu().numpy()

    def value(self, name: str) -> Value:
        """An argument that is a tensor, or a number in the place of one."""
        argument = self.arguments[name]
        if isinstance(argument, fx.Node) and isinstance(self._seen[argument].value, (Tensor, torch.Size)):
            return self.of(argument)
        return self.of_float(self.builder.constant(self.fixed(name), np.float32))

    def of(self, node: fx.Node) -> Value:
        """The tensor that a node gives. One that depends on no image, but on how many there are, as zeros of the size
        of something, is the same for each of them."""
        seen = self._seen[node]
        if seen.of_image:
            return self._values[node]
        if None not in seen.shape:
            return self.of_float(self.builder.constant(seen.value.detach().cpu().numpy()))
        one = seen.value
        for dim, size in enumerate(seen.shape):
            one = one.narrow(dim, 0, 1) if size is None else one
        if seen.shape[1:].count(None) or not torch.equal(one.expand_as(seen.value), seen.value):
            raise GdfqError(f"{self.place}: what it computes from the batch size alone cannot be written to ONNX")
        add, constant = self.builder.add, self.builder.constant
        batch = add("Shape", INPUT, start=0, end=1)
        shape = add("Concat", batch, constant(list(one.shape[1:]), np.int64), axis=0)
        return self.of_float(add("Expand", constant(one.detach().cpu().numpy()), shape))

    def of_float(self, tensor: str) -> Computed:
        """A tensor by name that is no operator's of its own."""
        return Computed(self.builder, tensor)

    def tensor(self, name: str) -> str:
        """`value` in float, by name; empty where the argument is None."""
        argument = self.arguments[name]
        given = self.as_it_is(name)
        like = argument.meta.get("val") if isinstance(argument, fx.Node) else None
        if not isinstance(like, Tensor) or like.is_floating_point():
            return given
        return self.builder.add("Cast", given, to=self.builder.type_of("float32"))

    def as_it_is(self, name: str) -> str:
        """The tensor by name, whatever its type is: a mask, indices; empty where the argument is None."""
        return "" if self.arguments[name] is None else self.value(name).as_float

    def run(self, tensor: Tensor) -> Tensor:
        """What the operator makes of another tensor in the place of its first argument."""
        args, kwargs = fx.node.map_arg((self.node.args[1:], self.node.kwargs), lambda node: self._seen[node].value)
        return self.node.target(tensor, *args, **kwargs)

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes it reads that are computed from the image."""
        return [node for node in self.node.all_input_nodes if self._seen[node].of_image]

    def shape(self, name: str | None = None) -> tuple[int | None, ...]:
        """Of an argument, or of the result (the first of several); None for a size that depends on the batch."""
        if name is None and not isinstance(self._seen[self.node].value, torch.Size):
            return self.shapes()[0]
        return self._seen[self.node if name is None else self.arguments[name]].shape

    def shapes(self) -> list[tuple[int | None, ...]]:
        """Of an operator's several results."""
        seen = self._seen[self.node]
        return [Seen(*pair, True).shape for pair in zip(seen.value, seen.other, strict=True)]

    def sizes(self, name: str, dims: list[int]) -> list[int]:
        """Those of an argument in dimensions that do not depend on the batch."""
        return [self.known(self.shape(name)[dim]) for dim in dims]

    def known(self, size: int | None) -> int:
        if size is None:
            raise GdfqError(f"{self.place}: {self.op} works on a dimension whose size depends on the batch")
        return size

    def as_reshape(self, shape: tuple[int | None, ...]) -> str:
        """The constant that ONNX's Reshape takes for a shape."""
        if shape.count(None) > 1:
            raise GdfqError(f"{self.place}: more than one size depends on the batch")
        return self.builder.constant([-1 if size is None else size for size in shape], np.int64)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node that goes by the name of this place."""
        return self.builder.add(operator, *inputs, name=self.name, **attributes)

    def computed(self, operator: str, *inputs: str, **attributes: Any) -> Computed:
        """What a node of this operator computes."""
        reads_codes = all(isinstance(self._values[node], Codes) for node in self.inputs)
        reads_codes = reads_codes and len(self.inputs) == len(self.node.all_input_nodes)
        return Computed(self.builder, self.add(operator, *inputs, **attributes), operator, reads_codes)

    def unknown(self) -> GdfqError:
        """What to raise for an operator that cannot be written."""
        return GdfqError(f"{self.place}: the ONNX writer does not know the operator {self.op}, used as it is there")

    @property
    def place(self) -> str:
        """The user's layer and, where it is known, the line."""
        lines = _LINE.findall(self.node.meta.get("stack_trace") or "")
        return f"{self.name}, at {lines[-1][0]}:{lines[-1][1]}" if lines else self.name


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
