"""An ONNX graph in the making: nodes, constants that are stored once, short names."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdfq.deploy.runtime import imported
from gdfq.errors import GdfqError

if TYPE_CHECKING:
    import onnx

IR_VERSION = 10
FIRST_OPSET = 21
_DIGITS = "abcdefghijklmnopqrstuvwxyz"


class Builder:
    """Collects an ONNX graph whose node order is that of the calls."""

    def __init__(self, opset: int) -> None:
        if opset < FIRST_OPSET:
            raise GdfqError(f"ONNX files are written for opset {FIRST_OPSET} and later, which have integers of 4 bits")
        self.onnx = imported("onnx")
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple, onnx.TensorProto] = {}
        self._numbers = itertools.count()
        self._node_names: set[str] = set()

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output; empty inputs at the end are left out.

        Args:
            name: of the node; a number is put behind one that is taken.
            attributes: those that are None are left out.

        Returns:
            the name of the output.
        """
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        attributes = {key: value for key, value in attributes.items() if value is not None}
        output = self._new_name()
        self.nodes.append(self.onnx.helper.make_node(operator, given, [output], self._free_name(name), **attributes))
        return output

    def constant(self, values: Any, dtype: Any = None, owner: str = "") -> str:
        """The name of an initializer that holds `values`: the same for the same values, type, shape and owner."""
        array = np.asarray(values, dtype)
        return self._constant(array.dtype.name, array.shape, array.tobytes(), owner)

    def packed_int4(self, values: np.ndarray) -> str:
        """The name of an INT4 initializer that holds `values`, int8 of -8..7: two in a byte, the first one low."""
        nibbles = values.reshape(-1).view(np.uint8) & 0xF
        nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
        return self._constant("int4", values.shape, (nibbles[::2] | nibbles[1::2] << 4).tobytes())

    def type_of(self, name: str) -> int:
        """ONNX's number of a type, by its NumPy name."""
        return getattr(self.onnx.TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(name, name.upper()))

    def model(
        self,
        inputs: Sequence[tuple[str, str, Sequence]],
        outputs: Sequence[tuple[str, str, Sequence]],
        metadata: dict[str, str],
    ) -> "onnx.ModelProto":
        """The model, without nodes and constants that no output needs.

        Args:
            inputs, outputs: name, NumPy name of the type, and shape each; text in a shape is a size that varies.
        """
        nodes, used = self._needed({name for name, _, _ in outputs})
        helper = self.onnx.helper
        graph = helper.make_graph(
            nodes,
            "gdfq",
            [helper.make_tensor_value_info(name, self.type_of(dtype), shape) for name, dtype, shape in inputs],
            [helper.make_tensor_value_info(name, self.type_of(dtype), shape) for name, dtype, shape in outputs],
            [tensor for tensor in self._constants.values() if tensor.name in used],
        )
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="gdfq")
        helper.set_model_props(model, metadata)
        return model

    def rename(self, tensor: str, name: str) -> None:
        """Give the output of a node another name."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [name if other == tensor else other for other in names]

    def _needed(self, used: set[str]) -> tuple[list["onnx.NodeProto"], set[str]]:
        kept = []
        for node in reversed(self.nodes):
            if used.intersection(node.output):
                kept.append(node)
                used.update(node.input)
        return kept[::-1], used

    def _constant(self, dtype: str, shape: Sequence[int], raw: bytes, owner: str = "") -> str:
        key = (dtype, tuple(shape), raw, owner)
        if key not in self._constants:
            make = self.onnx.helper.make_tensor
            self._constants[key] = make(self._new_name(), self.type_of(dtype), shape, raw, raw=True)
        return self._constants[key].name

    def _new_name(self) -> str:
        number, name = next(self._numbers), ""
        while number >= 0:
            number, digit = divmod(number, len(_DIGITS))
            name, number = _DIGITS[digit] + name, number - 1
        return name

    def _free_name(self, name: str) -> str:
        numbered = (f"{name}_{number}" if number else name for number in itertools.count())
        free = next(candidate for candidate in numbered if not candidate or candidate not in self._node_names)
        self._node_names.add(free)
        return free
