"""Does the quantizer's division slow down where its numerator is 0, as behind a ReLU that of half of the elements is?

    python -m benchmarks.zero_numerators --out zero_numerators.json

A level is dequantized as (q + zero) / scale (`csrc/kernels/quantizer.h`). On a GPU an IEEE division is a short sequence
for ordinary operands and a longer one for others, and a warp goes through both if its lanes differ. The same kernel
runs on the same shape with numerators that are all positive and with half of them 0, at random places, in turns with a
copy of the input. The range begins at 0 and has steps of 1, so that every numerator is x rounded:

    positive     all elements from 0.6 up
    half small   half of them below 0.4: numerators of 0 from inputs that are not
    half zero    half of them 0; through BatchNorm and ReLU: half of them negative before it
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gdfq_ext
from benchmarks.ops.case import DTYPES, LAYOUTS
from benchmarks.ops.measure import COPY, checked_device, median, ratio, turns
from benchmarks.ops.shapes import LAYERS, Shape
from benchmarks.ops.timing import clock_for
from gdfq.errors import GdfqError
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

BITS = 4
LEVELS = 2**BITS - 1
POSITIVE = "positive"


def inputs(shape: tuple[int, ...], behind_relu: bool, device: str) -> dict[str, Tensor]:
    """Name -> x in float32, contiguous; see above."""
    torch.manual_seed(0)
    positive = 0.6 + (LEVELS - 0.6) * torch.rand(shape, device=device)
    is_half = torch.rand(shape, device=device) < 0.5
    if behind_relu:
        return {POSITIVE: positive, "half zero": torch.where(is_half, -positive, positive)}
    small = 0.05 + 0.35 * torch.rand(shape, device=device)
    return {
        POSITIVE: positive,
        "half small": torch.where(is_half, small, positive),
        "half zero": torch.where(is_half, 0.0, positive),
    }


def kernels(channels: int, device: str) -> dict[str, Any]:
    """Name -> function of x: both with steps of 1, and a normalization that changes nothing."""
    lower, upper = torch.tensor([0.0], device=device), torch.tensor([float(LEVELS)], device=device)
    zeros, ones = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    return {
        "fake_quantize": lambda x: gdfq_ext.fake_quantize(x, lower, upper, BITS),
        "batch_norm_act_fake_quantize": lambda x: gdfq_ext.batch_norm_act_fake_quantize(
            x, zeros, ones, ones, zeros, lower, upper, BITS, eps=0.0, act="relu"
        ),
    }


@torch.no_grad()
def measure(
    device: str, layer: str, megabytes: float, dtype: str, layout: str, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for every kernel and data set."""
    shape = Shape(layer, megabytes).of(DTYPES[dtype].itemsize)
    clock = clock_for(device)
    for name, kernel in kernels(shape[1], device).items():
        data = {
            kind: x.to(DTYPES[dtype], memory_format=LAYOUTS[layout])
            for kind, x in inputs(shape, name != "fake_quantize", device).items()
        }
        source, target = data[POSITIVE], torch.empty_like(data[POSITIVE])
        calls = {kind: lambda x=x, kernel=kernel: kernel(x) for kind, x in data.items()}
        calls[COPY] = lambda source=source, target=target: target.copy_(source)
        seconds = {who: times for (who, cache), times in turns(calls, clock, rounds).items() if cache == "cold"}
        for kind in data:
            yield {
                "kernel": name, "dtype": dtype, "layout": layout, "shape": "x".join(map(str, shape)), "data": kind,
                "zero_numerators": zero_share(kernel(data[kind])), "rounds": len(seconds[kind]),
                "median_us": median(seconds[kind]) * 1e6, "copy_us": median(seconds[COPY]) * 1e6,
                "share_of_copy": ratio(seconds[COPY], seconds[kind]),
                "over_positive": ratio(seconds[kind], seconds[POSITIVE]),
            }  # fmt: skip


def zero_share(y: Tensor) -> float:
    """The share of numerators that are 0: those of results that are."""
    return (y == 0).float().mean().item()


HEADER = f"{'kernel':29}{'type':6}{'data':12}{'zeros':>6}{'us':>9}{'of copy':>9}{'/ positive':>12}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['kernel']:29}{row['dtype']:6}{row['data']:12}{row['zero_numerators']:6.0%}{row['median_us']:9.1f}"
        f"{row['share_of_copy']:9.0%}{row['over_positive']:12.3f}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero_numerators", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--layer", choices=list(LAYERS), default="resnet18-64x56", help="default: %(default)s")
    parser.add_argument("--mb", type=float, default=64.0, help="megabytes of x (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--layout", choices=list(LAYOUTS), default="channels_last")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        device = checked_device(args.device)
    except GdfqError as error:
        print(error, file=sys.stderr)
        return 2
    result = {**provenance(torch.get_num_threads()), "backend": gdfq_ext.backend_report().cause, "rows": []}
    print(f"cold cache, {args.layer} {args.mb:g} MB, {args.layout}; {result['backend']}\n{describe(result)}\n{HEADER}")
    for dtype in args.dtypes:
        for row in measure(device, args.layer, args.mb, dtype, args.layout, args.rounds):
            result["rows"].append(row)
            print(line(row), flush=True)
            if args.out is not None:  # a run that is cut off leaves what it had
                write_text(args.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
