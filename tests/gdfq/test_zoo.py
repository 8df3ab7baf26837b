"""pytorchcv's classification networks, one of every family: captured, quantized in both placements, trained once.

The default run has the paper's networks and one of each graph structure. All others: pytest -m zoo tests/gdfq/test_zoo.py
"""

import pytest
import torch
from pytorchcv import model_provider
from pytorchcv.models.mobilenetv2 import MobileNetV2
from pytorchcv.models.shufflenet import ShuffleNet
from pytorchcv.models.vgg import VGG
from small_models import randomize_batch_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import zoo
from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture
from gdfq.modules import activation_quantizers

aten = torch.ops.aten

PAPER = [
    "resnet20_cifar10", "resnet20_cifar100", "resnet18", "bn_vgg16", "inceptionv3", "resnet50", "mobilenetv2_w1",
    "shufflenet_g1_w1",
]  # fmt: skip
STRUCTURES = {
    "seresnet10": "a gate computed from the whole map (SE)",
    "densenet40_k12_bc_cifar10": "pre-activation, concatenation of all that came before",
    "shufflenetv2_wd2": "split, shuffle, concatenation",
    "espnetv2_wd2": "PReLU, dilated branches, the image read at several depths",
    "channelnet": "Conv3d over channels beside Conv2d",
    "diaresnet10": "one recurrent cell shared by all units of a stage",
    "octresnet10_ad2": "weights that the graph computes, maps of two sizes",
    "isqrtcovresnet18": "matrix products, writing into slices",
}
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


def members(default: list[str]) -> list:
    """All that are not refused; those that are not in `default` only with `-m zoo`."""
    return [
        pytest.param(name, id=name, marks=[] if name in default else pytest.mark.zoo)
        for name in zoo.MEMBERS
        if name not in REFUSED
    ]


class InputsOfLayers(TorchDispatchMode):
    """Counts the distinct values in the input of every convolution and linear layer that runs, whatever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.distinct: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = {aten.convolution.default: 0, aten.addmm.default: 1, aten.mm.default: 0}.get(func)
        if place is not None:
            self.distinct.append(len(args[place].unique()))
        return func(*args, **(kwargs or {}))


def distinct_inputs(student: nn.Module, images: torch.Tensor) -> list[int]:
    with torch.no_grad(), InputsOfLayers() as inputs:
        student(images)
    return inputs.distinct


def quantized(model: nn.Module, images: torch.Tensor, placement: str) -> tuple[nn.Module, list[str]]:
    """Q with its ranges observed on `images`, and the names of what is quantized."""
    student, account = build_quantized(capture(model), QuantizerConfig(placement=placement))
    calibrate(student, [images])
    return student, [entry.name for entry in account.activations]


@pytest.mark.slow
@pytest.mark.parametrize("name", members([*PAPER, *STRUCTURES]))
def test_is_captured_quantized_and_trained(name):
    model = zoo.new_member(name)
    captured = zoo.capture_member(name, model)
    images = torch.randn(2, *captured.image_shape)
    called = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.register_forward_pre_hook(lambda module, args, path=path: called.add(path))
    with torch.no_grad():
        logits, exact = model(images), model.double()(images.double())
    # Many BNs in a row magnify rounding: what is allowed is a multiple of what the model itself does.
    rounding = (logits - exact).abs().max()
    assert (build_teacher(captured)(images) - exact).abs().max() < 10 * rounding

    parameters = dict(model.named_parameters())
    for placement, trainer, account in zoo.train_once(captured):
        student = trainer.student
        assert {entry.name for entry in account.weights} >= called
        trained = dict(student.named_parameters())
        assert {path: value.shape for path, value in trained.items()} == {
            path: value.shape for path, value in parameters.items()
        }
        assert any(not torch.equal(value, parameters[path]) for path, value in trained.items())
        assert student(images).isfinite().all()
        if placement == "deploy":
            assert max(distinct_inputs(student, images)) <= 16


@pytest.mark.zoo
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_words(name):
    with pytest.raises(GdfqError, match=REFUSED[name]):
        zoo.capture_member(name, zoo.new_member(name))


def test_every_family_is_tried():
    others = {family for families in zoo.OTHER_TASKS.values() for family in families}
    tried = {zoo.family(name) for name in zoo.MEMBERS}
    assert not others & tried
    assert others | tried == {zoo.family(name) for name in model_provider._models}


def test_the_page_has_a_row_for_every_member():
    pass
