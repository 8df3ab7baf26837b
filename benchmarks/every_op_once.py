"""Every operation of gdfq_ext forward and backward on small, odd shapes: what a sanitizer watches.

    python -m benchmarks.every_op_once DEVICE

Nothing is compared; that is what the tests are for.
"""

import sys

import torch

from benchmarks.ops.case import DTYPES, LAYOUTS, Problem
from benchmarks.ops.operations import OPERATIONS

SHAPES = [(3, 5, 7, 9), (2, 8, 4, 4), (33, 3, 1, 1)]


def main(device: str) -> None:
    calls = 0
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES if operation.low_precision else ["fp32"]:
            for layout in LAYOUTS if operation.layouts else ["nchw"]:
                for shape in SHAPES[:1] if operation.fixed else SHAPES:
                    case = operation.build(Problem(shape, DTYPES[dtype], LAYOUTS[layout], device))
                    for direction in {"forward", operation.directions[-1]}:
                        case.run("ours", direction)()
                        calls += 1
        if device != "cpu":
            torch.cuda.synchronize()  # an error belongs to the operation that is named next
        print(name, flush=True)
    print(f"{calls} calls on {device}")


if __name__ == "__main__":
    main(sys.argv[1])
