"""How fast is a folder of JPEG files evaluated on, against decoding it alone?

    python -m benchmarks.reading --images 2000

Photographs' stand-ins of 500 x 375 pixels are written to a temporary folder. In turns, a round each, all of them are
decoded, resized and cut by Pillow alone in one process for each worker; and evaluated on, by as many workers and a
model that costs nothing. Ratios are medians over the rounds of the first's seconds divided by the second's: of the
clock, and of all processes on their CPUs, which says the same where the machine has other work.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gdfq.data import ImageFolder, load_dataset
from gdfq.data.reading import reading_workers
from gdfq.evaluate import evaluate
from gdfq.provenance import describe, provenance
from gdfq.run.files import write_text

SIZE = (500, 375)
DIFFERENT = 40  # files; others are links to them
QUALITY = 92  # of JPEG: 140 KB; ImageNet's mean is about 110


class FirstPixels(nn.Module):
    """Logits of `classes` classes that cost nothing."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, : self.classes]


def make_folder(folder: Path, count: int, classes: int = 2) -> None:
    """Noise with a spectrum that falls with frequency, as photographs' does, in sub-folders of classes."""
    random = np.random.default_rng(0)
    width, height = SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    for number in range(count):
        path = folder / str(number % classes) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= DIFFERENT:
            path.hardlink_to(folder / str(number % DIFFERENT % classes) / f"{number % DIFFERENT}.jpg")
            continue
        spectrum = random.normal(size=(3, height, frequency.shape[1], 2)) @ [1, 1j] / frequency
        pixels = np.fft.irfft2(spectrum, (height, width))
        pixels = 128 + 50 * pixels / pixels.std()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=QUALITY)


def decode(files: list[Path]) -> None:
    """As ImageNet's validation images are prepared: the short side resized to 256, the middle 224 x 224 cut."""
    for file in files:
        with Image.open(file) as image:
            image = image.convert("RGB")
        width, height = image.size
        width, height = (256, 256 * height // width) if width <= height else (256 * width // height, 256)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        np.asarray(image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224)))


def decode_in_processes(files: list[Path], count: int) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=decode, args=(files[number::count],)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of all processes on their CPUs."""

    def now() -> tuple[float, float]:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = now()
    work()
    gc.collect()  # workers are waited for where their loader is forgotten
    clock, cpu = (after - start for start, after in zip(before, now(), strict=True))
    return clock, cpu


def measure(dataset: ImageFolder, workers: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round, images per second, and the ratios."""
    model = FirstPixels(len(dataset.classes))
    works: dict[str, Callable[[], object]] = {
        "decoder": lambda: decode_in_processes(dataset.files, workers),
        "evaluate": lambda: evaluate(model, dataset, batch_size=batch_size, workers=workers),
    }
    rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    ratios = {
        kind: statistics.median(found["decoder"][place] / found["evaluate"][place] for found in rounds)
        for place, kind in enumerate(("clock", "cpu"))
    }
    rates = {name: len(dataset) / statistics.median(found[name][0] for found in rounds) for name in works}
    return {"seconds": rounds, "images_per_second": rates, "ratio": ratios}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, help="default: as `gdfq evaluate`")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        make_folder(Path(folder), args.images)
        dataset = load_dataset(folder, image_size=224)
        workers = args.workers or reading_workers(dataset)
        found = measure(dataset, workers, args.batch_size, args.rounds)
    values = {"images": args.images, "workers": workers, "batch_size": args.batch_size, "rounds": args.rounds}
    result = {**provenance(1), "arguments": values, **found}
    print(describe(result))
    for name, rate in found["images_per_second"].items():
        print(f"{name:10} {rate:7.1f} images/s, {workers} workers")
    print(
        "evaluate has {clock:.0%} of the decoder's speed by the clock, {cpu:.0%} by CPU time".format(**found["ratio"])
    )
    if args.out is not None:
        write_text(args.out, json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
