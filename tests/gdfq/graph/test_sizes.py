"""Images of another size than the model was captured at, and any batch: right, or refused in words."""

import copy
import io

import pytest
import torch
from small_models import Plain, Residual, TwoHeads, Unusual, capture_once, randomize_batch_norm
from torch import nn
from torch.nn import functional as F

import gdfq
from gdfq.calibrate import calibrate
from gdfq.config import QuantizerConfig
from gdfq.errors import GdfqError
from gdfq.graph import build_quantized, build_teacher, capture


class Headed(Plain):
    """`Plain` with another way from the image to the features, and from there to the logits."""

    def features(self, x):
        return self.relu(self.bn(self.conv(x)))


class PooledByHand(Headed):
    def forward(self, x):
        x = self.features(x)
        return self.fc(x.sum((2, 3)) / (x.shape[2] * x.shape[3]))


class ShuffledByHand(Headed):
    def forward(self, x):
        x = self.features(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class PaddedToFour(Headed):
    def forward(self, x):
        return super().forward(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))


class OtherwiseAboveSixteen(Headed):
    def forward(self, x):
        return super().forward(x * 2 if x.shape[2] > 16 else x)


class CountsInPython(Headed):
    def forward(self, x):
        return super().forward(x * int(x.shape[2] * 0.3))


class Flattened(Headed):
    """Takes 8 x 8 and 15 x 15, and all between."""

    def forward(self, x):
        return self.fc(F.avg_pool2d(self.features(x), 8).flatten(1))


class FlattenedByView(Headed):
    """A model that itself takes other images for others' logits."""

    def forward(self, x):
        return self.fc(F.avg_pool2d(self.features(x), 8).view(-1, 8))


class Squeezed(Headed):
    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).squeeze())


class OtherwiseAlone(Headed):
    def forward(self, x):
        return super().forward(x * 2 if x.shape[0] == 1 else x)


class OtherwiseInLargeBatches(Headed):
    def forward(self, x):
        return super().forward(x * 2 if x.shape[0] > 4 else x)


class RemembersTheSize(Headed):
    """What torch.export does not see: the size is kept as a number from the first call."""

    scale = None

    def forward(self, x):
        self.scale = self.scale or int(x.shape[2])
        return super().forward(x / self.scale)


class KeepsAMap(Headed):
    """A map by size, made when a size is first seen."""

    def __init__(self):
        super().__init__()
        self.maps = {}

    def forward(self, x):
        size = (int(x.shape[2]), int(x.shape[3]))
        if size not in self.maps:
            self.maps[size] = torch.linspace(0, 1, size[0] * size[1]).view(size)
        return super().forward(x + self.maps[size])


class UpAndDown(Headed):
    def forward(self, x):
        return super().forward(x + F.interpolate(F.max_pool2d(x, 2), size=x.shape[2:], mode="bilinear"))


SIZES = [(8, 8), (9, 12), (15, 15), (16, 16), (32, 20), (4, 4), (1, 1), (40, 72)]
ANY = set(SIZES)
MODELS = {  # and the sizes that must work
    Plain: ANY, Residual: ANY - {(1, 1)}, TwoHeads: {(8, 8), (16, 16), (32, 20)}, Unusual: {(8, 8), (16, 16), (9, 12)},
    PooledByHand: ANY, ShuffledByHand: ANY - {(1, 1)}, PaddedToFour: ANY, OtherwiseAboveSixteen: {(8, 8), (16, 16)},
    CountsInPython: {(8, 8), (9, 12)}, Flattened: {(8, 8), (9, 12), (15, 15)}, FlattenedByView: {(8, 8)},
    Squeezed: ANY, OtherwiseAlone: ANY, OtherwiseInLargeBatches: ANY, RemembersTheSize: {(8, 8)}, KeepsAMap: {(8, 8)},
    UpAndDown: {(8, 8), (16, 16)},
}  # fmt: skip
BATCHES = {Squeezed: {2, 3, 7}, OtherwiseAlone: {2, 3, 7}, OtherwiseInLargeBatches: {1, 2, 3}}


