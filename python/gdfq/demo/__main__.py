"""`python -m gdfq.demo`: the shipped ResNet-20 to W4A4 by three data-free methods, compared on real test images; the
best of them as an ONNX file in integers."""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

import gdfq
import gdfq_ext
from gdfq.data import LabeledImages
from gdfq.demo import teacher, test_set
from gdfq.deploy import Normalization
from gdfq.deploy.export import Quantized, images_of
from gdfq.deploy.runtime import Missing
from gdfq.run import folder as run_folder
from gdfq.run.files import write_text

METHODS = {
    "reconstruction": "block reconstruction",
    "squant": "SQuant, the same images",
    "minmax": "min-max on Gaussian noise",
}
BEST = "reconstruction"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gdfq.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="a setting; may be repeated"
    )
    args = parser.parse_args()
    try:
        run(args.out, args.seeds, dict(gdfq.parse_override(text) for text in args.set))
    except gdfq.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except gdfq.GdfqError as error:
        print(f"gdfq: {error}", file=sys.stderr)
        sys.exit(2)


def run(out: Path, seeds: list[int], overrides: dict) -> list[dict]:
    """Quantize with every method and seed, print the table, write it and the picture to `out`; returns the rows."""
    print(f"{gdfq_ext.backend_report().cause}\n")
    images = test_set()
    float_top1 = gdfq.evaluate(teacher(), images).top1
    rows: list[dict] = []
    for seed in seeds:
        rows += _one_seed(out, seed, overrides, lambda model: gdfq.evaluate(model, images).top1)
    _show(float_top1, rows)
    _export(out, seeds[0], images)
    versions = json.loads((_folder(out, seeds[0]) / run_folder.VERSIONS).read_text())
    table = {"versions": versions, "float_top1": float_top1, "rows": rows}
    write_text(out / "table.json", json.dumps(table, indent=2) + "\n")
    print(
        f"\nwritten to {out}: table.json, and per seed the run of block reconstruction with its log, settings, report,"
    )
    print(
        f"images ({run_folder.PICTURE}), the quantized model ({run_folder.MODEL}) and the file in integers (model.onnx)"
    )
    return rows


def _one_seed(out: Path, seed: int, overrides: dict, top1: Callable) -> list[dict]:
    """All methods on one seed; the data-free figures of all are taken on images that none of them was given."""
    rows, held_out, folder = [], None, _folder(out, seed)
    if (folder / run_folder.REPORT).exists():
        shutil.rmtree(folder)  # a finished demonstration is repeated, an interrupted one goes on
    for method in METHODS:
        settings = {**overrides, "method": method, "run.seed": seed}
        if method == "squant":
            settings["images.file"] = str((folder / run_folder.IMAGES).absolute())
        config = gdfq.Config.load("demo", settings)
        run_dir = folder if method == BEST else None
        resume = run_dir is not None and folder.exists()
        result = gdfq.quantize(teacher(), config, run_dir=run_dir, resume=resume, held_out_images=held_out)
        held_out = held_out or result.held_out_images
        report = result.report
        row = {"method": method, "seed": seed, "top1": top1(result.model), "agreement": report.data_free.top1}
        rows.append({**row, "kl": report.data_free.kl, "seconds": report.seconds})
    return rows


def _folder(out: Path, seed: int) -> Path:
    return out / f"{BEST}-seed{seed}"


def _export(out: Path, seed: int, images: LabeledImages) -> None:
    """The first result of the best method as a file in integers, verified on images of its bank and on real ones."""
    folder = _folder(out, seed)
    try:
        quantized = Quantized.of_run(folder, teacher())
        normalization = Normalization(images.preparation.mean, images.preparation.std)
        exported = gdfq.export(
            quantized, folder / "model.onnx", input="uint8", normalization=normalization, overwrite=True,
            real_images=images_of(images), classes=images.classes,
        )  # fmt: skip
    except Missing as error:
        print(f"\nno ONNX file: {error}")
        return
    print(f"\n{exported}")


def _show(float_top1: float, rows: list[dict]) -> None:
    table = Table(title="ResNet-20 on Fashion-MNIST, W4A4, no data used", title_justify="left")
    table.add_column("method")
    for title in ("top-1", "agreement", "KL", "seconds"):
        table.add_column(title, justify="right")
    table.add_row("float", f"{float_top1:.2f}%", "", "", "")
    for method, name in reversed(METHODS.items()):
        of_method = [row for row in rows if row["method"] == method]
        formats = {"top1": "{:.2f}%", "agreement": "{:.1f}%", "kl": "{:.3f}", "seconds": "{:.0f}"}
        table.add_row(name, *(_spread([row[key] for row in of_method], form) for key, form in formats.items()))
    Console().print(table)
    print("top-1: on the 10,000 real test images, which decided nothing")
    print("agreement with float, KL to it: on synthetic images that no method was given")


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return form.format(values[0])
    mean = form.format(statistics.mean(values))
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


if __name__ == "__main__":
    main()
