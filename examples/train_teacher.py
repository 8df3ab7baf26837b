"""Train a ResNet-20 on real data, the ordinary way: a teacher to quantize.

    python examples/train_teacher.py fashion-mnist --data /usr/share/datasets/fashion-mnist --out teacher.safetensors
    python examples/train_teacher.py cifar10 --data path/to/cifar10 --out resnet20_cifar10.safetensors

The first is how the network of the demonstration was made (the data are Debian's package `dataset-fashion-mnist`);
the others have the architecture of pytorchcv's `resnet20_cifar10` and `resnet20_cifar100`, for `gdfq reproduce
--weights`. The last epoch is what is saved: the test images choose nothing.
"""

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from gdfq.data import StoredImages, load_dataset
from gdfq.demo import resnet20
from gdfq.models import load_model

NETWORKS = {
    "fashion-mnist": resnet20,
    "cifar10": lambda: load_model("pytorchcv:resnet20_cifar10"),
    "cifar100": lambda: load_model("pytorchcv:resnet20_cifar100"),
}
PADDING = {"fashion-mnist": 2, "cifar10": 4, "cifar100": 4}  # pixels that a crop may be moved by


def augment(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Random horizontal flip, and a random crop after padding by black pixels, image by image: uint8 `(N, C, H, W)`,
    channels last in memory."""
    n, _, height, width = images.shape
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = torch.arange(height) + torch.randint(2 * padding + 1, (n, 1))
    columns = torch.arange(width) + torch.randint(2 * padding + 1, (n, 1))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalized(images: torch.Tensor, of: StoredImages) -> torch.Tensor:
    """Float32, as the network wants uint8 `images`."""
    return (images.float().div(255) - of.mean) / of.std


@torch.no_grad()
def accuracy(model: nn.Module, data: StoredImages) -> float:
    model.eval()
    batches = zip(data.images.split(500), data.labels.split(500), strict=True)
    hits = sum((model(normalized(x, data)).argmax(1) == y).sum().item() for x, y in batches)
    return 100 * hits / len(data.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(NETWORKS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the data set, in a layout gdfq reads")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go (safetensors)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    training, test = (load_dataset(args.data, args.dataset, split=split) for split in ("train", "test"))
    model = NETWORKS[args.dataset]().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = len(training) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.15, args.epochs * batches, pct_start=0.2)
    for epoch in range(args.epochs):
        start = time.monotonic()
        model.train()
        for index in torch.randperm(len(training))[: batches * args.batch_size].split(args.batch_size):
            inputs = normalized(augment(training.images[index], PADDING[args.dataset]), training)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(inputs).float(), training.labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        top1 = accuracy(model, test)
        seconds = time.monotonic() - start
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}  test top-1 {top1:.2f}%  {seconds:.0f} s", flush=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, args.out, metadata={"data": args.dataset, "top1": f"{top1:.2f}"})


if __name__ == "__main__":
    main()
