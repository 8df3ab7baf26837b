"""What gdfq makes of every family of classification networks in pytorchcv: one small member each, random weights.

    python -m benchmarks.zoo --out docs/models.md

writes the table of that page, between its two marks. `tests/gdfq/test_zoo.py` asserts what the table says.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from pytorchcv import model_provider
from torch import nn

from benchmarks.step_providers import SEED, fit_batch_norm, fit_classifier, trainer_of
from gdfq.errors import GdfqError
from gdfq.graph import CapturedModel, Summary, Teacher, build_teacher, capture
from gdfq.models import load_model

CHANNELS = 3
# The smallest member of every family and, in pixels, the smallest of 32, 64, 96, 128 and its own image size that it
# takes; of the paper's families, the paper's networks.
MEMBERS = {
    "resnet20_cifar10": 32, "resnet20_cifar100": 32, "resnet18": 32, "bn_vgg16": 32, "inceptionv3": 96,
    "resnet50": 32, "mobilenetv2_w1": 32, "shufflenet_g1_w1": 32,
    "airnet50_1x64d_r16": 32, "airnext50_32x4d_r2": 32, "alexnetb": 224, "bagnet9": 32, "bam_resnet18": 32,
    "bninception": 32, "cbam_resnet18": 32, "channelnet": 32, "condensenet74_c8_g8": 32, "darknet53": 32,
    "darknet_ref": 224, "darts": 32, "densenet121": 32, "densenet40_k12_bc_cifar10": 32, "diapreresnet10": 32,
    "diapreresnet20_cifar10": 32, "diaresnet10": 32, "diaresnet20_cifar10": 32, "dicenet_wd5": 32,
    "diracnet18v2": 224, "dla34": 32, "dpn68": 224, "drnd22": 32, "efficientnet_b0": 224,
    "efficientnet_edge_small_b": 224, "espnetv2_wd2": 32, "fastseresnet101b": 32, "fbnet_cb": 32,
    "fdmobilenet_wd4": 32, "fdmobilenet_wd4_cub": 32, "fishnet99": 32, "fractalnet_cifar10": 32, "ghostnet": 32,
    "hardnet39ds": 32, "hrnet_w18_small_v1": 32, "ibn_densenet121": 32, "ibn_resnet50": 32, "ibn_resnext50_32x4d": 32,
    "ibnb_resnet50": 32, "igcv3_wd4": 32, "inceptionresnetv1": 96, "inceptionresnetv2": 96, "inceptionv4": 96,
    "irevnet301": 32, "isqrtcovresnet18": 32, "menet108_8x1_g3": 32, "mixnet_s": 32, "mnasnet_b1": 32,
    "mobilenet_wd4": 32, "mobilenetb_wd4": 32, "mobilenetv3_small_w7d20": 32, "msdnet22": 224, "msdnet22_cifar10": 32,
    "nasnet_4a1056": 224, "nin_cifar10": 32, "ntsnet_cub": 448, "octresnet10_ad2": 32, "peleenet": 32,
    "pnasnet5large": 32, "polynet": 96, "preresnet10": 32, "preresnet20_cifar10": 32, "proxylessnas_gpu": 32,
    "proxylessnas_gpu_cub": 32, "pyramidnet101_a360": 32, "pyramidnet110_a48_cifar10": 32, "regnetx002": 32,
    "resattnet56": 32, "resdropresnet20_cifar10": 32, "resnestabc14": 32, "resnet10_cub": 32, "resneta10": 32,
    "resnetd50b": 32, "resnext14_32x2d": 32, "resnext20_32x2d_cifar10": 32, "revnet38": 32, "rir_cifar10": 32,
    "ror3_56_cifar10": 32, "scnet50": 128, "selecsls42": 32, "senet16": 32, "sepreresnet10": 32,
    "sepreresnet20_cifar10": 32, "seresnet10": 32, "seresnet10_cub": 32, "seresnet20_cifar10": 32,
    "seresnext50_32x4d": 32, "shakedropresnet20_cifar10": 32, "shakeshakeresnet20_2x16d_cifar10": 32,
    "sharesnet18": 32, "shufflenetv2_wd2": 32, "shufflenetv2b_wd2": 32, "sknet50": 32, "sparsenet121": 32,
    "spnasnet": 32, "sqnxt23_w1": 32, "squeezenet_v1_1": 224, "vovnet27s": 32, "wrn16_10_cifar10": 32,
    "wrn20_10_1bit_cifar10": 32, "wrn50_2": 224, "xception": 299, "xdensenet121_2": 32,
    "xdensenet40_2_k24_bc_cifar10": 32, "zfnet": 224,
}  # fmt: skip
# Where the image size cannot be told. NTS-Net's other outputs are not logits.
ARGUMENTS = {"nasnet_4a1056": {}, "ntsnet_cub": {"aux": False}}
NOTES = {
    "irevnet301": "with `channels=3`, since its first convolution has 6",
    "ntsnet_cub": "it picks parts of the image in NumPy, by the values of the activations",
    "regnetx002": "with NumPy before 1.24: pytorchcv 0.0.67 uses `numpy.int`",
    "revnet38": "its blocks free the memory of their inputs, `Tensor.set_`",
}
# Modules of pytorchcv whose networks do not classify images.
OTHER_TASKS = {
    "segmentation": (
        "bisenet", "cgnet", "contextnet", "dabnet", "danet", "deeplabv3", "edanet", "enet", "erfnet", "esnet",
        "fastscnn", "fcn8sd", "fpenet", "icnet", "lednet", "linknet", "pspnet", "segnet", "sinet", "sqnet", "unet",
    ),
    "poses and key points": (
        "alphapose_coco", "ibppose_coco", "lwopenpose_cmupan", "pfpcnet", "simplepose_coco", "simpleposemobile_coco",
        "superpointnet",
    ),
    "object detection": ("centernet", "lffd"),
    "speech": ("jasper", "jasperdr", "quartznet"),
    "faces in three dimensions": ("nvpattexp", "prnet", "voca"),
}  # fmt: skip
TARGETS = ("onnx", "paper")
TABLE_BEGINS = "<!-- written by python -m benchmarks.zoo -->\n"
TABLE_ENDS = "<!-- until here -->\n"


def family(name: str) -> str:
    """The module of pytorchcv that defines the network."""
    return model_provider._models[name].__module__.rpartition(".")[2]


def new_member(name: str) -> nn.Module:
    """The network with random weights, BN statistics that fit them, and the image size of `MEMBERS`."""
    torch.manual_seed(SEED)
    image_size = MEMBERS[name]
    arguments = ARGUMENTS.get(name, {"in_size": (image_size, image_size)})
    with mock.patch.object(np, "int", int, create=True):  # NumPy dropped the name in 1.24, pytorchcv 0.0.67 uses it
        model = load_model(f"pytorchcv:{name}", **arguments)
    fit_classifier(model, image_size)
    return fit_batch_norm(model, image_size, CHANNELS)


def train_once(captured: CapturedModel, teacher: Teacher) -> Iterator[tuple[str, nn.Module, Summary]]:
    """For each target, Q after one iteration in which it and G were trained, batch 2, and what is quantized in it.

    Raises:
        GdfqError: a loss is NaN or infinite.
    """
    for target in TARGETS:
        settings = {"quantizer.target": target, "generator.latent_size": 8, "quantizer.input_bits": 4}
        trainer, summary = trainer_of(captured, teacher, "cifar", 2, settings)
        trainer.step()
        trainer.read_metrics()
        yield target, trainer.student, summary


def row(name: str) -> str:
    """A line of the table: family, member, image size, quantized layers, activations, and what came of it."""
    layers, activations = "", ""
    try:
        captured = capture(new_member(name), channels=CHANNELS)
        summaries = {target: summary for target, _, summary in train_once(captured, build_teacher(captured))}
        layers = str(len(summaries["onnx"].weights))
        activations = " / ".join(str(len(summaries[target].activations)) for target in TARGETS)
        floats = Counter(f"`{entry.op}`" for entry in summaries["onnx"].stayed_float)
        counts = ", ".join(f"{op} {count}" for op, count in sorted(floats.items()))
        result = f"works; float: {counts}" if floats else "works"
    except GdfqError as error:
        result = "no: " + re.split(": | at ", str(error))[0]
    if name in NOTES:
        result += f" ({NOTES[name]})"
    return f"| {family(name)} | {name} | {MEMBERS[name]} | {layers} | {activations} | {result} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="docs/models.md", help="the page whose table is written anew")
    page = parser.parse_args().out
    before, _, rest = page.read_text().partition(TABLE_BEGINS)
    _, _, after = rest.partition(TABLE_ENDS)
    lines = [
        "| family | member | pixels | layers | activations, onnx / paper | result |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(MEMBERS, key=lambda name: (family(name), name)):
        lines.append(row(name))
        print(lines[-1], flush=True)
    page.write_text(before + TABLE_BEGINS + "\n".join(lines) + "\n" + TABLE_ENDS + after)


if __name__ == "__main__":
    main()
