"""How accurate are quantized networks, by method, bits and seed? And what does each setting do for it?

    python -m benchmarks.accuracy --seeds 0 1 2 --banks BANKS --out FILE                      # the demonstration's
    python -m benchmarks.accuracy --cifar FOLDER --target paper --bits 4:4 3:3 --seeds 0 1 2 --banks BANKS --out FILE
    python -m benchmarks.accuracy --cifar FOLDER --training-images 5000 --set reconstruction.keep=0.0 --out FILE

FOLDER holds CIFAR-10's images, test.npz and train.npz, and a network for them, as `benchmarks/gpu_prepare.sh` lays it
out. Test images choose nothing: settings are compared by `--training-images`. A bank of images is made once for each
seed and kept in BANKS, where all methods and bits find it. What FILE holds already is kept, or measured again.
"""

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

import gdfq
from benchmarks.accuracy_in_time import MEAN, STD, Subject, subject
from gdfq.api import default_preset
from gdfq.config import parse_override
from gdfq.data import load_dataset
from gdfq.provenance import describe, provenance
from gdfq.registry import METHODS
from gdfq.run import folder as run_folder
from gdfq.run.files import write_text

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # its training images, as Debian's dataset-fashion-mnist has them
# In two rows: the same measured.
SAME = ("network", "images", "preset", "effort", "method", "bits", "target", "seed", "settings")


def images_of(what: Subject, cifar: Path | None, training: int | None) -> tuple[str, Dataset]:
    """Test images, or the first training images, and what they are."""
    if training is None:
        return "test", what.images
    if cifar is None:
        images = load_dataset(FASHION_MNIST, split="train")
    else:
        images = load_dataset(cifar / "train.npz", mean=MEAN, std=STD)
    return f"{training} of training", Subset(images, range(training))


def quantized(what: Subject, config: gdfq.Config, bank: Path | None, images: Dataset) -> dict[str, Any]:
    """What is found of one run; the images that it makes are left as `bank`."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        result = gdfq.quantize(what.network, config, run_dir=run, progress=False)
        made = run / run_folder.IMAGES
        if bank is not None and made.exists():
            bank.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, bank)
    return {
        "seconds": time.monotonic() - start,
        "top1": gdfq.evaluate(result.model, images).top1,
        "bank": "read" if config.images.file else "made",
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "agreement": asdict(result.report.data_free),
    }


def measured(what: Subject, args: argparse.Namespace, images: Dataset, method: str, bits: str, seed: int) -> dict:
    weight_bits, activation_bits = map(int, bits.split(":"))
    settings = dict(map(parse_override, args.set))
    overrides = settings | {
        "method": method, "quantizer.weight_bits": weight_bits, "quantizer.activation_bits": activation_bits,
        "quantizer.target": args.target, "run.seed": seed, "model.image_size": what.image_size,
    }  # fmt: skip
    bank = None
    if args.banks is not None and METHODS[method].takes_bank:
        bank = args.banks / f"{'demonstration' if args.cifar is None else 'cifar'}-{seed}.safetensors"
        if bank.exists():
            overrides["images.file"] = str(bank.absolute())
    config = gdfq.Config.load(args.preset, overrides, effort=args.effort)
    return quantized(what, config, bank, images)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, in Markdown."""
    lines = ["| | float | top-1 | seeds | seconds |", "| --- | --- | --- | --- | --- |"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        changed = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        name = f"{row['network']}, {row['images']}, {row['method']}, {row['bits']}, {row['target']}, {row['preset']}"
        name += "" if row["effort"] == "default" else f", {row['effort']}"
        groups.setdefault(", ".join(filter(None, (name, changed))), []).append(row)
    for name, own in groups.items():
        top1 = [row["top1"] for row in own]
        each = ", ".join(f"{value:.2f}" for value in top1)
        seconds = statistics.mean(row["seconds"] for row in own)
        lines.append(f"| {name} | {own[0]['float']:.2f} | {statistics.mean(top1):.2f} | {each} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
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
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--training-images", type=int, help="so many of them, instead of the test images")
    parser.add_argument("--banks", type=Path, help="folder for banks of images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; what it holds already is kept")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = provenance(args.threads)
    what = subject(args.cifar)
    kind, images = images_of(what, args.cifar, args.training_images)
    args.preset = args.preset or default_preset(what.network, what.image_size)
    float_top1 = gdfq.evaluate(what.network, images).top1
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for method, bits, seed in ((m, b, s) for m in args.methods for b in args.bits for s in args.seeds):
        row = {
            "network": what.name, "images": kind, "method": method, "bits": "W{}A{}".format(*bits.split(":")),
            "preset": args.preset, "effort": args.effort, "target": args.target, "seed": seed,
            "settings": dict(map(parse_override, args.set)), "float": float_top1, "gdfq_commit": facts["gdfq_commit"],
        }  # fmt: skip
        row |= measured(what, args, images, method, bits, seed)
        rows = [other for other in rows if any(other[key] != row[key] for key in SAME)] + [row]
        write_text(args.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        print(table([row]).splitlines()[-1], flush=True)
    print(f"{table(rows)}\n{describe(facts)}")


if __name__ == "__main__":
    main()
