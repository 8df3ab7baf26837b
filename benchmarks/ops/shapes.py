"""The layers that are measured: activations of real networks, in batches that fill a given size."""

from dataclasses import dataclass

LAYERS = {
    "resnet20-16x32": (16, 32, 32),
    "resnet20-64x8": (64, 8, 8),
    "resnet18-64x56": (64, 56, 56),
    "resnet18-512x7": (512, 7, 7),
    "resnet50-256x56": (256, 56, 56),
    "resnet50-2048x7": (2048, 7, 7),
    "mobilenetv2-96x112": (96, 112, 112),
    "mobilenetv2-960x7": (960, 7, 7),
    "vgg16-64x224": (64, 224, 224),
    "inceptionv3-64x147": (64, 147, 147),
    "inceptionv3-192x71": (192, 71, 71),
}

# The convolutions of ResNet-18 (out, in, kernel) and the channels of its 20 batch normalizations.
RESNET18_WEIGHTS = [(64, 3, 7)] + [
    shape
    for width, previous in ((64, 64), (128, 64), (256, 128), (512, 256))
    for shape in (
        [(width, previous, 3)] + 3 * [(width, width, 3)] + ([] if width == previous else [(width, previous, 1)])
    )
]
RESNET18_BATCH_NORMS = [shape[0] for shape in RESNET18_WEIGHTS]


@dataclass(frozen=True)
class Shape:
    """An activation `(N, C, H, W)` of a named layer, about `megabytes` large."""

    layer: str
    megabytes: float

    def of(self, item_bytes: int) -> tuple[int, int, int, int]:
        """The shape for elements of that many bytes; at least one image."""
        channels, height, width = LAYERS[self.layer]
        return max(1, round(self.megabytes * 1e6 / (channels * height * width * item_bytes))), channels, height, width


def default_shapes(on_gpu: bool, full: bool) -> list[Shape]:
    """The most telling first: a run may be cut off."""
    if full:
        sizes = (64, 256, 1, 4, 16, 512) if on_gpu else (4, 1, 16)
        return [Shape(layer, size) for size in sizes for layer in LAYERS]
    if on_gpu:
        return [
            Shape("resnet18-64x56", 64),
            Shape("resnet50-256x56", 256),
            Shape("resnet20-16x32", 1),
            Shape("mobilenetv2-96x112", 16),
            Shape("inceptionv3-192x71", 64),
            Shape("resnet50-2048x7", 64),
            Shape("vgg16-64x224", 512),
        ]
    return [Shape("resnet20-16x32", 4)]
