"""Where an iteration's time goes: parts that exclude one another, seen from outside, without a change in what is timed.

Hooks on the three networks, on their outputs and on the optimizers put marks into torch's profile where a stage begins:
a network's forward pass, or its backward pass, which begins when the gradient arrives at its output. Operators belong
to the stage that they start in, but for those that have a part of their own wherever they run (`OWN_PART`).
"""

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "gdfq stage: "
PARTS = ("generator", "teacher", "student", "quantizers", "statistics", "losses", "optimizers", "other")
# The fused operations of gdfq_ext hold the BatchNorm and activation before a quantizer, and the teacher's, too.
OWN_PART = {
    "quantizers": re.compile(r"gdfq_ext[:_]+((batch_norm_act_)?fake_quantize|observe_range|round_learned)"),
    "statistics": re.compile(r"gdfq_ext[:_]+(batch_norm_act_moments|bns_loss)"),
    "optimizers": re.compile(r"Optimizer\."),
}
# Operators that move no data: they allocate, look at a tensor in another way, or call on others to do something.
BOOKKEEPING = re.compile(
    r"(aten::)?(empty|new_empty|resize|as_strided|view|_unsafe_view|reshape|_reshape_alias|alias|detach|contiguous|to|t|"
    r"transpose|permute|expand|squeeze|unsqueeze|select|slice|narrow|split|split_with_sizes|unbind|chunk|flatten|"
    r"resolve_conj|resolve_neg|lift_fresh|result_type|item|_local_scalar_dense)(_like|_strided|_as)?_?$"
)
# What runs between operators: autograd's nodes, torch.compile's regions, and ranges such as an optimizer's step.
OPERATOR = re.compile(r"\w+::\w+$")
COMPILED = re.compile(r"Torch-Compiled Region|CompiledFunction")


@dataclass(frozen=True)
class Networks:
    """What is hooked: the modules that an iteration calls, and both optimizers."""

    generator: nn.Module
    teacher: nn.Module
    student: nn.Module
    optimizers: tuple[Optimizer, ...]


def measure(step: Callable[[], object], iterations: int, networks: Networks | None) -> dict[str, Any]:
    """Profile some iterations, each a call of `step`, and account for them; every figure is per iteration.

    Args:
        step: warmed up.
        iterations: how many.
        networks: None where hooks would change what is timed, or there are no networks: parts are left out.

    Returns:
        `profiled_ms`, the time of an iteration while profiled; `parts_ms`, of each of `PARTS`, or None; and `launches`
        (see `count_launches`).
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with marking(networks) if networks else nullcontext(), profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(iterations):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    events = list(profiler.events())
    totals = part_times(events, on_gpu) if networks else None
    count = count_launches(events, on_gpu)
    return {
        "profiled_ms": seconds * 1e3 / iterations,
        "parts_ms": totals and {part: total / iterations for part, total in totals.items()},
        "launches": count and {name: total / iterations for name, total in count.items()},
    }


@contextmanager
def marking(networks: Networks) -> Iterator[None]:
    """Inside the block every iteration puts its marks into the profile."""
    handles = []

    def mark(stage: str) -> None:
        with record_function(MARK + stage):
            pass

    def hook(network: nn.Module, stage: str) -> None:
        def after(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            mark("losses")  # what follows a forward pass, unless another network's does
            first = output if isinstance(output, Tensor) else output[0]
            if first.requires_grad:
                first.register_hook(lambda gradient: mark(stage))

        handles.append(network.register_forward_pre_hook(lambda module, inputs: mark(stage)))
        handles.append(network.register_forward_hook(after))

    for stage in ("generator", "teacher", "student"):
        hook(getattr(networks, stage), stage)
    for optimizer in networks.optimizers:
        handles.append(optimizer.register_step_post_hook(lambda *_: mark("other")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_times(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float] | None:
    """Milliseconds of each part of `PARTS`: on a GPU of the kernels, copies and fills that an operator launched, on a
    CPU of the operator itself without the operators that it called, autograd's nodes included.

    None where the networks' marks are missing: they ran from a CUDA graph.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    marks = sorted(
        (event.time_range.start, event.name.removeprefix(MARK)) for event in events if event.name.startswith(MARK)
    )
    if not {"generator", "teacher", "student"} <= {stage for _, stage in marks}:
        return None
    starts = [start for start, _ in marks]

    def part(event: FunctionEvent) -> str:
        for ancestor in (event, *callers_of(event)):
            for name, pattern in OWN_PART.items():
                if pattern.search(ancestor.name):
                    return name
        index = bisect_right(starts, event.time_range.start)
        return marks[index - 1][1] if index else "other"

    totals = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.name.startswith(MARK):
            continue
        # A range such as an optimizer's step has a span of the same name on the device, which is no kernel.
        device_time = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
        microseconds = device_time if on_gpu else event.self_cpu_time_total
        if microseconds:
            totals[part(event)] += microseconds / 1e3
    return totals


def count_launches(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, int] | None:
    """`{"kernels": N}`, kernels, copies and fills on a GPU; on a CPU `{"leaf operator calls": N}`, calls of operators
    that call no other but to allocate or view, or None where torch.compile's loops run, which are no operators."""
    events = list(events)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    if on_gpu:
        host_names = {event.name for event in on_host}  # a range's span on the device has the range's name
        return {"kernels": sum(e.device_type != DeviceType.CPU and e.name not in host_names for e in events)}
    if any(COMPILED.match(event.name) for event in on_host):
        return None
    computing = [event for event in on_host if OPERATOR.match(event.name) and not BOOKKEEPING.match(event.name)]
    callers = {id(caller) for event in computing for caller in callers_of(event)}
    return {"leaf operator calls": sum(id(event) not in callers for event in computing)}


def callers_of(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """What `event` was called from, innermost first."""
    caller = event.cpu_parent
    while caller is not None:
        yield caller
        caller = caller.cpu_parent
