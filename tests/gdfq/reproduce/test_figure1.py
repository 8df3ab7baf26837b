"""The toy experiment: its distance against scipy, its figures by hand, and what the picture is there to show."""

import json
import math

import pytest
import torch
from PIL import Image
from scipy import stats

from gdfq.errors import GdfqError
from gdfq.reproduce.figure1 import (
    LabeledPoints,
    PointGenerator,
    compare,
    energy_distance,
    figure1,
    labelling_rule,
    real_points,
    to_images,
    to_points,
)

SCALE = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figure1") / "made"


@pytest.fixture(scope="module")
def result(folder):
    return figure1(folder, scale=SCALE)


@pytest.mark.parametrize("sizes", [(40, 40), (7, 31), (1, 1)])
def test_energy_distance_on_a_line_is_scipys(sizes):
    x, y = torch.randn(sizes[0], dtype=torch.float64), 2 * torch.randn(sizes[1], dtype=torch.float64) + 1
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    ours = energy_distance(x[:, None] * direction, y[:, None] * direction)
    assert ours == pytest.approx(stats.energy_distance(x.numpy(), y.numpy()), rel=1e-9)


def test_energy_distance_of_two_points_and_of_a_sample_to_itself():
    assert energy_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])) == pytest.approx(math.sqrt(2 * 5))
    sample = torch.randn(100, 2)
    assert energy_distance(sample, sample.flip(0)) == pytest.approx(0, abs=1e-7)


def test_labels_are_the_side_of_the_curve():
    points = torch.tensor([[0.0, 0.1], [0.0, -0.1], [2.0, 2.1], [2.0, 1.9], [-2.0, -1.9], [-2.0, -2.1], [4.0, 0.1]])
    assert labelling_rule(points).tolist() == [1, 0, 1, 0, 1, 0, 1]


def test_real_points_fill_the_square_and_are_normalised_images():
    points, labels = real_points()
    assert points.abs().max() <= 4
    assert labels.float().mean() == pytest.approx(0.5, abs=0.05)
    images = to_images(points)
    assert images.shape == (len(points), 2, 1, 1)
    torch.testing.assert_close(images.mean(0), torch.zeros(2, 1, 1), atol=0.1, rtol=0)
    torch.testing.assert_close(images.var(0), torch.ones(2, 1, 1), atol=0.1, rtol=0)
    torch.testing.assert_close(to_points(images), points)


def test_comparison_by_hand():
    """The classifier says 1 right of x = 0, with a probability of 0.9 from log(9) / 4 on."""

    def classifier(images):
        x = to_points(images)[:, 0]
        return torch.stack([torch.zeros_like(x), 4 * x], 1)

    points = torch.tensor([[1.0, 3.0], [-1.0, -3.0], [-0.5, 3.0], [5.0, -2.0], [1.0, -3.0]])
    data = LabeledPoints(points, torch.tensor([1, 0, 1, 1, 1]))
    moved = data._replace(points=points + torch.tensor([3.0, 4.0]))
    figures = compare(classifier, data, moved)
    assert figures["label_by_classifier"] == 0.8  # the third is left of 0
    assert figures["label_by_rule"] == 0.6  # the last two are below the curve
    assert figures["near_boundary"] == 0.2  # the third alone, at 0.5 < log(9) / 4 = 0.549
    assert figures["inside_square"] == 0.8  # the fourth is at x = 5
    distances = figures["energy_distance"]
    assert distances["classes"][0] == pytest.approx(math.sqrt(2 * 5))  # one point, moved by 5
    assert distances["class_mean"] == pytest.approx(sum(distances["classes"]) / 2)
    assert distances["all"] == pytest.approx(energy_distance(points, moved.points))


def test_generator_makes_normalised_points_that_depend_on_the_label():
    generator = PointGenerator(16)
    noise, labels = torch.randn(500, 16), torch.randint(2, (500,))
    images = generator(noise, labels)
    assert images.shape == (500, 2, 1, 1)
    torch.testing.assert_close(images.mean(0), torch.zeros(2, 1, 1), atol=1e-3, rtol=0)
    torch.testing.assert_close(images.var(0, correction=0), torch.ones(2, 1, 1), atol=0.02, rtol=0)
    assert not torch.equal(generator.eval()(noise, labels), generator(noise, 1 - labels))


def test_generated_points_carry_their_labels(result):
    assert result["classifier_accuracy"] > 0.97
    figures = result["methods"]["gdfq"]
    assert figures["label_by_classifier"] > 0.9
    assert figures["label_by_rule"] > 0.9
    for method in ("gaussian", "zeroq"):
        assert result["methods"][method]["label_by_classifier"] == 1
        assert result["methods"][f"{method}_random_labels"]["label_by_rule"] == pytest.approx(0.5, abs=0.05)


def test_generated_points_are_nearer_to_the_real_ones_than_noise(result):
    distance = {method: figures["energy_distance"] for method, figures in result["methods"].items()}
    assert distance["real"]["class_mean"] < distance["gdfq"]["class_mean"] < distance["gaussian"]["class_mean"]
    assert distance["gdfq"]["all"] < distance["gaussian"]["all"]
    assert distance["gdfq"]["class_mean"] < distance["zeroq_random_labels"]["class_mean"] / 2


def test_picture_and_figures_are_written(result, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["figure1.json", "figure1.png"]
    assert json.loads((folder / "figure1.json").read_text()) == result
    with Image.open(folder / "figure1.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1400, 420)
        assert len(picture.convert("RGB").getcolors(2**20)) > 100


def test_seeds_give_equal_figures_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, second, other = (figure1(None, seed, scale=0.005)["methods"] for seed in (3, 3, 4))
    assert first == second
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_above_zero(scale):
    with pytest.raises(GdfqError, match="scale is"):
        figure1(None, scale=scale)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GdfqError, match="cannot write"):
        figure1(tmp_path / "file" / "out", scale=0.001)
