"""Time every operation of gdfq_ext against PyTorch, torch.compile and other libraries.

    python -m benchmarks.ops --op fake_quantize --layout channels_last --out ops

Without options it measures a small set.
"""

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from benchmarks.ops import measure, output
from benchmarks.ops.case import DTYPES, LAYOUTS
from benchmarks.ops.operations import PROVIDERS
from gdfq.errors import GdfqError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for results.json, results.csv, results.txt and two pictures")
    several = {"action": "append", "default": []}
    parser.add_argument("--op", **several, help="an operation of gdfq_ext; may be repeated, like all up to --mb")
    parser.add_argument("--provider", **several, help=", ".join(PROVIDERS))
    parser.add_argument("--dtype", **several, help=", ".join(DTYPES))
    parser.add_argument("--layout", **several, help=", ".join(LAYOUTS))
    parser.add_argument("--layer", **several, help="for example resnet18-64x56")
    parser.add_argument("--mb", **several, type=float, help="megabytes of the activation")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda or cuda:N")
    parser.add_argument("--rounds", type=int, help="turns of every provider; default 15, on a GPU 30")
    parser.add_argument("--minutes", type=float, help="begin no case later than this")
    parser.add_argument("--full", action="store_true", help="all layers, sizes, types and layouts")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output, nothing else")
    return parser.parse_args(arguments)


def plan(args: argparse.Namespace) -> measure.Plan:
    return measure.plan(
        device=args.device, operations=args.op, providers=args.provider, dtypes=args.dtype, layouts=args.layout,
        layers=args.layer, megabytes=args.mb, rounds=args.rounds, minutes=args.minutes, full=args.full,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        run = measure.Run(plan(args))
    except GdfqError as error:
        print(error, file=sys.stderr)
        return 2
    cases = len(measure.items(run.plan))
    for _ in tqdm(run.measure(), total=cases, disable=args.json or not sys.stderr.isatty()):
        if args.out is not None:  # a run that is cut off leaves what it had
            output.write(run.to_dict(), args.out)
    result = run.to_dict()
    print(json.dumps(result) if args.json else output.table(result))
    if args.out is not None:
        try:
            output.draw(result, args.out)
        except GdfqError as error:
            print(error, file=sys.stderr)
            return 2
    if run.failed:
        print(f"{len(run.failed)} cases failed, the first: {run.failed[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
