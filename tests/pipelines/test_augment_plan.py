"""The numbers drawn for an image have timm's distributions."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from timm.data import auto_augment as timm_augment

from unicl_fast.augmentation import Augmentation, parse_augmentation
from unicl_fast.pipelines.plan.augment import (
    RAND,
    STAGE_WIDTH,
    TABLE,
    Column,
    Operation,
    Operator,
    draw_rows,
    neutral_rows,
    row_width,
    write_operation,
)

MANY = 15_000
SIDE = 224


def drawn(spec: str, *, count: int = MANY, key: int = 3) -> np.ndarray:
    augmentation = parse_augmentation(spec)
    return draw_rows(
        augmentation, np.arange(count), key=key, image_size=SIDE, stages=augmentation.stages
    )


def stage(rows: np.ndarray, number: int) -> np.ndarray:
    start = Column.STAGES + number * STAGE_WIDTH
    return rows[:, start : start + STAGE_WIDTH]


def row_of(operation: Operation, *, level: float, negate: bool) -> np.ndarray:
    row = np.empty(STAGE_WIDTH, np.float32)
    write_operation(row, TABLE[RAND.index(operation)], level, negate, SIDE)
    return row


def assert_chance(happened: np.ndarray, chance: float) -> None:
    """Within five standard errors."""
    error = math.sqrt(chance * (1 - chance) / len(happened))
    assert abs(happened.mean() - chance) <= 5 * error


def test_each_thing_happens_as_often_as_it_should_and_independently():
    rows = drawn("none,jitter=0.4,hue=0.1,jitter_probability=0.7,grayscale=0.2,erase=0.25")
    jittered = rows[:, Column.BRIGHTNESS] != 1
    grey = rows[:, Column.SATURATION] == 0
    erased = rows[:, Column.ERASED + 2] > 0
    happened = [(jittered, 0.7), (grey, 0.2), (erased, 0.25)]
    for i, (one, chance) in enumerate(happened):
        assert_chance(one, chance)
        for other, other_chance in happened[:i]:
            assert_chance(one & other, chance * other_chance)
    assert np.array_equal(rows[:, Column.IS_TWISTED] == 1, jittered | grey)
    assert (rows[~jittered & ~grey, : Column.ERASED] == neutral_rows(1, stages=0)[0, :5]).all()


def test_jitter_is_uniform_in_its_ranges():
    rows = drawn("none,brightness=0.4,contrast=1.5,saturation=0.2,hue=0.1")
    ranges = {
        Column.BRIGHTNESS: (0.6, 1.4),
        Column.CONTRAST: (0.0, 2.5),
        Column.SATURATION: (0.8, 1.2),
        Column.HUE: (-36.0, 36.0),
    }
    for column, (low, high) in ranges.items():
        positions = np.sort((rows[:, column] - low) / (high - low))
        gap = np.abs(positions - (np.arange(MANY) + 0.5) / MANY).max()
        assert gap < 1.95 / math.sqrt(MANY), column  # Kolmogorov's test at 1 in 1,000


def test_rectangles_lie_in_the_image_and_have_area_and_shape_of_the_config():
    rows = drawn("none,erase=1,erase_area=0.05..0.2,erase_ratio=0.5..2")
    top, left, height, width = rows[:, Column.ERASED : Column.STAGES].T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.maximum(top + height, left + width) <= SIDE).all()
    assert top.min() == left.min() == 0
    area, ratio = height * width / SIDE**2, height / width
    assert 0.049 < area.min() < 0.052
    assert 0.19 < area.max() < 0.202
    assert 0.49 < ratio.min() < 0.51
    assert 1.95 < ratio.max() < 2.05
    assert abs(np.log(ratio).mean()) < 0.02


def test_randaugment_draws_each_operation_equally_often_with_timm_s_strength():
    rows = drawn("none,policy=rand,policy_ops=3,policy_probability=0.6")
    magnitudes = []
    for number in range(3):
        operators = stage(rows, number)[:, 0]
        assert_chance(operators > 0, 0.6)
        counts = Counter(operators.astype(int).tolist())
        share = 0.6 / len(RAND)
        for operator in set(counts) - {0}:
            expected = share * sum(operation.operator == operator for operation in RAND)
            assert_chance(operators == operator, expected)
        factors = stage(rows, number)[operators == Operator.BRIGHTNESS, 1]
        assert_chance(factors > 1, 0.5)
        magnitudes.append(np.abs(factors[factors > 1] - 1) / 0.09)
    magnitude = np.concatenate(magnitudes)
    below = magnitude[magnitude < 9.99]  # the others are cut off at 10
    assert abs(np.median(magnitude) - 9) < 0.05
    assert abs((9 - below[below < 9]).std() / (0.5 * math.sqrt(1 - 2 / math.pi)) - 1) < 0.1
    assert 0.01 < (magnitude > 9.99).mean() < 0.04  # one in 44 lies two deviations above


TIMM_NAMES = {
    **{name: f"{name}Increasing" for name in ("Brightness", "Contrast", "Color", "Sharpness")},
    **{name: f"{name}Increasing" for name in ("Posterize", "Solarize")},
    **{name: f"{name}Rel" for name in ("TranslateX", "TranslateY")},
}


def matrix_of(name: str, value: float) -> list[float]:
    if name == "Rotate":
        angle = math.radians(value)
        cosine, sine = math.cos(angle), math.sin(angle)
        half = SIDE / 2
        return [cosine, -sine, half * (1 - cosine + sine), sine, cosine, half * (1 - sine - cosine)]
    scale = SIDE if name.startswith("Translate") else 1
    number = {"ShearX": 1, "ShearY": 3, "TranslateX": 2, "TranslateY": 5}[name]
    matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    matrix[number] = value * scale
    return matrix


@pytest.mark.parametrize("level", [0.0, 0.31, 0.9, 0.95])
@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("operation", RAND, ids=lambda operation: operation.name)
def test_randaugment_s_strengths_are_timm_s(operation, level, negate, monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 1.0 if negate else 0.0)
    name = TIMM_NAMES.get(operation.name, operation.name)
    rule = timm_augment.LEVEL_TO_ARG[name]
    theirs = rule(10 * level, {})[0] if rule else 0.0
    row = row_of(operation, level=level, negate=negate)
    assert row[0] == operation.operator
    if operation.operator == Operator.WARP:
        assert np.allclose(row[1:], matrix_of(operation.name, theirs), atol=2e-4)
    elif operation.operator == Operator.POSTERIZE:
        assert row[1] == 256 - 2 ** (8 - max(theirs, 1))  # with no bit left images are black
    else:
        assert row[1] == pytest.approx(theirs, abs=1e-5)


def test_rows_are_functions_of_key_and_draw():
    augmentation = parse_augmentation("unicl,grayscale=0.2")
    whole = drawn("unicl,grayscale=0.2", count=100)
    draws = np.array([77, 3, 50])
    part = draw_rows(augmentation, draws, key=3, image_size=SIDE, stages=4)
    assert np.array_equal(part[:, : whole.shape[1]], whole[draws])
    assert not part[:, whole.shape[1] :].any()
    other = drawn("unicl,grayscale=0.2", count=100, key=4)
    assert (other[:, Column.BRIGHTNESS] != whole[:, Column.BRIGHTNESS]).all()


def test_without_augmentation_there_are_no_rows():
    clip = parse_augmentation("clip")
    assert row_width([Augmentation(), clip]) == 0
    assert row_width([clip, parse_augmentation("none,grayscale=0.1")]) == Column.STAGES
