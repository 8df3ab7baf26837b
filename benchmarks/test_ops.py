"""Time of each operation by provider, shape, layout and direction with pytest-benchmark; `benchmarks.ops` says more."""

import pytest
import torch

import gdfq_ext
from benchmarks.ops import peers
from benchmarks.ops.case import LAYOUTS, Problem
from benchmarks.ops.operations import OPERATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "resnet20-16x32": (64, 16, 32, 32),
    "resnet20-32x16": (64, 32, 16, 16),
    "resnet20-64x8": (64, 64, 8, 8),
    "resnet18-64x56": (4, 64, 56, 56),
}
LIBRARIES = tuple(name for name in peers.LIBRARIES if peers.why_missing(name) is None)


def cases():
    """(operation, shape, layout, direction, provider), the provider last: rivals run one after the other."""
    for name, operation in OPERATIONS.items():
        providers = operation.build(Problem((2, 8, 4, 4), libraries=LIBRARIES)).providers
        for shape in list(SHAPES)[:1] if operation.fixed else SHAPES:
            for layout in LAYOUTS if operation.layouts else ["nchw"]:
                for direction in operation.directions:
                    for provider in providers:
                        yield name, shape, layout, direction, provider


@pytest.mark.parametrize(("operation", "shape", "layout", "direction", "provider"), list(cases()))
def test_op(benchmark, operation, shape, layout, direction, provider):
    problem = Problem(SHAPES[shape], layout=LAYOUTS[layout], device=DEVICE, libraries=LIBRARIES)
    case = OPERATIONS[operation].build(problem)
    benchmark.group = f"{operation} {shape} {layout} {direction}"
    benchmark.extra_info |= {
        "bytes": case.bytes_of(direction),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backend": gdfq_ext.backend_report().cause if provider == "ours" else provider,
    }
    call = case.run(provider, direction)

    def run():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()  # compilation and first-touch allocation stay outside
    benchmark(run)
