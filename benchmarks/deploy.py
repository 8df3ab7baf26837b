"""Networks as ONNX files in integers: does each file compute what its simulation does, in which operators, how fast.

    python -m benchmarks.deploy --out benchmarks/results/cpu-amd-epyc/deploy.json

The demonstration's network and EfficientNet-Lite0 have trained weights. The others' are random: their BN statistics
are set from images first, and their logits centred, so that quantizers use their codes and all sorts of classes come
out; a row says how far that is so, and does not count where a quantizer uses less than half of the codes that it can
use, or there are fewer than five classes. Images are the shipped ones, in color, at the network's size. Ranges are
calibrated, nothing is trained: what is tried here is the file.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import gdfq
from benchmarks.step_providers import fit_classifier
from gdfq.calibrate import calibrate
from gdfq.demo import teacher, test_set
from gdfq.deploy.export import Quantized, export
from gdfq.deploy.grids import Grid
from gdfq.deploy.levels import Simulation
from gdfq.deploy.runtime import KINDS
from gdfq.graph import Pixels, build_quantized, capture
from gdfq.models import load_model
from gdfq.provenance import provenance
from gdfq.run.files import write_text

BITS = ((4, 4), (4, 8), (8, 8))
NETWORKS = {  # and the size of their images
    "demonstration": 28, "examples/custom_resnet20.py": 32, "resnet18": 224, "mobilenetv2_w1": 224,
    "shufflenet_g1_w1": 224, "efficientnet-lite0": 224, "densenet121": 224, "resnet50": 224, "inceptionv3": 299,
    "bn_vgg16": 224,
}  # fmt: skip
SETTLED_ON = 64  # images
CALIBRATED_ON = 32
USED_ON = 64  # where it is counted which codes are used
AT_ONCE = 2 * 1024**2  # pixels


def images(first: int, count: int, channels: int, size: int) -> Iterator[Tensor]:
    """Shipped images from number `first` on, `(N, channels, size, size)`, each in a color of its own, standardized."""
    dataset, random = test_set(), torch.Generator().manual_seed(first)
    at_once = max(1, min(256, AT_ONCE // size**2))
    for start in range(first, first + count, at_once):
        x = torch.stack([dataset.image(i) for i in range(start, min(start + at_once, first + count))])
        if channels > 1:
            x = x * torch.rand(len(x), channels, 1, 1, generator=random) * 2
        yield F.interpolate(x, (size, size), mode="bilinear") if x.shape[-1] != size else x


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "demonstration":
        return teacher()
    if name == "efficientnet-lite0":
        return load_model("examples/efficientnet_lite0.py:efficientnet_lite0")
    if name.endswith(".py"):
        model = load_model(f"{name}:resnet20")
    else:
        model = load_model(f"pytorchcv:{name}")
        fit_classifier(model, None)
    settle(model, NETWORKS[name])
    return model


@torch.no_grad()
def settle(model: nn.Module, size: int) -> None:
    """BN statistics of images, and logits around zero."""
    batch_norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [module.momentum for module in batch_norms]
    for module in batch_norms:
        module.momentum = 1.0
    x = torch.cat(list(images(5000, SETTLED_ON if size < 256 else SETTLED_ON // 2, 3, size)))
    model.train()(x)
    for module, momentum in zip(batch_norms, momenta, strict=True):
        module.momentum = momentum
    read: list[Tensor] = []
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model.eval()(x)
    hook.remove()
    mean = read[0].transpose(0, 1).flatten(1).mean(1)  # the last layer becomes orthogonal to it
    rows = last.weight.flatten(1)
    last.weight.copy_((rows - torch.outer(rows @ mean, mean) / mean.square().sum()).view_as(last.weight))


def row(name: str, model: nn.Module, bits: tuple[int, int], count: int, threads: int) -> dict[str, Any]:
    """What was found of one network at one number of bits."""
    size, channels = NETWORKS[name], 1 if name == "demonstration" else 3
    start = time.monotonic()
    captured = capture(model, size, channels)
    settings = {"quantizer.weight_bits": bits[0], "quantizer.activation_bits": bits[1]}
    config = gdfq.Config.load("imagenet", settings).quantizer
    student, _ = build_quantized(captured, config)
    calibrate(student, (part for x in images(6000, CALIBRATED_ON, channels, size) for part in x.split(8)))
    found: dict[str, Any] = {"network": name, "bits": f"W{bits[0]}A{bits[1]}", "pixels": size}
    pixels = Pixels.standardized(channels)
    with tempfile.TemporaryDirectory() as folder:
        quantized = Quantized(student, config, pixels, images(0, count, channels, size), model)
        exported = export(quantized, Path(folder) / "file.onnx", threads=threads)
    with torch.inference_mode():
        levels, _ = Simulation(student, exported.written.codes).levels(next(images(0, USED_ON, channels, size)))
    there_are = attainable(student, {name: code.grid for name, code in exported.written.codes.items()})
    used = {name: len(levels[name].unique()) / count for name, count in there_are.items()}
    found |= {"least_share_of_codes_used": min(used.values()), "least_used": min(used, key=used.get)}
    classes = exported.verification.argmax["synthetic"].classes
    found |= {"classes_seen": classes, "counts": min(used.values()) >= 0.5 and classes >= 5}
    return found | _in_short(exported.to_dict()) | {"seconds": time.monotonic() - start}


def attainable(student: fx.GraphModule, grids: dict[str, Grid]) -> dict[str, int]:
    """How many codes each quantizer can use: all that it has, or fewer where it reads averages of codes, of which there
    may be fewer."""
    counts = {name: grid.highest - grid.lowest + 1 for name, grid in grids.items()}
    names = {name.removesuffix(".quantizer"): name for name in grids}
    for node in student.graph.find_nodes(op="call_function", target=torch.ops.aten.avg_pool2d.default):
        source = node.args[0]
        while source.target not in names:  # what moves codes
            source = source.args[0]
        for name in (names[reader.target] for reader in node.users if reader.target in names):
            counts[name] = len({grids[name].code(y) for y in averages(grids[names[source.target]], node.args[1])})
    return counts


def averages(grid: Grid, window: list[int]) -> Iterator[float]:
    """Every value that the average of a window of codes can have."""
    count = math.prod(window)
    lowest, highest = (count * (code - grid.zero_point) for code in (grid.lowest, grid.highest))
    return (sum_of_codes * grid.step / count for sum_of_codes in range(lowest, highest + 1))


def _in_short(exported: dict[str, Any]) -> dict[str, Any]:
    """What was found, of the layers those alone where something differs."""
    checks = exported["verification"]["layers"]
    exported["verification"]["codes"] = sum(check["codes"] for check in checks.values())
    exported["verification"]["layers"] = {
        name: check for name, check in checks.items() if check["wrong"] or check["boundary"]
    }
    del exported["file"]
    return exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; what it holds already is kept")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--bits", nargs="+", default=[f"{w}:{a}" for w, a in BITS], help="default: %(default)s")
    parser.add_argument("--images", type=int, default=2000, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    facts = provenance(arguments.threads)
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    for name in arguments.networks:
        model = network(name)
        for bits in arguments.bits:
            try:
                found = row(name, model, tuple(map(int, bits.split(":"))), arguments.images, arguments.threads)
            except gdfq.GdfqError as error:
                found = {"network": name, "bits": "W{}A{}".format(*bits.split(":")), "error": str(error)}
            rows = [other for other in rows if (other["network"], other["bits"]) != (name, found["bits"])] + [found]
            found |= {"gdfq_commit": facts["gdfq_commit"], "cpu": facts["machine"]["cpu"]}
            write_text(arguments.out, json.dumps(facts | {"rows": rows}, indent=1) + "\n")
            print(line(found), flush=True)
    print(table([found for found in rows if "error" not in found]))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; (b) marks those of another processor than the first one's."""
    lines = [
        "| | in integers | codes wrong / at a boundary | class: Q in integers | Q in float32 | size | speed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        verification = found["verification"]
        places = verification["operators"]["places"]
        integers = ", ".join(f"{places[k]['integer']} of {places[k]['total']}" if k in places else "-" for k in KINDS)
        checks = verification["layers"].values()
        wrong, boundary = (sum(check[kind] for check in checks) for kind in ("wrong", "boundary"))
        exact, float32 = (f"{of['equal']} of {of['images']}" for of in verification["argmax"].values())
        ratio = verification["float_bytes"] / verification["bytes"]
        faster = verification["float_time"]["median"] / verification["time"]["median"]
        name = f"{found['network']}, {found['bits']}" + ("" if found["counts"] else " (*)")
        name += "" if found["cpu"] == rows[0]["cpu"] else " (b)"
        levels = f"{wrong} / {boundary} of {verification['codes'] / 1e6:.0f} M"
        lines.append(f"| {name} | {integers} | {levels} | {exact} | {float32} | 1/{ratio:.1f} | {faster:.2f} |")
    return "\n".join(lines)


def line(found: dict[str, Any]) -> str:
    """A row in words."""
    if "error" in found:
        return f"{found['network']} {found['bits']}: {found['error']}"
    verification = found["verification"]
    wrong, boundary = (sum(check[kind] for check in verification["layers"].values()) for kind in ("wrong", "boundary"))
    argmax = verification["argmax"]["synthetic"]
    parts = [f"wrong {wrong}", f"boundary {boundary}", f"argmax {argmax['equal']}/{argmax['images']}"]
    places = verification["operators"]["places"]
    parts += [f"{place['integer']}/{place['total']} {kind}" for kind, place in places.items()]
    if verification["float_bytes"]:
        parts.append(f"size 1/{verification['float_bytes'] / verification['bytes']:.1f}")
        parts.append(f"{verification['float_time']['median'] / verification['time']['median']:.2f} times as fast")
    parts.append(f"codes used {found['least_share_of_codes_used']:.2f}, classes {found['classes_seen']}")
    return f"{found['network']} {found['bits']}: {', '.join(parts)}, {found['seconds']:.0f} s"


if __name__ == "__main__":
    main()
