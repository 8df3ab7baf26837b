"""Does a report say when its figures say nothing? Runs made bad on purpose against good ones, and what each reported.

    python -m benchmarks.fit --networks chosen --out FILE
    python -m benchmarks.fit --networks counted --method reconstruction --cifar FOLDER --out FILE

The bounds of `gdfq.fit` were chosen on the networks `chosen`, but for that of noise's distance, for which `counted` had
been seen, too; not so `others`. FOLDER holds CIFAR-10's test images and a ResNet-20 for them, see
`benchmarks/gpu_prepare.sh`. A run is bad that is told a wrong scale of the pixels, whose images are not learned, whose
network has BN statistics of something else, or that is judged on noise.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import gdfq
from benchmarks import small_networks
from benchmarks.accuracy_in_time import MEAN, STD
from gdfq import demo
from gdfq.data import load_dataset
from gdfq.fit import LayerFit, problems
from gdfq.graph import build_teacher, capture
from gdfq.graph.scale import infer
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

FACTORS = (1.5, 2.0, 4.0, 16.0, 255.0, 1 / 1.5, 1 / 4, 1 / 255)  # every fourth of them for a network
METHODS = {  # settings, and those that leave its images as they begin
    "gdfq": ({"schedule.iterations": 40}, {"generator.learning_rate": 1e-12}),  # of the 100 of the preset `demo`
    "reconstruction": ({}, {"inversion.learning_rate": 1e-12}),
}


@dataclass(frozen=True)
class Subject:
    """A trained network and labeled images, of which the report is not told."""

    name: str
    network: nn.Module
    images: Dataset
    size: int


def small(name: str, seed: int) -> Subject:
    images = small_networks.images(name)[1]
    return Subject(f"small, {name}, {seed}", small_networks.trained(name, seed), images, small_networks.SIZE)


def cifar(folder: Path) -> Subject:
    network = gdfq.load_model("examples/custom_resnet20.py:resnet20", folder / "resnet20.safetensors")
    return Subject("ResNet-20, CIFAR-10", network, load_dataset(folder / "test.npz", mean=MEAN, std=STD), 32)


def subjects(which: str, folder: Path | None) -> Iterator[Subject]:
    if which == "chosen":
        yield small("standardized", 0)
        yield small("0..1", 0)
        yield Subject("ResNet-20, Fashion-MNIST", demo.teacher(), demo.test_set(), 28)
        return
    if which == "others":
        yield small("0..1", 3)
        yield small("BGR minus mean", 3)
        yield small("standardized inside", 3)
        return
    yield small("0..255", 1)
    yield small("BGR minus mean", 1)
    if folder is not None:
        yield cifar(folder)


# --- what is done to them ----------------------------------------------------------------------------------------


def permuted(network: nn.Module) -> nn.Module:
    """With the statistics of each BN layer in another order."""
    network = copy.deepcopy(network)
    random = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            order = torch.randperm(module.num_features, generator=random)
            module.running_mean = module.running_mean[order].clone()
            module.running_var = module.running_var[order].clone()
    return network


def of_noise(network: nn.Module, size: int) -> nn.Module:
    """With the statistics of Gaussian noise, as after a calibration gone wrong."""
    network = copy.deepcopy(network)
    captured = capture(network, size)
    pixels = infer(build_teacher(captured), captured.image_shape)
    random = torch.Generator().manual_seed(0)
    network.train()
    with torch.no_grad():
        for _ in range(50):
            network(pixels.scaled(torch.randn(64, *captured.image_shape, generator=random)))
    return network.eval()


def runs(
    subject: Subject, factors: tuple[float, ...], method: str
) -> Iterator[tuple[str, bool, nn.Module, dict[str, Any], dict[str, Any]]]:
    """What is done, whether that is good, the network, settings, and what else `quantize` is given."""
    network = subject.network
    captured = capture(network, subject.size)
    pixels = infer(build_teacher(captured), captured.image_shape)
    yield "as it is", True, network, {}, {}
    for factor in factors:
        wrong = {"mean": [factor * mean for mean in pixels.mean], "std": [factor * std for std in pixels.std]}
        settings = {f"model.input_{key}": values for key, values in wrong.items()}
        yield f"pixels x {factor:.3g}", False, network, settings, {}
    yield "images not learned", False, network, METHODS[method][1], {}
    yield "permuted BN statistics", False, permuted(network), {}, {}
    yield "BN statistics of noise", False, of_noise(network, subject.size), {}, {}
    if method == "gdfq":  # of others these would be the same runs
        yield "zeroq", True, network, {"method": "zeroq"}, {}
        yield "judged on noise", False, network, {"method": "calibrated"}, {"calibrate_on": subject.images}


def measured(
    subject: Subject, method: dict[str, Any], done: str, good: bool, network: nn.Module, settings: dict, given: dict
) -> dict:
    config = gdfq.Config.load("demo", method | {"model.image_size": subject.size} | settings)
    row = {"network": subject.name, "run": done, "good": good, "method": config.method}
    try:
        result = gdfq.quantize(network, config, progress=False, **given)
    except gdfq.GdfqError as error:
        return row | {"refused": str(error)}
    return row | {
        "float": gdfq.evaluate(network, subject.images).top1,
        "quantized": gdfq.evaluate(result.model, subject.images).top1,
        "agreement": result.report.data_free.top1,
        "kl": result.report.data_free.kl,
        "fit": asdict(result.report.fit),
    }


def verdict(row: dict) -> list[str]:
    """By today's bounds, which may be others than those of the run."""
    if "refused" in row:
        return [row["refused"]]
    return problems([LayerFit(**layer) for layer in row["fit"]["layers"]])


