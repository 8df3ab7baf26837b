"""Files decoded by worker processes: the same images, in the same order, and a clean end whatever happens."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import Plain, capture_once

from gdfq.config import Config
from gdfq.data import ImageFolder, load_dataset
from gdfq.data.reading import PART, read, reading_workers
from gdfq.evaluate import evaluate
from gdfq.graph import build_teacher
from gdfq.images.real import RealImages, calibration_batches

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "small_models.py"
COUNT = 2 * PART + 11
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of different sizes, gray and in color, in five classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        shape = (8 + number % 5, 9 + number % 3, 3)[: 2 + (number % 7 > 0)]
        path = folder / str(number % 5) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def images(folder) -> ImageFolder:
    return load_dataset(folder, image_size=8)


def test_workers_are_for_files(images):
    assert reading_workers(images) == min(8, len(os.sched_getaffinity(0)))
    assert reading_workers(load_dataset("fashion-mnist")) == reading_workers([]) == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_what_items_are(folder, workers, channels):
    images = load_dataset(folder, image_size=8, channels=channels)
    order = torch.randperm(COUNT).tolist()
    batches = [order[:70], order[70:71], order[71:]]
    before = torch.random.get_rng_state()
    for numbers, batch in zip(batches, read(images, iter(batches), workers), strict=True):
        assert torch.equal(batch, torch.stack([images[number][0] for number in numbers]))
    assert torch.equal(torch.random.get_rng_state(), before)


class NamesByColor(torch.nn.Module):
    """The logits of an image are its first pixels: whatever the order, every image has its own answer."""

    def forward(self, x):
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize("batch_size", [7, 40, 500])
def test_counts_are_exact(images, batch_size):
    hits = [int(image.flatten()[:5].argmax()) == label for image, label in images]
    found = [evaluate(NamesByColor(), images, batch_size=batch_size, workers=workers) for workers in (0, 2)]
    assert [(each.images, each.top1, each.top5) for each in found] == [(COUNT, 100 * sum(hits) / COUNT, 100.0)] * 2


def test_real_images_are_drawn_alike(images):
    teacher = build_teacher(capture_once(Plain))
    settings = {"schedule.batch_size": 10, "schedule.range_batches": 3}
    first, second = (Config.load("cifar", settings | {"run.workers": workers}) for workers in (0, 2))
    pairs = [images[number] for number in range(COUNT)]
    plain, ahead = (
        RealImages(pairs, teacher, (3, 8, 8), 5, first, CPU),
        RealImages(images, teacher, (3, 8, 8), 5, second, CPU),
    )
    for count in (10, 10, 40, 10):
        for expected, found in zip(plain.images(count), ahead.images(count), strict=True):
            assert torch.equal(found, expected)
            assert found.stride() == expected.stride()
    again = RealImages(images, teacher, (3, 8, 8), 5, first, CPU)
    again.load_state_dict(ahead.state_dict())
    assert torch.equal(again.images(10)[0], ahead.images(10)[0])
    both = (calibration_batches(data, (3, 8, 8), config, CPU) for data, config in ((pairs, first), (images, second)))
    assert all(map(torch.equal, *map(list, both)))


def test_a_file_that_cannot_be_decoded_is_named_and_no_worker_stays(tmp_path, folder):
    broken = tmp_path / "0" / "broken.png"
    broken.parent.mkdir()
    for number, file in enumerate(sorted(folder.rglob("*.png"))[:40]):
        (broken.parent / f"{number}.png").symlink_to(file)
    broken.write_bytes(b"no image")
    code, out, err = evaluated(f"{MODELS}:Plain", tmp_path)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"gdfq: cannot decode the image {broken}: ")


INTERRUPTED = """
import multiprocessing, os, signal, time
from small_models import Plain

class Interrupted(Plain):
    def forward(self, x):
        os.killpg(0, signal.SIGINT)
        while True:  # another thread may have taken the signal: it is seen when a sleep is over
            time.sleep(0.1)

class WithoutWorkers(Plain):
    def forward(self, x):
        for worker in multiprocessing.active_children():
            worker.kill()
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("Interrupted", 130, "gdfq: interrupted"), ("WithoutWorkers", 2, "gdfq: a process that reads images was ended")],
)
def test_ctrl_c_and_killed_workers_end_in_one_line(tmp_path, folder, model, code, words):
    (tmp_path / "models.py").write_text(INTERRUPTED)
    found, out, err = evaluated(f"{tmp_path / 'models.py'}:{model}", folder, "--batch-size=1")
    assert (found, out) == (code, "")
    (line,) = err.splitlines()
    assert line.startswith(words)


def evaluated(model: str, data: Path, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of `gdfq evaluate` with two workers, soon: no worker is waited for."""
    code = (  # what runs in the background of a shell ignores Ctrl-C, and so would what it starts
        "import signal, sys; from gdfq.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "evaluate", f"--model={model}", f"--data={data}", "--workers=2", *options]
    paths = os.pathsep.join(map(str, (ROOT / "python", ROOT, MODELS.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, start_new_session=True)
    return done.returncode, done.stdout, done.stderr
