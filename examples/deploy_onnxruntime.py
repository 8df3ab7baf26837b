"""Classify images with a file that `gdfq export --input uint8` has written: onnxruntime, numpy and Pillow alone.

python examples/deploy_onnxruntime.py runs/resnet20/model.onnx cat.png dog.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def pixels(path: str, channels: int, height: int, width: int) -> np.ndarray:
    """An image file as the network takes it: uint8 `(channels, height, width)`, the middle of it, resized."""
    image = Image.open(path).convert("L" if channels == 1 else "RGB")
    scale = max(height / image.height, width / image.width)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    array = np.asarray(image.crop((left, top, left + width, top + height)))
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def main(model: str, files: list[str]) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # W8A8 saturates on x64 without VNNI otherwise
    session = onnxruntime.InferenceSession(model, options)
    given = session.get_inputs()[0]
    metadata = session.get_modelmeta().custom_metadata_map
    images = np.stack([pixels(file, *given.shape[1:]) for file in files])
    if given.type == "tensor(float)":  # written without --input uint8: normalized here
        if "mean" not in metadata:
            sys.exit(f"{model} does not say how its images are normalized: write it with --input uint8")
        mean, std = (np.float32(json.loads(metadata[name])).reshape(-1, 1, 1) for name in ("mean", "std"))
        images = (images.astype(np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {given.name: images})
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    names = json.loads(metadata.get("classes", "null")) or [str(number) for number in range(logits.shape[1])]
    for file, row in zip(files, probabilities, strict=True):
        print(f"{file}: " + ", ".join(f"{names[k]} {row[k]:.1%}" for k in row.argsort()[::-1][:3]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
