"""Train the ResNet-20 that the demonstration quantizes: Fashion-MNIST, real data, the ordinary way.

    python examples/train_demo_teacher.py --data /usr/share/datasets/fashion-mnist --out teacher.safetensors

The data are the four idx files of Fashion-MNIST (Debian: `apt-get install dataset-fashion-mnist`). Nothing of it is
needed to quantize the shipped model; this file is how that model was made. The last epoch is what is saved: the test
images choose nothing.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from gdfq.data import read_idx
from gdfq.demo import FASHION_MNIST_MEAN, FASHION_MNIST_STD, resnet20


def load(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images `(N, 1, 28, 28)` float32 and labels `(N,)` int64 of `split` (`train` or `t10k`)."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz").float().div(255)[:, None]
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz").long()
    return (images - FASHION_MNIST_MEAN) / FASHION_MNIST_STD, labels


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random horizontal flip, and a random crop after padding by two black pixels, image by image."""
    n, _, height, width = images.shape
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-FASHION_MNIST_MEAN / FASHION_MNIST_STD)
    rows = torch.arange(height) + torch.randint(5, (n, 1))
    columns = torch.arange(width) + torch.randint(5, (n, 1))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
    return 100 * hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx.gz files")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (safetensors)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load(args.data, "train")
    test_images, test_labels = load(args.data, "t10k")
    model = resnet20().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = len(labels) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, args.epochs * batches, pct_start=0.2)
    for epoch in range(args.epochs):
        start = time.monotonic()
        model.train()
        for index in torch.randperm(len(labels))[: batches * args.batch_size].split(args.batch_size):
            inputs = augment(images[index]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs).float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        top1 = accuracy(model, test_images, test_labels)
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}  test top-1 {top1:.2f}%  {seconds:.0f} s", flush=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, args.out, metadata={"data": "Fashion-MNIST", "top1": f"{top1:.2f}"})


if __name__ == "__main__":
    main()
