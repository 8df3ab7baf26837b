"""Does it matter in what pixels a network was trained? Data-free W4A4 of the same network, trained in each of them.

    python -m benchmarks.input_scale --seeds 0 1 2 --out FILE

For every seed a small network is trained on Fashion-MNIST in each kind of pixels (`benchmarks/small_networks.py`) and
quantized with the preset `demo`, which is told nothing of them.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

import gdfq
from benchmarks.small_networks import PIXELS, SIZE, top1, trained
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text


def measured(name: str, seed: int) -> dict:
    network = trained(name, seed)
    config = gdfq.Config.load("demo", {"model.image_size": SIZE, "run.seed": seed})
    result = gdfq.quantize(network, config, progress=False)
    report = result.report
    return {
        "pixels": name,
        "seed": seed,
        "float": top1(network, name),
        "quantized": top1(result.model, name),
        "taken_for": str(report.pixels),
        "network": f"small, {name}, {seed}",
        "run": "as it is",
        "good": True,  # see benchmarks.fit
        "fit": asdict(report.fit),
    }


def table(rows: list[dict]) -> str:
    lines = ["| pixels | float | W4A4 | |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["pixels"] for row in rows):
        own = [row for row in rows if row["pixels"] == name]
        means = (statistics.mean(row[key] for row in own) for key in ("float", "quantized"))
        each = ", ".join(f"{row['quantized']:.1f}" for row in own)
        lines.append("| {} | {:.2f} | {:.2f} | {} |".format(name, *means, each))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input_scale", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pixels", nargs="+", default=list(PIXELS), choices=list(PIXELS), metavar="KIND")
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    args = parser.parse_args()
    result = provenance(torch.get_num_threads())
    rows: list[dict] = []
    for seed in args.seeds:
        for name in args.pixels:
            rows.append(measured(name, seed))
            print(f"{name}, seed {seed}: float {rows[-1]['float']:.2f}, W4A4 {rows[-1]['quantized']:.2f}", flush=True)
            write_text(args.out, json.dumps(result | {"rows": rows}, indent=1) + "\n")
    print(f"{table(rows)}\n{describe(result)}")


if __name__ == "__main__":
    main()
