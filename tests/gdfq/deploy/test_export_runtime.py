"""What onnxruntime takes, what of it runs in integers, and times in turns."""

import sys

import numpy as np
import onnx
import pytest
from integer_network import integer_network
from onnx import TensorProto, helper

from gdfq.deploy.runtime import interleaved_time, operators, run, session
from gdfq.errors import GdfqError


@pytest.fixture
def model():
    return integer_network()[1].model


def test_runs_a_model_and_a_file(model, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    of_model, of_file = (
        run(session(given, threads=1), {"images": images}) for given in (model, tmp_path / "model.onnx")
    )
    assert of_model[0].shape == (2, 5)
    assert np.array_equal(of_model[0], of_file[0])


def test_options(model):
    options = session(model, threads=1).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert options.intra_op_num_threads == 1


def refused(given) -> str:
    with pytest.raises(GdfqError) as caught:
        session(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install gdfq[export]" in refused(model)


def test_opset_and_ir_version_that_are_not_known(model):
    model.opset_import[0].version = 99
    assert "has opset 99 of ai.onnx, but onnxruntime" in refused(model)
    model.opset_import[0].version = 21
    model.ir_version = 99
    assert "is of ONNX's IR version 99, but onnxruntime" in refused(model)


@pytest.mark.parametrize("content", [b"", b"not ONNX at all" * 10, None])
def test_files_that_are_no_model(model, tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString()[:2000] if content is None else content)
    assert refused(path).startswith(f"{path} is no ONNX file")


def test_other_refusals(model, tmp_path):
    assert refused(tmp_path / "none.onnx") == f"no such file: {tmp_path / 'none.onnx'}"
    model.graph.node[0].op_type = "NoSuchOperator"
    assert "NoSuchOperator" in refused(model)


def test_inputs_that_do_not_fit(model):
    with pytest.raises(GdfqError, match=r"onnxruntime does not run the model: .*Got: 1 Expected: 3") as caught:
        run(session(model), {"images": np.zeros((1, 1, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_all_in_integers(model):
    found = operators(model)
    assert {kind: (place.integer, place.total) for kind, place in found.places.items()} == {
        "convolutions": (2, 2),
        "linear layers": (1, 1),
        "additions": (1, 1),
        "average pools": (1, 1),
    }
    assert found.integers == {"QLinearConv": 2, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    assert (found.layers.integer, found.layers.total, found.layers.floats) == (3, 3, ())


def test_what_is_in_float_is_named(model):
    """Whoever read the codes of conv1 reads its result: the convolution becomes a FusedConv, and its readers float."""
    for node in model.graph.node:
        node.input[:] = ["relu1" if name == "first_value" else name for name in node.input]
    found = operators(model)
    assert found.places["convolutions"].floats == ("conv1", "conv2")
    assert found.places["additions"].floats == ("add",)
    assert found.places["linear layers"].floats == ()
    assert "FusedConv" in found.counts
    assert "FusedConv" not in found.integers


def test_names_that_nodes_lack():
    """They have their output's, unless another node is called like that."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy")
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "weight")
    products = [("x", "a", ""), ("a", "b", "a"), ("b", "y", "")]  # what goes in, what comes out, the node's name
    nodes = [helper.make_node("MatMul", [before, "weight"], [after], name) for before, after, name in products]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert operators(model).layers.floats == ("a'", "a", "y")
    assert [node.name for node in model.graph.node] == ["", "a", ""]


def test_times_in_turns():
    calls = []
    timings = interleaved_time([lambda: calls.append(0), lambda: calls.append(1)], seconds=0)
    assert calls == [0, 0, 0, 1, 1, 1] + [0, 1] * 5
    assert all(timing.low <= timing.median <= timing.high for timing in timings)
