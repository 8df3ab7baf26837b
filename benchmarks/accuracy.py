"""How accurate are quantized networks, by method, bits and seed? And what does each setting do for it?

    python -m benchmarks.accuracy --seeds 0 1 2 --banks BANKS --out FILE                      # the demonstration's
    python -m benchmarks.accuracy --cifar FOLDER --target paper --bits 4:4 3:3 --seeds 0 1 2 --banks BANKS --out FILE
    python -m benchmarks.accuracy --cifar FOLDER --target paper --training-images 5000 --ablation --out FILE

FOLDER holds CIFAR-10's images, test.npz and train.npz, and a network for them, as `benchmarks/gpu_prepare.sh` lays it
out. Test images choose nothing: settings are compared by `--training-images`. A bank of images is made once for each
seed and kept in BANKS, where all methods, bits and settings of reconstruction find it. Methods that are
calibrated are given training images. What FILE holds already is kept, or measured again. Each row is measured in a
process of its own, `--jobs` at a time, on the device that `run.device` says. Seconds are the processor's, since others
may share the machine; on a GPU they are the clock's.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

import gdfq
from benchmarks.accuracy_in_time import MEAN, STD, Subject, subject
from gdfq.api import default_preset, device_named
from gdfq.config import parse_override
from gdfq.data import load_dataset
from gdfq.evaluate import agreement
from gdfq.methods.method import Data
from gdfq.provenance import describe, provenance
from gdfq.registry import METHODS
from gdfq.run import folder as run_folder
from gdfq.run.files import write_text

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # its training images, as Debian's dataset-fashion-mnist has them
# What the ablation changes, one thing at a time.
ABLATION: list[dict[str, Any]] = [
    {},
    {"inversion.swing": False},
    {"images.transforms.low_pass.cutoff": 12.0},
    {"inversion.cross_entropy_weight": 1.0},
    {"inversion.crop": 0.4, "inversion.flip": True},
    {"inversion.iterations": 50},
    {"inversion.iterations": 300},
    {"inversion.images": 64},
    {"inversion.images": 128},
    {"inversion.images": 512},
    {"inversion.images": 1024},
    {"images.source": "generator", "images.bank": 256, "schedule.iterations": 100, "schedule.batch_size": 64},
    {"reconstruction.ranges": "minmax"},
    {"reconstruction.begin": "nearest"},
    {"reconstruction.keep": 0.0},
    {"reconstruction.step_learning_rate": 0.0},
    {"reconstruction.iterations": 100},
    {"reconstruction.iterations": 1000},
    {"reconstruction.finetune_iterations": 0},
    {"reconstruction.finetune_iterations": 1000},
    {"reconstruction.finetune_step_learning_rate": 0.0},
]
# In two rows: the same measured.
SAME = ("network", "images", "preset", "effort", "method", "bits", "target", "seed", "settings")


def training_images(args: argparse.Namespace) -> Dataset:
    if args.cifar is None:
        return load_dataset(FASHION_MNIST, split="train")
    return load_dataset(args.cifar / "train.npz", mean=MEAN, std=STD)


def images_of(what: Subject, args: argparse.Namespace) -> tuple[str, Dataset]:
    """Test images, or the first training images, and what they are."""
    if args.training_images is not None:
        return f"{args.training_images} of training", Subset(training_images(args), range(args.training_images))
    first = args.test_images
    return ("test", what.images) if first is None else (f"{first} of test", Subset(what.images, range(first)))


def bank_of(args: argparse.Namespace, preset: str, settings: dict[str, Any], seed: int) -> Path:
    """Where a bank of these settings is kept; those of reconstruction do not change it."""
    changes = [f"{name}={value}" for name, value in settings.items() if not name.startswith("reconstruction.")]
    subject = "demonstration" if args.cifar is None else "cifar"
    return args.banks / ("-".join([subject, preset, args.effort, str(seed), *changes]) + ".safetensors")


def compared(p: torch.nn.Module, q: torch.nn.Module, images: Dataset) -> dict[str, Any]:
    """Top-1 of both on labeled images, the standard error of their difference, and how far Q's answers are from P's.

    Q's device computes; P is moved there.
    """
    device = next(q.buffers()).device
    p.to(device)
    with torch.inference_mode():
        moved = ((x.to(device), labels) for x, labels in DataLoader(images, 256))
        batches = [(labels, p(x).double().cpu(), q(x).double().cpu()) for x, labels in moved]
    labels, wanted, given = map(torch.cat, zip(*batches, strict=True))
    right_p, right_q = ((logits.argmax(1) == labels).double() for logits in (wanted, given))
    both = torch.stack([wanted, given], 1)
    return {
        "float": 100 * right_p.mean().item(),
        "top1": 100 * right_q.mean().item(),
        "paired_error": 100 * (right_q - right_p).std(correction=0).item() / len(labels) ** 0.5,
        "as_float": asdict(agreement(lambda logits: logits[:, 0], lambda logits: logits[:, 1], [both])),
    }


def quantized(
    what: Subject, config: gdfq.Config, bank: Path | None, real: Dataset | None, images: Dataset
) -> dict[str, Any]:
    """What is found on `images` of one run, calibrated on `real` ones; those that it makes are left as `bank`."""
    now = time.process_time if device_named(config.run.device).type == "cpu" else time.perf_counter
    start = now()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = gdfq.quantize(what.network, config, run_dir=run, calibrate_on=real, progress=False)
        made = run / run_folder.IMAGES
        if bank is not None and made.exists():
            bank.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, bank)
    seconds, peak = now() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return compared(what.network.eval(), result.model.eval(), images) | {
        "seconds": seconds,
        "bank": "read" if config.images.file else "made",
        "peak_gib": peak,
        "agreement": asdict(result.report.data_free),
    }


def measured(args: argparse.Namespace, method: str, bits: str, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """A row, by a process of its own."""
    torch.set_num_threads(args.threads)
    what = subject(args.cifar)
    kind, images = images_of(what, args)
    preset = args.preset or default_preset(what.network, what.image_size)
    weight_bits, activation_bits = map(int, bits.split(":"))
    overrides = settings | {
        "method": method, "quantizer.weight_bits": weight_bits, "quantizer.activation_bits": activation_bits,
        "quantizer.target": args.target, "run.seed": seed, "model.image_size": what.image_size,
    }  # fmt: skip
    bank, takes_real = None, METHODS[method].data is Data.IMAGES
    if args.banks is not None and METHODS[method].takes_bank and not takes_real:
        bank = bank_of(args, preset, settings, seed)
        if bank.exists():
            overrides["images.file"] = str(bank.absolute())
    config = gdfq.Config.load(preset, overrides, effort=args.effort)
    real = training_images(args) if takes_real else None
    return {
        "network": what.name, "images": kind, "method": method, "bits": f"W{weight_bits}A{activation_bits}",
        "preset": preset, "effort": args.effort, "target": args.target, "seed": seed, "settings": settings,
    } | quantized(what, config, bank, real, images)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, in Markdown, of what all rows have; see `compared`."""
    lines = [
        "| | float | top-1 | each | paired error | KL | seconds | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        changed = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        name = f"{row['network']}, {row['images']}, {row['method']}, {row['bits']}, {row['target']}, {row['preset']}"
        name += "" if row["effort"] == "default" else f", {row['effort']}"
        groups.setdefault(", ".join(filter(None, (name, changed))), []).append(row)
    for name, own in groups.items():
        top1 = [row["top1"] for row in own]
        each = ", ".join(f"{value:.2f}" for value in top1)
        seconds, peak = (statistics.mean(row[key] for row in own) for key in ("seconds", "peak_gib"))
        error = _mean([row.get("paired_error") for row in own], 2)
        kl = _mean([row.get("as_float", {}).get("kl") for row in own], 4)
        made = sum(row["bank"] == "made" for row in own)
        took = f"{seconds:.0f}{f' ({made} with the bank)' if made else ''}"
        figures = f"{own[0]['float']:.2f} | {statistics.mean(top1):.2f} | {each} | {error} | {kl}"
        lines.append(f"| {name} | {figures} | {took} | {peak:.2f} |")
    return "\n".join(lines)


def _mean(values: list[float | None], digits: int) -> str:
    """Empty where one of them is not known."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if len(known) == len(values) else ""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar", type=Path, help="folder with test.npz, train.npz and resnet20.safetensors")
    parser.add_argument("--methods", nargs="+", default=["reconstruction"], choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--bits", nargs="+", default=["4:4"], help="weights:activations; default 4:4")
    parser.add_argument("--target", default="onnx", help="default: onnx; paper quantizes behind ReLU alone")
    parser.add_argument("--preset", help="default: by image size")
    parser.add_argument("--effort", default="default", help="fast, default or best")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    changes = parser.add_mutually_exclusive_group()
    changes.add_argument("--set", action="append", default=[], metavar="section.key=value")
    changes.add_argument("--ablation", action="store_true", help="nothing, and each thing that is listed here, in turn")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--training-images", type=int, help="so many of them, instead of the test images")
    only.add_argument("--test-images", type=int, help="so many of them; default: all")
    parser.add_argument("--banks", type=Path, help="folder for banks of images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="rows that are measured at the same time")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; what it holds already is kept")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    facts = provenance(args.threads)
    del facts["command"]  # one of several that a file is of; each row says what it is of
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    variants = ABLATION if args.ablation else [dict(map(parse_override, args.set))]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = [
            pool.submit(measured, args, method, bits, settings, seed)
            for seed, method, bits, settings in product(args.seeds, args.methods, args.bits, variants)
        ]
        for future in as_completed(futures):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            row = future.result() | {"gdfq_commit": facts["gdfq_commit"]}
            rows = [other for other in rows if any(other[key] != row[key] for key in SAME)] + [row]
            write_text(args.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    print(f"{table(rows)}\n{describe(facts)}")


if __name__ == "__main__":
    main()
