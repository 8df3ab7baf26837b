"""pytorchcv's classification networks, one of every family: captured, quantized for both targets, trained once.

The default run has the paper's networks and a small one of each graph structure; `-m zoo` runs all other families.
"""

import re
from pathlib import Path

import pytest
import torch
from distinct_inputs import distinct_inputs
from pytorchcv import model_provider
from pytorchcv.models.densenet_cifar import CIFARDenseNet
from pytorchcv.models.espnetv2 import ESPNetv2
from pytorchcv.models.mobilenetv2 import MobileNetV2
from pytorchcv.models.octresnet import OctResNet
from pytorchcv.models.seresnet import SEResNet
from pytorchcv.models.shufflenet import ShuffleNet, ShuffleUnit
from pytorchcv.models.shufflenetv2 import ShuffleNetV2
from pytorchcv.models.vgg import VGG
from small_models import randomize_batch_norm
from torch import nn

from benchmarks import zoo
from benchmarks.step_providers import fit_classifier
from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.models import load_model

# `resnet20_cifar100` differs from the first in its last layer only.
PAPER = [
    "resnet20_cifar10", "resnet18", "bn_vgg16", "inceptionv3", "resnet50", "mobilenetv2_w1", "shufflenet_g1_w1",
]  # fmt: skip
STRUCTURES = {
    "gates computed from the whole map": (
        SEResNet, {"channels": [[16], [32]], "init_block_channels": 16, "bottleneck": False, "conv1_stride": False},
    ),
    "concatenation of all that came before, BN first": (
        CIFARDenseNet, {"channels": [[12, 16], [20, 24]], "init_block_channels": 8, "bottleneck": False},
    ),
    "split, shuffle, concatenation": (
        ShuffleNetV2, {"channels": [[16, 16]], "init_block_channels": 8, "final_block_channels": 16},
    ),
    "PReLU, dilated branches, the image read at several depths": (
        ESPNetv2,
        {"channels": [[32], [64, 64]], "init_block_channels": 16, "final_block_channels": 64, "final_block_groups": 4,
         "dilations": [[[1, 2, 3, 4]], [[1, 2, 3, 4], [1, 1, 2, 3]]]},
    ),
    "maps of two sizes, weights that the graph computes": (
        OctResNet, {"channels": [[16], [32]], "init_block_channels": 16, "bottleneck": False, "conv1_stride": False},
    ),
}  # fmt: skip
REFUSED = {
    "alexnetb": "no BatchNorm layer",
    "diracnet18v2": "no BatchNorm layer",
    "nin_cifar10": "no BatchNorm layer",
    "squeezenet_v1_1": "no BatchNorm layer",
    "wrn50_2": "no BatchNorm layer",
    "zfnet": "no BatchNorm layer",
    "ntsnet_cub": "cannot be captured",
    "revnet38": "cannot be captured",
}


def small(network: type[nn.Module], **arguments) -> nn.Module:
    """A network of the family `network` for images of 32 x 32 with five classes."""
    model = network(in_size=(32, 32), num_classes=5, **arguments)
    fit_classifier(model, 32)
    return randomize_batch_norm(model)


@pytest.mark.long
@pytest.mark.parametrize("name", PAPER)
def test_networks_of_the_paper(name):
    check_that_it_works(zoo.new_member(name))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_graph_structures(structure):
    network, arguments = STRUCTURES[structure]
    check_that_it_works(small(network, **arguments))


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for name in zoo.MEMBERS if name not in REFUSED and name not in PAPER])
def test_every_family(name):
    check_that_it_works(zoo.new_member(name))


