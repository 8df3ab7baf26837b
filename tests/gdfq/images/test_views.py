"""Crops pixel by pixel in float64; how often, how large and where they are; flips."""

import math

import pytest
import torch

from gdfq.images.views import Views, cropped


def cropped_by_hand(x: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """The center of each pixel of the result is looked up between the four nearest centers of the crop."""
    result = torch.empty(x.shape, dtype=torch.float64)

    def neighbors(index: int, size: int, full: int):
        place = min(max((index + 0.5) * size / full - 0.5, 0), size - 1)
        low = math.floor(place)
        return (low, 1 - (place - low)), (min(low + 1, size - 1), place - low)

    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            result[:, :, i, j] = sum(
                a * b * x[:, :, top + row, left + column].double()
                for row, a in neighbors(i, height, x.shape[2])
                for column, b in neighbors(j, width, x.shape[3])
            )
    return result


@pytest.mark.parametrize("place", [(0, 0, 6, 5), (1, 2, 4, 3), (5, 4, 1, 1), (2, 0, 3, 5)])
def test_a_crop_is_enlarged_between_its_pixels(place):
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(cropped(x, *place).double(), cropped_by_hand(x, *place), rtol=1e-5, atol=1e-5)


def test_half_of_the_views_are_flipped():
    x = torch.randn(2, 3, 4, 5)
    views = Views(None, True, torch.Generator().manual_seed(0))
    mirrored = x[..., [4, 3, 2, 1, 0]]
    seen = [views(x) for _ in range(200)]
    flipped = sum(torch.equal(view, mirrored) for view in seen)
    assert flipped + sum(torch.equal(view, x) for view in seen) == 200
    assert 70 < flipped < 130


def test_crops_are_of_all_areas_and_places_within_the_image():
    views = Views(0.4, False, torch.Generator().manual_seed(0))
    places = [views._place(40, 60) for _ in range(500)]
    areas = [height * width / 2400 for _, _, height, width in places]
    ratios = [(width / 60) / (height / 40) for _, _, height, width in places]
    assert all(0 <= top <= 40 - height and 0 <= left <= 60 - width for top, left, height, width in places)
    assert 0.37 < min(areas) < 0.45
    assert 0.95 < max(areas) <= 1
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    assert {top for top, *_ in places} >= set(range(10))
    assert any(top + height == 40 and height < 40 for top, _, height, _ in places)


def test_half_of_the_views_are_cut():
    x = torch.randn(2, 3, 9, 9)
    views = Views(0.1, False, torch.Generator().manual_seed(1))
    assert 70 < sum(torch.equal(views(x), x) for _ in range(200)) < 130


def test_without_either_images_stay():
    x = torch.randn(2, 3, 4, 4)
    assert Views(None, False, torch.Generator())(x) is x