def answer(model: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The logits; None: refused."""
    try:
        return model(x)
    except GdfqError:
        return None


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS)
def test_other_sizes_and_batches_are_right_or_refused(make):
    model = randomize_batch_norm(make())
    captured = capture(copy.deepcopy(model))
    teacher = build_teacher(captured)
    student, _ = build_quantized(captured, QuantizerConfig(weight_bits=8, activation_bits=8))
    calibrate(student, [torch.randn(3, 3, 8, 8)])
    for size in SIZES:
        for n in (1, 2, 3, 7):
            x = torch.randn(n, 3, *size)
            logits = answer(teacher, x)
            if size in MODELS[make] and n in BATCHES.get(make, {1, 2, 3, 7}):
                assert logits is not None, (size, n)
            assert (answer(student, x) is None) == (logits is None)
            if logits is not None:
                expected = copy.deepcopy(model)(x)
                torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4, msg=f"{size}, {n} images")
    if make is RemembersTheSize or make is KeepsAMap:
        assert answer(teacher, torch.randn(2, 3, 16, 16)) is None


def refusal(model: nn.Module, shape: tuple[int, ...]) -> str:
    with pytest.raises(GdfqError) as error:
        model(torch.randn(shape))
    return str(error.value)


def test_what_is_refused_is_said_in_words():
    teacher = build_teacher(capture_once(CountsInPython))
    assert "16 x 12 were given" in (words := refusal(teacher, (2, 3, 16, 12)))
    assert "captured for 8 x 8" in words
    assert "image_size=(16, 12)" in words
    assert "takes (N, 3, H, W)" in refusal(teacher, (2, 4, 8, 8))
    assert "takes (N, 3, H, W)" in refusal(teacher, (3, 8, 8))
    alone = build_teacher(capture_once(OtherwiseAlone))
    assert "a single image was given" in refusal(alone, (1, 3, 8, 8))
    large = build_teacher(capture_once(OtherwiseInLargeBatches))
    assert "5 images of 8 x 8 were given at once" in refusal(large, (5, 3, 8, 8))


class SplitsTheBatch(Plain):
    def forward(self, x):
        return super().forward(x).view(2, -1)


class TakesItsLength(Plain):
    def forward(self, x):
        return super().forward(x).view(len(x), -1)


@pytest.mark.parametrize("make", [SplitsTheBatch, TakesItsLength])
def test_a_graph_for_one_batch_size_is_refused_at_once(make):
    with pytest.raises(GdfqError, match="nor may it depend on the batch size"):
        capture_once(make)


class DropsAlways(Plain):
    def forward(self, x):
        return super().forward(F.dropout(x))


def test_random_logits_are_refused_in_words():
    with pytest.raises(GdfqError, match=r"in eval mode: something in it is random"):
        capture_once(DropsAlways)


def quantized(make) -> nn.Module:
    student, _ = build_quantized(capture_once(make), QuantizerConfig())
    calibrate(student, [torch.randn(8, 3, 8, 8)])
    return student.requires_grad_(False)


@pytest.mark.parametrize("make", [PooledByHand, CountsInPython])
def test_a_copy_a_pickle_and_a_stored_model_refuse_the_same(make, tmp_path):
    student = quantized(make)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    path = tmp_path / "model.safetensors"
    gdfq.save_quantized(path, student, QuantizerConfig(), (3, 8, 8))
    for other in (
        copy.deepcopy(student), torch.load(file, weights_only=False), gdfq.load_quantized(path, make().eval()),
    ):  # fmt: skip
        for size in SIZES:
            x = torch.randn(2, 3, *size)
            found, expected = answer(other, x), answer(student, x)
            assert (found is None) == (expected is None)
            assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("make", [PooledByHand, CountsInPython])
def test_the_result_can_be_exported_and_compiled(make):
    student = quantized(make)
    x = torch.randn(3, 3, 8, 8)
    program = torch.export.export(student, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.equal(program.module()(x), student(x))
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), student(x))
    assert answer(student, torch.randn(2, 3, 16, 16)) is None or make is PooledByHand