def check_that_it_works(model: nn.Module) -> None:
    """Captured it computes what it did; both quantized models have its layers and parameters, and can be trained."""
    captured = capture(model, channels=zoo.CHANNELS)
    images = torch.randn(2, *captured.image_shape)
    weights = {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    }
    gradients = torch.autograd.grad(model(images).sum(), list(weights.values()), allow_unused=True)
    # MSDNet computes logits at several depths and returns the last.
    layers = [path for path, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    teacher = build_teacher(captured)
    with torch.no_grad():
        logits, expected = teacher(images), model(images)
        if (logits - expected).abs().max() > 1e-5 * expected.abs().max():
            # Many BNs in a row magnify rounding: what is allowed is a multiple of the model's own.
            exact = model.double()(images.double())
            assert (logits - exact).abs().max() < 10 * (expected - exact).abs().max()

    before = dict(captured.module.named_parameters())
    assert list(before) == [path for path, _ in model.named_parameters()]
    for target, student, summary in zoo.train_once(captured, teacher):
        quantized = [entry.name for entry in summary.weights]
        assert not [path for path in layers if not any(f"{name}.".startswith(f"{path}.") for name in quantized)]
        after = dict(student.named_parameters())
        assert after.keys() == before.keys()
        assert any(not torch.equal(value, before[path]) for path, value in after.items())
        assert student(images).isfinite().all()
        if target == "onnx":
            assert max(distinct_inputs(student, images)) <= 16


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_words(name):
    with pytest.raises(GdfqError, match=REFUSED[name]):
        capture(zoo.new_member(name), channels=zoo.CHANNELS)


def test_every_family_is_tried():
    others = {family for families in zoo.OTHER_TASKS.values() for family in families}
    tried = {zoo.family(name) for name in zoo.MEMBERS}
    assert not others & tried
    assert others | tried == {zoo.family(name) for name in model_provider._models}


def test_the_page_has_a_row_for_every_member():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \|.*\| (works|no)\b.*\|$", page, re.MULTILINE)
    assert {name: int(pixels) for _, name, pixels, _ in rows} == zoo.MEMBERS
    assert all(zoo.family(name) == family for family, name, _, _ in rows)
    assert {name for _, name, _, result in rows if result == "no"} == REFUSED.keys()


def test_inception_takes_the_size_that_it_says_of_itself():
    model = load_model("pytorchcv:inceptionv3")
    model.features.init_block.register_forward_pre_hook(lambda *_: 1 / 0)  # the size is all that is asked
    with pytest.raises(GdfqError, match=re.escape("(3, 299, 299)")):
        capture(model)


@pytest.mark.slow
@pytest.mark.zoo
def test_inception_at_its_own_size():
    model = load_model("pytorchcv:inceptionv3")
    captured = capture(model)
    images = torch.randn(2, 3, 299, 299)
    with torch.no_grad():
        torch.testing.assert_close(build_teacher(captured)(images), model(images), rtol=1e-3, atol=1e-4)
    student, _ = build_quantized(captured, QuantizerConfig())
    calibrate(student, [images])
    assert student(images).isfinite().all()


@pytest.mark.parametrize("target", zoo.TARGETS)
def test_channel_shuffle_keeps_the_grid(target):
    model = small(ShuffleNet, channels=[[16, 16]], init_block_channels=8, groups=2)
    images = torch.randn(2, 3, 32, 32)
    student, shuffled = build_quantized(capture(model), QuantizerConfig(target=target))
    calibrate(student, [images])
    # After the stem, each of the two units has three convolutions; the second reads what was shuffled.
    assert max(distinct_inputs(student, images)[2::3][:2]) <= 16
    for unit in (module for module in model.modules() if isinstance(module, ShuffleUnit)):
        unit.c_shuffle = nn.Identity()
    _, plain = build_quantized(capture(model), QuantizerConfig(target=target))
    assert len(shuffled.activations) == len(plain.activations)
    assert [entry.op for entry in shuffled.stayed_float] == [entry.op for entry in plain.stayed_float]


def test_vgg_is_captured_in_a_form_that_takes_channels_last():
    model = randomize_batch_norm(VGG([[2]] * 5, bias=False, use_bn=True, num_classes=5))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(images)
    teacher = build_teacher(capture(model)).to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="view"):  # as it is, it does not
        model.to(memory_format=torch.channels_last)(images)


def test_linear_bottlenecks_are_quantized_in_deploy_alone():
    arguments = {"channels": [[8], [12, 12]], "init_block_channels": 8, "final_block_channels": 16}
    model = small(MobileNetV2, **arguments, remove_exp_conv=False)
    units = {path.replace(".", "_"): module for path, module in model.named_modules() if hasattr(module, "residual")}
    outputs = {f"{path}_conv3_bn" for path in units}
    sums = [path for path, unit in units.items() if unit.residual]
    captured = capture(model)
    fused = {}
    for target in zoo.TARGETS:
        _, summary = build_quantized(captured, QuantizerConfig(target=target))
        fused[target] = {entry.name: entry.fused for entry in summary.activations}
    assert (len(units), len(sums)) == (3, 2)
    assert {fused["onnx"].get(name) for name in outputs} == {"batch_norm"}
    assert [name.partition("_add")[0] for name in fused["onnx"] if "_add" in name] == sums
    assert not outputs & fused["paper"].keys()
    assert set(fused["paper"].values()) == {"batch_norm, relu6"}
