"""Q in plain PyTorch: the same levels, in a process that has no gdfq; and what Q itself says when it leaves."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from small_models import Plain, Residual, capture_once
from torch import nn

from gdfq.calibrate import end_pass
from gdfq.config import QuantizerConfig
from gdfq.deploy.standard import to_standard
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized
from gdfq.nn import observing


def images(count: int = 48):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(network, **settings):
    student, _ = build_quantized(capture_once(network), QuantizerConfig(**settings))
    with observing(student), torch.no_grad():
        for batch in images().split(8):
            student(batch)
    end_pass(student)
    return student


@pytest.mark.parametrize("network", [Plain, Residual])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_bits": 8, "activation_bits": 8},
        {"target": "int4-symmetric"},
        {"observer": "learned_step"},
        {"layers": {"conv*": "float"}},
        {"layers": {"fc": 8}},
    ],
)
def test_computes_the_same(network, settings):
    student = quantized(network, **settings)
    standard = to_standard(student)
    with torch.no_grad():
        expected, found = student(images()), standard(images())
    # One level that falls on the other side moves logits by a step; few may.
    apart = (found - expected).abs().amax(1) > 1e-5 * expected.abs().max()
    assert apart.sum() <= 2
    assert not any("gdfq" in type(module).__module__ for module in standard.modules())


def test_weights_are_the_same_to_the_last_bit():
    student = quantized(Plain)
    quantizer, weights = student.weight_quantizers.stored, [student.conv.weight, student.fc.weight]
    called = []
    standard = to_standard(student)

    class Sees(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            result = super().call_function(target, args, kwargs)
            called.extend([result] if target is torch.fake_quantize_per_channel_affine else [])
            return result

    Sees(standard).run(images(2))
    assert all(torch.equal(found, expected) for found, expected in zip(called, quantizer(weights), strict=True))


def test_keeps_the_users_names_and_leaves_q_alone():
    student = quantized(Plain)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    names = set(to_standard(student).state_dict())
    assert {"conv.weight", "conv.weight_scale", "conv.weight_zero_point", "bn.running_var", "fc.weight"} <= names
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


LOADERS = {
    "save": "torch.load('model', weights_only=False)",
    "trace": "torch.jit.load('model')",
    "export": "torch.export.load('model').module()",
}


def leave(model, how, path, x) -> None:
    if how == "save":
        torch.save(model, path)
    elif how == "trace":
        torch.jit.save(torch.jit.trace(model, x), path)
    else:
        torch.export.save(torch.export.export(model, (x,)), str(path))


def load_without_gdfq(folder, how, count) -> subprocess.CompletedProcess:
    code = f"""
        import sys
        sys.modules.update(gdfq=None, gdfq_ext=None)
        import torch
        images, logits = torch.load('images'), torch.load('logits')
        model = {LOADERS[how]}
        with torch.no_grad():
            assert torch.allclose(model(images[:{count}]), logits[:{count}])
    """
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], cwd=folder, capture_output=True
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", LOADERS)
def test_loads_without_gdfq(tmp_path, how):
    x = images(6)
    standard = to_standard(quantized(Residual))
    torch.save(x, tmp_path / "images")
    torch.save(standard(x), tmp_path / "logits")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        leave(standard, how, tmp_path / "model", x)
    done = load_without_gdfq(tmp_path, how, 6 if how == "export" else 3)
    assert done.returncode == 0, done.stderr.decode()[-500:]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", LOADERS)
def test_q_says_what_it_needs(tmp_path, how):
    student = quantized(Plain)
    with pytest.warns(
        UserWarning, match=r"needs .*gdfq.* wherever it is loaded: gdfq.to_standard\(model\) gives plain"
    ):
        leave(student, how, tmp_path / "model", images(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(images(2))
        torch.save(student.state_dict(), tmp_path / "state")


def test_a_pickled_q_comes_back(tmp_path):
    student = quantized(Plain)
    with pytest.warns(UserWarning, match="needs gdfq"):
        torch.save(student, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(again(images()), student(images()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnx_export_of_q_names_the_way(tmp_path):
    with pytest.raises(GdfqError, match=r"gdfq\.export writes it to ONNX"):
        torch.onnx.export(quantized(Plain), (images(2),), tmp_path / "model.onnx", dynamo=False)


def test_what_has_no_zero():
    student = quantized(Plain, target="paper")
    quantizer = next(iter(student.activation_quantizers.values())).quantizer
    quantizer.range.copy_(torch.tensor([0.5, 2.0]))
    with pytest.raises(GdfqError, match="does not contain zero"):
        to_standard(student)


def test_what_is_no_quantized_model():
    with pytest.raises(GdfqError, match=r"takes a quantized model, as result\.model .* not a Sequential"):
        to_standard(nn.Sequential())
    with pytest.raises(GdfqError, match="takes a quantized model"):
        to_standard(capture_once(Plain).module)


def test_ranges_that_were_never_observed():
    student, _ = build_quantized(capture_once(Plain), QuantizerConfig())
    with pytest.raises(GdfqError, match="quantized places"):
        to_standard(student)