def table(rows: list[dict]) -> str:
    """How many runs the report trusts and distrusts."""
    count = {
        (good, trusted): sum(row["good"] is good and (not verdict(row)) is trusted for row in rows)
        for good in (True, False)
        for trusted in (True, False)
    }
    return "\n".join(
        ["| | trusted | distrusted |", "| --- | --- | --- |"]
        + [
            f"| {name} | {count[good, True]} | {count[good, False]} |"
            for name, good in (("good", True), ("bad", False))
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", choices=["chosen", "counted", "others"])
    parser.add_argument("--method", choices=list(METHODS), default="gdfq", help="default: %(default)s")
    parser.add_argument(
        "--judge", type=Path, nargs="+", help="judge what these results hold by today's bounds, and count"
    )
    parser.add_argument("--cifar", type=Path, help="folder with test.npz and resnet20.safetensors")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.judge:
        results = [json.loads(file.read_text()) for file in args.judge]
        judged = [row for result in results for row in result["rows"]]
        for row in judged:
            row.get("fit", {})["problems"] = verdict(row)
        for file, result in zip(args.judge, results, strict=True):
            write_text(file, json.dumps(result, indent=1) + "\n")
        wrong = [row for row in judged if row["good"] is bool(verdict(row))]
        print(
            table(judged), *(f"{row['network']}, {row['run']}: {verdict(row) or 'trusted'}" for row in wrong), sep="\n"
        )
        return
    if args.networks is None or args.out is None:
        parser.error("give --networks and --out, or --judge")
    result = provenance(torch.get_num_threads())
    settings = {"method": args.method} | METHODS[args.method][0]
    rows: list[dict] = []
    for number, subject in enumerate(subjects(args.networks, args.cifar)):
        for run in runs(subject, FACTORS[number::4], args.method):
            rows.append(row := measured(subject, settings, *run))
            print(f"{row['network']}, {row['run']}: {'; '.join(verdict(row)) or 'trusted'}", flush=True)
            write_text(args.out, json.dumps(result | {"rows": rows}, indent=1) + "\n")
    print(f"{table(rows)}\n{describe(result)}")


if __name__ == "__main__":
    main()
