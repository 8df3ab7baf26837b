"""From a result, or the folder of a run, to a file: what is there afterwards, and what is not where that failed."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from short_run import SHORT
from small_models import Plain, Residual, randomize_batch_norm

import gdfq
from gdfq.deploy import Normalization
from gdfq.deploy.export import NotTheSame, Quantized
from gdfq.errors import GdfqError

IMAGES = Normalization([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


@pytest.fixture(scope="module")
def model():
    return randomize_batch_norm(Residual())


@pytest.fixture(scope="module")
def result(model):
    settings = {"method": "minmax", "schedule.range_batches": 2, "schedule.batch_size": 8, "run.held_out_images": 64}
    return gdfq.quantize(model, gdfq.Config.load("cifar", settings), progress=False)


def test_a_result_becomes_a_file_and_what_was_found(result, model, tmp_path):
    exported = gdfq.export(result, tmp_path / "q.onnx", float_model=model, threads=1)
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["verification"]["failed"] == []
    assert {"equal": 64, "images": 64}.items() <= found["verification"]["argmax"]["synthetic"].items()
    assert found["verification"]["operators"]["places"]["convolutions"] == {"integer": 4, "total": 4, "floats": []}
    assert found["stays_float"] == []
    assert exported.path.stat().st_size == found["verification"]["bytes"]
    metadata = {prop.key: prop.value for prop in onnx.load(exported.path).metadata_props}
    assert (metadata["gdfq"], metadata["target"], metadata["weight_bits"]) == (gdfq.__version__, "onnx", "4")
    images = result.held_out_images[0]
    (logits,) = onnxruntime.InferenceSession(exported.path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), result.model(images))


def test_a_file_of_pixels_normalizes_them(result, tmp_path):
    exported = gdfq.export(result, tmp_path / "q.onnx", input="uint8", normalization=IMAGES, classes=list("abcde"))
    pixels = torch.randint(0, 256, (16, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(exported.path)
    (logits,) = session.run(None, {"images": pixels.numpy().astype(np.uint8)})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGES.mean, IMAGES.std))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), result.model((pixels / 255 - mean) / std))
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["mean"]), json.loads(metadata["classes"])) == (IMAGES.mean, list("abcde"))


def test_what_cannot_be_written_leaves_nothing(result, model, tmp_path, monkeypatch):
    def files():
        return sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(GdfqError, match="--pixel-mean"):
        gdfq.export(result, tmp_path / "q.onnx", input="uint8")
    with pytest.raises(GdfqError, match=r"ends in \.onnx"):
        gdfq.export(result, tmp_path / "q")
    (tmp_path / "q.onnx").write_text("somebody's")
    with pytest.raises(GdfqError, match="there already"):
        gdfq.export(result, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").read_text() == "somebody's"
    float_layer = {"method": "minmax", "schedule.range_batches": 1, "quantizer.layers": {"conv2": "float"}}
    some_float = gdfq.quantize(model, gdfq.Config.load("cifar", float_layer), progress=False)
    with pytest.raises(GdfqError, match=r"conv2 \(Conv\): its weight is not quantized"):
        gdfq.export(some_float, tmp_path / "f.onnx", integer_only=True)
    assert files() == ["q.onnx"]

    with pytest.raises(GdfqError, match=rf"{tmp_path}/r.onnx has opset 99"):
        gdfq.export(result, tmp_path / "r.onnx", opset=99)

    def full(self, *_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(GdfqError, match="No space left"):
            gdfq.export(result, tmp_path / "r.onnx")
    assert files() == ["q.onnx"]


def test_a_file_that_computes_something_else_is_not_kept(result, tmp_path, monkeypatch):
    from gdfq.deploy import export as module

    write = module.write

    def wrong(*args, **kwargs):
        written = write(*args, **kwargs)
        weight = max((t for t in written.model.graph.initializer if t.raw_data), key=lambda t: len(t.raw_data))
        weight.raw_data = bytes([weight.raw_data[0] ^ 0x3]) + weight.raw_data[1:]
        return written

    monkeypatch.setattr("gdfq.deploy.export.write", wrong)
    with pytest.raises(NotTheSame, match="computes something else than Q in"):
        gdfq.export(result, tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())
    gdfq.export(result, tmp_path / "q.onnx", verified=False)
    assert json.loads((tmp_path / "q.json").read_text())["verification"] is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gdfq", "zeroq"])
def test_the_folder_of_a_run(method, tmp_path):
    model = randomize_batch_norm(Plain())
    short = dict(gdfq.parse_override(option.removeprefix("--set=")) for option in SHORT)
    config = gdfq.Config.load("cifar", {**short, "method": method, "zeroq.iterations": 2, "zeroq.images": 8})
    result = gdfq.quantize(model, config, run_dir=tmp_path / "run", progress=False)
    quantized = Quantized.of_run(tmp_path / "run", model, count=12)
    images = torch.cat(list(quantized.images))
    assert images.shape == (12, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(quantized.student(images), result.model(images))
    quantized = Quantized.of_run(tmp_path / "run", model, count=12)
    assert gdfq.export(quantized, tmp_path / "q.onnx").verification.argmax["synthetic"].images == 12
    (tmp_path / "run" / "report.json").unlink()
    with pytest.raises(GdfqError, match="no result yet"):
        Quantized.of_run(tmp_path / "run", model)
