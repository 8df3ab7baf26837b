"""Digests of what training and every method compute, to show that a change of the code left all of it alone.

    python tests/gdfq/digests.py > before.json      # in a worktree of the old commit
    python tests/gdfq/digests.py > after.json       # on the same machine; diff says what is not bit for bit the same

Every case goes through all phases on a small network: presets, ablations, fine-tuning, baselines, with every operator
called and with iterations replayed (`recorded_graph`). Digests differ between machines, so none are kept. Where a
kernel's order of summation changes, GDFQ_EXT=reference shows whether anything else has.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "python"), str(HERE.parents[1])]

from recorded_graph import RecordedGraph  # noqa: E402
from small_models import Residual, TwoHeads, randomize_batch_norm  # noqa: E402

import gdfq  # noqa: E402
from gdfq.reproduce.figure1 import figure1  # noqa: E402
from gdfq.reproduce.recipe import trained_separately  # noqa: E402
from gdfq.train import cuda_graph  # noqa: E402

SHORT = {
    "method": "gdfq",
    "schedule.epochs": 4,
    "schedule.iterations": 5,  # a graph is captured in the fourth of each kind
    "schedule.batch_size": 8,
    "schedule.range_epochs": 1,
    "schedule.warmup_epochs": 2,
    "schedule.range_batches": 3,
    "schedule.milestones": [3],
    "zeroq.iterations": 8,
    "zeroq.images": 8,
    "run.held_out_images": 16,
    "run.device": "cpu",
    "student.learning_rate": 1e-2,
}
# Name -> preset, settings; with `graph` behind the name, and by what makes a network.
CASES = {
    **{preset: (preset, {}) for preset in ("paper-cifar", "paper-imagenet", "cifar", "imagenet", "demo", "offline")},
    "eight bits": ("cifar", {"quantizer.weight_bits": 8, "quantizer.activation_bits": 8}),
    "clipped": ("cifar", {"quantizer.straight_through": "clipped", "quantizer.weight_bits": 3}),
    "moving statistics": ("cifar", {"student.fixed_bns": False}),
    "the paper's sums": ("cifar", {"generator.bns_reduction": "sum", "student.kd_reduction": "batchmean"}),
    "cross-entropy alone": ("cifar", {"generator.bns_weight": 0, "student.distillation_weight": 0}),
    "generator for three epochs": ("cifar", {"schedule.generator_epochs": 3}),
    "stopping condition": ("cifar", {"generator.stop_accuracy": 1.0}),
    "ranges longer than warm-up": ("paper-cifar", {"schedule.range_epochs": 2, "schedule.warmup_epochs": 1}),
    "bfloat16": ("demo", {"run.precision": "bfloat16"}),
    "contiguous": ("demo", {"run.channels_last": False}),
}
BASELINES = ("zeroq", "dfq", "minmax", "calibrated", "mse", "aciq", "kl")


def real_images(classes: int = 5, count: int = 40) -> list[tuple[Tensor, int]]:
    random = torch.Generator().manual_seed(7)
    return [(torch.randn(3, 8, 8, generator=random), index % classes) for index in range(count)]


def digest(tensors: dict[str, Tensor]) -> str:
    """Of all values, whatever they are called, but for the state of observers: a fixed range tells what came of it."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".observer.state")}

    def of(tensor: Tensor) -> str:
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode() + content).hexdigest()

    return hashlib.sha256("".join(sorted(map(of, tensors.values()))).encode()).hexdigest()[:16]


def result_of(config: gdfq.Config, make: Any = Residual, **data: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    result = gdfq.quantize(randomize_batch_norm(make()), config, progress=False, evaluate_on=real_images(), **data)
    report = result.report.to_dict()
    names = ("data_free", "choice", "float_bytes", "quantized_bytes", "selected", "iterations")
    return {
        "student": digest(result.model.state_dict()),
        "choice_state": digest(result.choice_state or {}),
        "generator": digest(result.generator.state_dict() if result.generator else {}),
        "held_out": digest({str(i): images for i, images in enumerate(result.held_out_images)}),
        "top1": list(report["top1"].values()),
        **{name: report[name] for name in names},
    }


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    def load(preset: str, **settings: Any) -> gdfq.Config:
        return gdfq.Config.load(preset, {**SHORT, **settings})

    for wanted in (False, True):
        for name, (preset, settings) in CASES.items():
            yield (
                f"{name}, {'graph' if wanted else 'eager'}",
                result_of(load(preset, **settings, **{"run.cuda_graph": wanted})),
            )
        yield (
            f"trained separately, {'graph' if wanted else 'eager'}",
            result_of(trained_separately(load("cifar", **{"run.cuda_graph": wanted}))),
        )
    yield "two heads", result_of(load("cifar"), TwoHeads)
    yield "finetune", result_of(load("cifar", method="finetune"), train_on=real_images())
    for method in BASELINES:
        yield method, result_of(load("cifar", method=method))
    for images in ("zeroq", "generator"):
        yield f"mse, {images}", result_of(load("cifar", method="mse", **{"calibration.images": images}))
    yield "kl, real images", result_of(load("cifar", method="kl"), calibrate_on=real_images())
    yield "figure 1", figure1(None, scale=0.02)["methods"]


def main() -> None:
    torch.set_num_threads(1)
    cuda_graph.CudaGraph = RecordedGraph
    json.dump(dict(results()), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
