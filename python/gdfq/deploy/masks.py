"""Operators that compare and choose: masks, places, what lies at a place."""

from collections.abc import Callable

import torch

from gdfq.deploy.call import Call
from gdfq.deploy.values import Value


def masked_fill(call: Call) -> Value:
    return call.computed("Where", call.as_it_is("mask"), call.tensor("value"), call.tensor("self"))


def where(call: Call) -> Value:
    return call.computed("Where", call.as_it_is("condition"), call.tensor("self"), call.tensor("other"))


def logic(operator: str) -> Callable[[Call], Value]:
    """Of masks."""

    def write(call: Call) -> Value:
        if any(node.meta["val"].dtype != torch.bool for node in call.node.all_input_nodes):
            raise call.unknown()
        return call.computed(operator, *(call.as_it_is(name) for name in ("self", "other") if name in call.arguments))

    return write


def differs(call: Call) -> Value:
    equal = call.builder.add("Equal", call.tensor("self"), call.tensor("other"))
    return call.computed("Not", equal)


def gather(call: Call) -> Value:
    return call.computed("GatherElements", call.tensor("self"), call.as_it_is("index"), axis=call.fixed("dim"))


def argmax(operator: str) -> Callable[[Call], Value]:
    def write(call: Call) -> Value:
        if call.fixed("dim") is None:
            raise call.unknown()
        keep = int(call.fixed("keepdim"))
        return call.computed(operator, call.tensor("self"), axis=call.fixed("dim"), keepdims=keep)

    return write
