"""Accuracy against counts made by hand."""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from gdfq.data import load_dataset
from gdfq.errors import GdfqError
from gdfq.evaluate import evaluate


class Reads(nn.Module):
    """The first pixels of the image are the logits."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return x.flatten(1)[:, : self.classes]


def dataset_with_ranks(ranks: list[int], classes: int) -> TensorDataset:
    """Image i gives its right class the rank `ranks[i]` among the logits, 0 being the most likely."""
    torch.manual_seed(0)
    images, labels = torch.zeros(len(ranks), 1, 4, 4), []
    for image, rank in zip(images, ranks, strict=True):
        order = torch.randperm(classes)
        image.view(-1)[order] = torch.linspace(1, -1, classes)
        labels.append(int(order[rank]))
    return TensorDataset(images, torch.tensor(labels))


@pytest.mark.parametrize("batch_size", [1, 3, 256])
@pytest.mark.parametrize("channels_last", [True, False])
def test_counts(batch_size, channels_last):
    dataset = dataset_with_ranks([0, 0, 0, 1, 4, 5, 9], classes=10)
    result = evaluate(Reads(10), dataset, batch_size=batch_size, channels_last=channels_last, num_classes=10)
    assert result.top1 == pytest.approx(100 * 3 / 7)
    assert result.top5 == pytest.approx(100 * 5 / 7)
    assert result.images == 7
    assert result.seconds > 0


def test_fewer_than_five_classes():
    result = evaluate(Reads(3), dataset_with_ranks([0, 1, 2, 2], classes=3))
    assert (result.top1, result.top5) == (25, 100)


def test_half_precision_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).bfloat16()
    assert evaluate(model, TensorDataset(torch.randn(4, 1, 4, 4), torch.zeros(4).long())).images == 4


def test_progress_goes_to_standard_error(capsys):
    evaluate(Reads(10), dataset_with_ranks([0], 10), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "evaluating" in captured.err


def test_training_flags_come_back_and_statistics_stay():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(16, 10)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = dataset_with_ranks([0] * 4, 10)
    assert evaluate(model, dataset).top1 == evaluate(model, dataset).top1
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_exported_graph():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (torch.zeros(2, 1, 4, 4),), dynamic_shapes=({0: batch},)).module()
    with pytest.raises(NotImplementedError):
        exported.eval()
    dataset = dataset_with_ranks([0, 1, 2, 3, 4], 10)
    assert evaluate(exported, dataset, channels_last=False).top1 == evaluate(model, dataset).top1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    dataset = dataset_with_ranks([0, 0], 10)
    dataset.tensors[0][1, 0, 0, 0] = value
    with pytest.raises(GdfqError, match="NaN or Inf"):
        evaluate(Reads(10), dataset)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Reads(3), r"the label 9, but the model knows only 3 classes \(0\.\.2\)"),
        (nn.Identity(), r"returns a tensor \(images, classes\); this one, for 2 images: \(2, 1, 4, 4\)"),
        (nn.Conv2d(3, 10, 1), r"rejects images of shape \(1, 4, 4\)"),
    ],
)
def test_models_that_do_not_fit(model, message):
    dataset = TensorDataset(torch.zeros(2, 1, 4, 4), torch.tensor([0, 9]))
    model.train()
    with pytest.raises(GdfqError, match=message):
        evaluate(model, dataset)
    assert model.training


def test_class_count_that_does_not_fit():
    with pytest.raises(GdfqError, match="returns 10 logits, but 100 classes"):
        evaluate(Reads(10), dataset_with_ranks([0], 10), num_classes=100)


def test_another_number_of_classes_than_the_models_is_said():
    dataset = dataset_with_ranks([0, 0], 10)
    dataset.classes = ("cat", "dog")
    with pytest.warns(UserWarning, match="the data have 2 classes, but the model knows 10") as caught:
        evaluate(Reads(10), dataset, batch_size=1)
    assert len(caught) == 1


def test_no_images():
    with pytest.raises(GdfqError, match="no images"):
        evaluate(Reads(10), TensorDataset(torch.zeros(0, 1, 4, 4), torch.zeros(0)))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named_in_one_line(tmp_path, workers):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "good.png")
    (tmp_path / "cat" / "poor.png").write_bytes(b"no image")
    dataset = load_dataset(tmp_path, resize=8, crop=8)
    with pytest.raises(GdfqError) as caught:
        evaluate(Reads(3), dataset, workers=workers)
    assert str(caught.value).startswith(f"cannot decode the image {tmp_path / 'cat' / 'poor.png'}")
    assert "\n" not in str(caught.value)
