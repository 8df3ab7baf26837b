"""Time of each operation by provider, shape, layout and direction; `benchmarks/README.md` says how to run it."""

from collections.abc import Callable

import pytest
import torch
from op_providers import OPERATIONS, PROVIDERS

import gdfq_ext

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "resnet20-16x32": (64, 16, 32, 32),
    "resnet20-32x16": (64, 32, 16, 16),
    "resnet20-64x8": (64, 64, 8, 8),
    "resnet18-64x56": (4, 64, 56, 56),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Operations whose cost does not depend on the layout of the activation.
ONE_LAYOUT = {"fake_quantize_weight", "bns_loss", "distillation_loss"}
EAGER = {"fake_quantize", "fake_quantize_clipped", "batch_norm_act_fake_quantize"}
NO_GRADIENT = {"observe_range"}


def cases():
    """(operation, shape, layout, direction, provider), the provider last: rivals run one after the other."""
    for operation in OPERATIONS:
        for shape in SHAPES:
            for layout in ["nchw"] if operation in ONE_LAYOUT else LAYOUTS:
                for direction in ["forward"] if operation in NO_GRADIENT else ["forward", "backward", "both"]:
                    for provider in PROVIDERS:
                        if provider == "eager" and operation not in EAGER:
                            continue
                        if provider in ("released", "compile") and operation == "fake_quantize_clipped":
                            continue
                        yield operation, shape, layout, direction, provider


def measured(call: Callable, leaves: list[torch.Tensor], direction: str) -> Callable[[], None]:
    """What is timed: a call that ends when the device has finished."""

    def results():
        value = call()
        return [value] if isinstance(value, torch.Tensor) else list(value)

    def forward():
        with torch.no_grad():
            call()

    if direction != "forward":
        kept = results()
        gradients = [torch.ones_like(result) for result in kept]

    def backward():
        torch.autograd.grad(kept, leaves, gradients, retain_graph=True)

    def both():
        torch.autograd.grad(results(), leaves, gradients)

    run = {"forward": forward, "backward": backward, "both": both}[direction]
    if DEVICE == "cpu":
        return run

    def synchronised():
        run()
        torch.cuda.synchronize()

    return synchronised


@pytest.mark.parametrize(("operation", "shape", "layout", "direction", "provider"), list(cases()))
def test_op(benchmark, operation, shape, layout, direction, provider):
    torch.manual_seed(0)
    x = torch.randn(SHAPES[shape], device=DEVICE).contiguous(memory_format=LAYOUTS[layout])
    case = OPERATIONS[operation](x)
    moved = {"forward": case.bytes_forward, "backward": case.bytes_backward}
    benchmark.group = f"{operation} {shape} {layout} {direction}"
    benchmark.extra_info |= {
        "bytes": moved.get(direction, case.bytes_forward + case.bytes_backward),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backend": gdfq_ext.backend_report().cause if provider == "ours" else provider,
    }
    run = measured(case.providers[provider], case.leaves, direction)
    run()  # compilation and first-touch allocation stay outside
    benchmark(run)
