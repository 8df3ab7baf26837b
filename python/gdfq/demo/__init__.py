"""The built-in demonstration: a ResNet-20 for Fashion-MNIST and the 10,000 test images.

`examples/train_teacher.py` made the weights. The images are Fashion-MNIST's test set (MIT license, beside them).
"""

from pathlib import Path

from torch import nn

from gdfq.data import (
    FASHION_MNIST_CLASSES as CLASSES,
)
from gdfq.data import (
    FASHION_MNIST_MEAN,
    FASHION_MNIST_STD,
    LabeledImages,
    load_dataset,
)
from gdfq.models import load_model

__all__ = ["CLASSES", "FASHION_MNIST_MEAN", "FASHION_MNIST_STD", "resnet20", "teacher", "test_set"]

FOLDER = Path(__file__).parent


def resnet20() -> nn.Module:
    """An untrained ResNet-20 for images `(N, 1, 28, 28)` and 10 classes, in eval mode."""
    model = load_model("pytorchcv:resnet20_cifar10", in_channels=1, in_size=(28, 28))
    # pytorchcv pools 8x8 maps; 28x28 images leave 7x7.
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def teacher() -> nn.Module:
    """The trained ResNet-20, in eval mode. Input: images `(N, 1, 28, 28)` in 0..1, less `FASHION_MNIST_MEAN`, divided
    by `FASHION_MNIST_STD`."""
    return load_model("gdfq.demo:resnet20", FOLDER / "fashion_mnist_resnet20.safetensors")


def test_set() -> LabeledImages:
    """The 10,000 test images of Fashion-MNIST, normalized, with their labels."""
    return load_dataset("fashion-mnist")
