"""OpenVINO and the files of `gdfq export`: does it load them, does it agree, what does it run in integers, how fast?

    pip install openvino
    python -m benchmarks.openvino_file --out benchmarks/results/cpu-amd-epyc/openvino.json

Networks and images are those of `benchmarks.deploy`. Each file is run by onnxruntime and by OpenVINO on the CPU, one
image at a time with one thread: as it is, with float operators in float32 (OpenVINO prefers bfloat16 on CPUs that have
it), and each with a batch of 1 made known. `levels` is what `gdfq export` checks: single layers, the file cut at all
codes. `unrounded` compares OpenVINO with another file in onnxruntime: that without the quantizers between a convolution
and an addition.
"""

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from onnx import ModelProto

import gdfq
from benchmarks.deploy import BITS, CALIBRATED_ON, NETWORKS, images, network
from gdfq.calibrate import calibrate
from gdfq.demo import test_set
from gdfq.deploy.export import Quantized, export
from gdfq.deploy.levels import LayerCheck, Simulation, compare, computed_levels, cut, layers_before
from gdfq.deploy.runtime import interleaved_time, session
from gdfq.graph import Pixels, build_quantized, capture
from gdfq.provenance import installed, provenance
from gdfq.run.files import write_text

ONE_THREAD = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
WAYS = {"as it is": {}, "float32": FLOAT32, "batch of 1": {}, "float32, batch of 1": FLOAT32}
SAME = 1e-4  # logits that are no further apart


class Compiled:
    """A model in OpenVINO, one of `WAYS`, to be used as an `onnxruntime.InferenceSession` is."""

    def __init__(self, model: ModelProto, way: str) -> None:
        reference, core = session(model, threads=1), openvino.Core()
        self.get_inputs, self.get_outputs = reference.get_inputs, reference.get_outputs
        read = core.read_model(model.SerializeToString())
        if "batch" in way:
            read.reshape({given.any_name: [1, *given.partial_shape[1:]] for given in read.inputs})
        self.compiled = core.compile_model(read, "CPU", ONE_THREAD | WAYS[way])

    def run(self, names: list[str] | None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.compiled(feed)
        return [found[name].copy() for name in names or [output.name for output in self.get_outputs()]]

    def operators(self) -> dict[str, int]:
        """How many of each kind run in each type; those that move or hold numbers are left out."""
        infos = [node.get_rt_info() for node in self.compiled.get_runtime_model().get_ordered_ops()]
        kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in infos]
        left_out = ("Const", "Input", "Output", "Reorder", "Reshape")
        return dict(Counter(f"{kind} {precision}" for kind, precision in kinds if kind not in left_out).most_common())


def unrounded(model: ModelProto) -> ModelProto:
    """The file without quantizers of what a convolution gives to an addition alone; of one operand, the first."""
    result = ModelProto()
    result.CopyFrom(model)
    producers = {name: node for node in result.graph.node for name in node.output}
    readers = Counter(name for node in result.graph.node for name in node.input)
    for node in result.graph.node:
        for place, name in enumerate(node.input if node.op_type == "Add" else ()):
            while readers[name] == 1 and producers[name].op_type in ("DequantizeLinear", "Clip", "QuantizeLinear"):
                name = producers[name].input[0]
            if readers[name] == 1 and producers[name].op_type == "Conv":
                node.input[place] = name
                break
    return result


def logits_of(run: Any, x: np.ndarray) -> np.ndarray:
    return np.concatenate([run.run(None, {"images": image[None]})[0] for image in x])


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    apart = np.abs(ours - theirs).max(1)
    equal = {"argmax_equal": int((ours.argmax(1) == theirs.argmax(1)).sum()), "same_logits": int((apart < SAME).sum())}
    return equal | {"images": len(ours), "apart_most": float(apart.max()), "apart_median": float(np.median(apart))}


def row(name: str, model: torch.nn.Module, bits: tuple[int, int]) -> dict[str, Any]:
    """What was found of one network at one number of bits."""
    size, channels = NETWORKS[name], 1 if name == "demonstration" else 3
    settings = {"quantizer.weight_bits": bits[0], "quantizer.activation_bits": bits[1]}
    config = gdfq.Config.load("imagenet", settings).quantizer
    student, _ = build_quantized(capture(model, size, channels), config)
    calibrate(student, (part for x in images(6000, CALIBRATED_ON, channels, size) for part in x.split(8)))
    count, checked = (2000, 32) if size < 100 else (100, 8)
    x = torch.cat(list(images(0, count, channels, size)))
    with tempfile.TemporaryDirectory() as folder:
        quantized = Quantized(student, config, Pixels.standardized(channels), (), model)
        written = export(quantized, Path(folder) / "file.onnx", verified=False).written
    file = session(written.model, threads=1)
    logits = logits_of(file, x.numpy())
    found: dict[str, Any] = {"network": name, "bits": "W{}A{}".format(*bits), "pixels": size}
    found |= {"classes_seen": len(set(logits.argmax(1))), "largest_logit": float(np.abs(logits).max())}
    found["in_the_file"] = dict(Counter(node.op_type for node in written.model.graph.node).most_common())
    ways = {way: Compiled(written.model, way) for way in WAYS}  # an error where OpenVINO does not load it
    theirs = {way: logits_of(compiled, x.numpy()) for way, compiled in ways.items()}
    feed = {"images": x[:1].numpy()}
    own, *times = interleaved_time([lambda run=run: run.run(None, feed) for run in (file, *ways.values())], 20.0)
    found["onnxruntime"] = {"seconds": asdict(own)}
    for (way, compiled), time in zip(ways.items(), times, strict=True):
        found[way] = agreement(logits, theirs[way]) | {"operators": compiled.operators(), "seconds": asdict(time)}
        found[way]["time_ratio"] = time.median / own.median
    without = logits_of(session(unrounded(written.model), threads=1), x.numpy())
    found["unrounded"] = agreement(without, theirs["float32"])
    if name == "demonstration":
        labels, everyones = test_set().labels[:count].numpy(), {"onnxruntime": logits, **theirs}
        found["accuracy"] = {way: float((of.argmax(1) == labels).mean()) for way, of in everyones.items()}
    parts, simulation, x = cut(written.model, written.codes), Simulation(student, written.codes), x[:checked]
    levels, _ = simulation.levels(x)
    found["levels"] = {}
    for runtime, opened in (("onnxruntime", session(parts, threads=1)), ("openvino", Compiled(parts, "float32"))):
        computed, _ = computed_levels(opened, levels, written.codes, {"images": x.numpy()})
        checks = compare(simulation, x, levels, computed, layers_before(written.model, written.codes))
        total = asdict(sum(checks.values(), LayerCheck("")))
        found["levels"][runtime] = {key: total[key] for key in ("codes", "boundary", "wrong", "farthest")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, packages = [], ("openvino", "onnxruntime", "onnx", "pytorchcv")
    for name in ("demonstration", "resnet18", "mobilenetv2_w1"):
        model = network(name)
        for bits in BITS:
            rows.append(row(name, model, bits))
            about = provenance(1) | {package: installed(package) for package in packages}
            write_text(arguments.out, json.dumps({"provenance": about, "rows": rows}, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
