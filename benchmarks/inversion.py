"""How well inverted images fit a network for the time that they take: what the defaults of `inversion` were chosen by.

    python -m benchmarks.inversion --network demo --out FILE
    python -m benchmarks.inversion --network lite0 --out FILE

Each variant makes one part of a bank on one thread. The fit is `gdfq.fit`'s mean distance of BN statistics from
P's, without swing and views; time is the process's own (`time.process_time`), since others may share the machine.
`lite0` is EfficientNet-Lite0 (examples/efficientnet_lite0.py), `demo` the demonstration's ResNet-20.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gdfq
from gdfq import demo
from gdfq.fit import fit, mean_distances
from gdfq.graph import build_teacher, capture, infer
from gdfq.images.inversion import InversionConfig, invert
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

CPU = torch.device("cpu")
SMALL: list[dict[str, Any]] = [
    {"iterations": 100},
    {"iterations": 100, "swing": False},
    {"iterations": 50},
    {"iterations": 250},
    {"iterations": 100, "learning_rate": 0.05},
    {"iterations": 100, "learning_rate": 0.2},
    {"iterations": 100, "learning_rate": 0.4},
]
LARGE: list[dict[str, Any]] = [
    {"iterations": 40},
    {"iterations": 20, "coarse_iterations": 60},
    {"iterations": 40, "swing": False},
    {"iterations": 20, "coarse_iterations": 60, "swing": False},
    {"iterations": 20, "coarse_iterations": 60, "learning_rate": 0.05},
    {"iterations": 20, "coarse_iterations": 60, "learning_rate": 0.2},
    {"iterations": 40, "learning_rate": 0.05},
    {"iterations": 40, "coarse_iterations": 120},
    {"iterations": 80},
]


def network(name: str) -> tuple[nn.Module, int, int, list[dict[str, Any]]]:
    """The network, its image size, how many images are made, and the variants."""
    if name == "demo":
        return demo.teacher(), 28, 64, SMALL
    return gdfq.load_model("examples/efficientnet_lite0.py:efficientnet_lite0"), 224, 16, LARGE


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=["demo", "lite0"], required=True)
    parser.add_argument("--out", type=Path, required=True, help="write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, size, count, variants = network(args.network)
    captured = capture(model, size)
    teacher = build_teacher(captured)
    captured = replace(captured, pixels=infer(teacher, captured.image_shape))
    result = provenance(1) | {"network": args.network, "images": count}
    rows: list[dict[str, Any]] = []
    for settings in variants:
        start = time.process_time()
        images = invert(teacher, captured, InversionConfig(**{"coarse_iterations": 0} | settings), count, 0, CPU)
        seconds = time.process_time() - start
        distance, of_noise = mean_distances(fit(teacher, [images], captured.pixels).layers)
        rows.append({"settings": settings, "seconds": seconds, "distance": distance, "of_noise": of_noise})
        print(f"{settings}: {distance:.4f} (noise: {of_noise:.3f}), {seconds / count:.2f} s an image", flush=True)
        write_text(args.out, json.dumps(result | {"rows": rows}, indent=1) + "\n")
    print(describe(result))


if __name__ == "__main__":
    main()
