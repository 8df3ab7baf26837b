"""`gdfq evaluate FILE.onnx` against counts made by hand: float and uint8, fixed batches, files that do not fit."""

import json
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import gdfq as package
from gdfq.deploy.classifier import OnnxClassifier
from gdfq.errors import GdfqError

CLASSES = 3


def reader(path, dtype=TensorProto.FLOAT, shape=("n", 3, 8, 8), threshold=(0.25, 0.5), metadata=None):
    """A file whose logits are 1 for the class that the first pixel falls into by `threshold`, on the scale of the
    file's images: dark, middle, bright."""
    images = helper.make_tensor_value_info("images", dtype, shape)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [shape[0], CLASSES])
    values = {"shape": [-1, 1], "first": [0, 0, 0], "last": [1, 1, 1], "all": [1, 2, 3]}
    constants = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in values.items()]
    low, high = (
        onnx.numpy_helper.from_array(np.float32(value), name) for name, value in zip("ab", threshold, strict=True)
    )
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["x", "first", "last", "all"], ["pixel"]),
        helper.make_node("Reshape", ["pixel", "shape"], ["flat"]),
        helper.make_node("Less", ["flat", "a"], ["dark"]),
        helper.make_node("Greater", ["flat", "b"], ["bright"]),
        helper.make_node("Or", ["dark", "bright"], ["either"]),
        helper.make_node("Not", ["either"], ["middle"]),
        helper.make_node("Concat", ["dark", "middle", "bright"], ["classes"], axis=1),
        helper.make_node("Cast", ["classes"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "by hand", [images], [logits], [*constants, low, high])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Seven gray images in three classes; the file must call dark 40, middle 90, bright 200; one of class 2 is dark."""
    for name, values in (("a", (40, 40, 40)), ("b", (90, 90)), ("c", (200, 40))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, value in enumerate(values):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def measured(gdfq, file, folder, *options):
    code, out, err = gdfq("evaluate", file, "--data", folder, "--json", *options)
    assert (code, err) == (0, "")
    return json.loads(out)


SIXTY_SEVENTHS = pytest.approx(100 * 6 / 7)


def test_float_file_with_its_normalization(gdfq, tmp_path, folder):
    """Pixels scaled to 0..1, less 0.5, divided by 0.5: 40, 90 and 200 are -0.69, -0.29 and 0.57."""
    metadata = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    file = reader(tmp_path / "model.onnx", threshold=(-0.5, 0), metadata=metadata)
    figures = measured(gdfq, file, folder)
    assert (figures["top1"], figures["images"]) == (SIXTY_SEVENTHS, 7)
    assert figures["preparation"]["mean"] == [0.5] * 3


def test_any_float_file_with_options_of_the_data(gdfq, tmp_path, folder):
    file = reader(tmp_path / "model.onnx", threshold=(0.25, 0.5))
    assert measured(gdfq, file, folder, "--data-arg", "mean=0", "--data-arg", "std=1")["top1"] == SIXTY_SEVENTHS


@pytest.mark.parametrize("batch", ["n", 1, 2, 4])
def test_file_of_pixels(gdfq, tmp_path, folder, batch):
    file = reader(tmp_path / "model.onnx", TensorProto.UINT8, (batch, 3, 8, 8), threshold=(64, 128))
    assert measured(gdfq, file, folder, "--batch-size", "3")["top1"] == SIXTY_SEVENTHS


def test_half_precision(gdfq, tmp_path, folder):
    file = reader(tmp_path / "model.onnx", TensorProto.FLOAT16, threshold=(0.25, 0.5))
    assert measured(gdfq, file, folder, "--data-arg", "mean=0", "--data-arg", "std=1")["top1"] == SIXTY_SEVENTHS


def test_sizes(gdfq, tmp_path, folder):
    """A file for any size is given the one that is asked for; one for 8 x 8 takes no other."""
    file = reader(tmp_path / "any.onnx", shape=("n", 3, "h", "w"))
    assert measured(gdfq, file, folder, "--image-size", "4")["preparation"]["shape"] == [3, 4, 4]
    code, _, err = gdfq("evaluate", file, "--data", folder)
    assert (code, "--image-size" in err) == (2, True)
    file = reader(tmp_path / "fixed.onnx")
    code, _, err = gdfq("evaluate", file, "--data", folder, "--image-size", "4")
    assert (code, "takes images of 8 x 8 pixels: leave out --image-size" in err) == (2, True)


def test_in_python(tmp_path):
    file = OnnxClassifier(reader(tmp_path / "model.onnx"))
    assert (file.in_size, file.channels, file.classes, file.normalization) == ((8, 8), 3, CLASSES, {})
    images = torch.tensor([0.1, 0.3, 0.9]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert file(images).argmax(1).tolist() == [0, 1, 2]
    labeled = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 1]))
    assert package.evaluate(file, labeled).top1 == pytest.approx(200 / 3)


def refused(gdfq, *arguments) -> str:
    code, out, err = gdfq("evaluate", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_normalized_images_for_a_file_of_pixels(gdfq, tmp_path, folder):
    file = reader(tmp_path / "model.onnx", TensorProto.UINT8, threshold=(64, 128))
    assert "leave out mean and std" in refused(gdfq, file, "--data", folder, "--data-arg", "mean=0.5")


def test_files_that_are_none(gdfq, tmp_path, folder):
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"something else")
    assert f"{other} is no ONNX file" in refused(gdfq, other, "--data", folder)
    assert "no such file" in refused(gdfq, tmp_path / "none.onnx", "--data", folder)


def test_files_that_are_no_classifier_of_images(gdfq, tmp_path, folder):
    file = reader(tmp_path / "model.onnx", shape=("n", 8, 8, 3))
    assert "with the channels last" in refused(gdfq, file, "--data", folder)
    model = onnx.load(file)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    onnx.save(model, file)
    assert "is no classifier of images: it takes images tensor(int64)" in refused(gdfq, file, "--data", folder)


def test_options_of_a_model(gdfq, tmp_path, folder):
    file = reader(tmp_path / "model.onnx")
    message = refused(gdfq, file, "--data", folder, "--model", "pytorchcv:resnet20", "--device", "cuda")
    assert "leave out --model, --device" in message
    assert "say what to evaluate on" in refused(gdfq, file)


def test_without_onnxruntime(tmp_path, monkeypatch):
    file = reader(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(GdfqError, match="pip install gdfq"):
        OnnxClassifier(file)
