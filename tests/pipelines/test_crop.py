"""Crop windows follow torchvision's RandomResizedCrop."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from unicl_fast.config import DataConfig
from unicl_fast.pipelines.plan.crop import evaluation_regions, random_windows

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def our_windows(
    height: int, width: int, count: int, *, key: int = 3, scale: Any = SCALE, ratio: Any = RATIO
) -> np.ndarray:
    """Top, left, height and width of some draws [count 4]."""
    sides = np.full(count, height), np.full(count, width)
    found = random_windows(*sides, np.arange(count), key=key, scale=scale, ratio=ratio)
    return np.concatenate(found, axis=1)


def torchvision_windows(height: int, width: int, count: int) -> np.ndarray:
    image = torch.empty(3, height, width, device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        windows = [
            RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(count)
        ]
    return np.array(windows)


def largest_gap(one: np.ndarray, other: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov statistic."""
    both = np.unique(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (one, other)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (640, 480), (300, 300), (5, 7)])
@pytest.mark.parametrize("resize", [224, 256, "squash"])
def test_without_drawn_crops_training_shows_what_evaluations_show(height, width, resize):
    data = DataConfig(image_size=224, evaluation_resize=resize)
    sides = np.full(1, height), np.full(1, width)
    (start,), (shape,) = random_windows(
        *sides, np.arange(1), key=3, scale=(1, 1), ratio=(1, 1), part_shown=data.part_shown
    )
    (first,), (end,) = evaluation_regions(*sides, data)
    if resize == "squash":  # training does not distort
        assert shape.tolist() == [min(height, width)] * 2
    else:
        rounding = 1 + min(height, width) / resize  # of the window, and of torchvision's image
        assert np.abs(np.concatenate([start - first, start + shape - end])).max() < rounding


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (64, 300), (700, 60), (5, 7)])
def test_windows_follow_the_law_of_random_resized_crop(height, width):
    count = 4000
    ours = our_windows(height, width, count)
    theirs = torchvision_windows(height, width, count)
    limit = 1.95 * np.sqrt(2 / count)  # passed by chance once in a thousand tests
    for column in range(4):
        assert largest_gap(ours[:, column], theirs[:, column]) < limit
    for one, other in ((0, 2), (1, 3), (2, 3)):  # position and size, height and width together
        assert largest_gap(
            ours[:, one] + 0.618 * ours[:, other], theirs[:, one] + 0.618 * theirs[:, other]
        ) < (limit)


@pytest.mark.parametrize(("height", "width"), [(1, 1000), (1000, 1), (10, 2000), (3000, 20)])
def test_images_too_narrow_for_any_try_get_the_central_window(height, width):
    ours = np.unique(our_windows(height, width, 200), axis=0)
    theirs = np.unique(torchvision_windows(height, width, 200), axis=0)
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("height", "width", "ratio", "expected"),
    [
        (100, 101, 1.0, [0, 0, 100, 100]),  # rounding would let a window of 100 move
        (101, 100, 1.0, [0, 0, 100, 100]),
        (64, 64, 1.0, [0, 0, 64, 64]),
        (90, 300, 1.0, [0, 105, 90, 90]),
        (90, 300, 2.0, [0, 60, 90, 180]),
    ],
)
def test_the_whole_area_in_one_ratio_is_the_central_window_for_every_draw(
    height, width, ratio, expected
):
    whole = {"key": 5, "scale": (1.0, 1.0), "ratio": (ratio, ratio)}
    assert np.unique(our_windows(height, width, 200, **whole), axis=0).tolist() == [expected]


@given(
    height=st.integers(1, 65535),
    width=st.integers(1, 65535),
    key=st.integers(0, 2**64 - 1),
    low=st.floats(0.001, 1.0),
    narrow=st.floats(0.05, 1.0),
)
def test_windows_always_lie_inside(height, width, key, low, narrow):
    laws = {"key": key, "scale": (low, 1.0), "ratio": (narrow, 1 / narrow)}
    starts, shapes = np.hsplit(our_windows(height, width, 50, **laws), 2)
    assert starts.min() >= 0
    assert shapes.min() >= 1
    assert ((starts + shapes) <= [height, width]).all()
