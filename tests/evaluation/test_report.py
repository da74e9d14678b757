"""Intervals, confusions and tables of results."""

import json
import math
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from damage import HOSTILE
from sklearn.metrics import average_precision_score

from unicl_fast.evaluation.report import (
    ClassificationCounts,
    average_precisions,
    classification_table,
    wilson_interval,
)
from unicl_fast.system.wording import markdown_table
from unicl_fast.tools.evaluate.figures import most_confused
from unicl_fast.tools.evaluate.knn import Knn


def test_average_precision_is_scikit_learn_s_and_chance_that_of_shuffled_images():
    """Over images with none, one or several of four classes, one of which has no image."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    labels = [[one for one in range(3) if (row >> one) % 4 == 0] for row in range(40)]
    result = average_precisions(scores, labels, ("a", "b", "c", "d"))
    kept = [row for row, own in enumerate(labels) if own]
    truth = np.array([[one in labels[row] for one in range(3)] for row in kept])
    expected = [
        average_precision_score(truth[:, one], scores[kept, one].numpy()) for one in range(3)
    ]
    assert [name for name, _, _ in result.per_class] == ["a", "b", "c"]
    assert [count for _, count, _ in result.per_class] == truth.sum(axis=0).tolist()
    assert [one for _, _, one in result.per_class] == pytest.approx(expected)
    assert result.to_json()["mean"] == pytest.approx(np.mean(expected))
    draws = (torch.rand(40, 4, generator=generator) for _ in range(1000))
    shuffled = [average_precisions(draw, labels, "abcd").mean for draw in draws]
    assert np.mean(shuffled) == pytest.approx(result.chance, rel=0.02)
    assert f"of 3 classes over {len(kept)} samples" in result.to_table()


def test_a_table_says_which_classes_it_measured_and_which_are_worst_and_best():
    counts = ClassificationCounts("abcdefghi")
    labels = [[0, 8], [0, 8], [1, 8], [2], [2], [3], [3], [3], [4], [5], [6]]
    counts.add([[0], [0], [1], [2], [0], [0], [0], [0], [4], [5], [6]], labels)
    *_, measured, each = counts.result(what="").to_table().splitlines()
    assert measured == "11 samples, 7 of 9 classes: the other 2 are no sample's first label"
    assert each == "worst to best: d 0 of 3, c 1 of 2, a 2 of 2, ..., e 1 of 1, f 1 of 1, g 1 of 1"
    counts = ClassificationCounts(["a\ud800\a", "b"])
    counts.add([[1], [1]], [[0], [1]])
    measured, each = counts.result(what="").to_table().encode().decode().splitlines()[-2:]
    assert measured == "2 samples, 2 classes"
    assert each == r"worst to best: a\ud800\x07 0 of 1, b 1 of 1"


def test_intervals_cover_as_often_as_they_say():
    trials, rate = 200, 0.3
    covered = 0.0
    for right in range(trials + 1):
        low, high = wilson_interval(right, trials)
        probability = math.comb(trials, right) * rate**right * (1 - rate) ** (trials - right)
        covered += probability * (low <= rate <= high)
    assert 0.93 < covered < 0.97
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1


def test_mistakes_are_listed_by_number_from_class_to_prediction():
    counts = ClassificationCounts(("dog", "cat", "hen"))
    for own, row in enumerate(([5, 3, 0], [1, 8, 1], [0, 4, 0])):
        for taken, number in enumerate(row):
            counts.add([[taken]] * number, [[own]] * number)
    result = counts.result(what="this")
    assert most_confused(result) == [
        ("hen", "cat", 4, 1.0), ("dog", "cat", 3, 3 / 8),
        ("cat", "dog", 1, 1 / 10), ("cat", "hen", 1, 1 / 10),
    ]  # fmt: skip
    assert [row[2] for row in most_confused(result, count=2)] == [4, 3]


def test_texts_of_users_are_written_unchanged_and_are_no_markup(tmp_path, monkeypatch):
    """tests/training/test_figures.py has how they are drawn."""
    names = (*HOSTILE, "a | b")
    counts = ClassificationCounts(names)
    counts.add([[0]] * len(names), [[number] for number in range(len(names))])
    result = counts.result(what="this")
    sums = iter("0")  # which is asked for once, when the model is loaded
    monkeypatch.setattr("unicl_fast.conversion.sources.weights_checksum", lambda *_: next(sums))
    monkeypatch.setattr("unicl_fast.evaluation.features.model_on_ranks", MagicMock())
    command = Knn(
        checkpoint=tmp_path, train="x", data="y",
        json=tmp_path / "values.json", markdown=tmp_path / "table.md",
    )  # fmt: skip
    table = classification_table([(name, "top1", result) for name in names])
    with command.model():
        assert not [*sums]
    command.write(result.to_json(), table)
    values = json.loads((tmp_path / "values.json").read_text())
    assert [row["class"] for row in values["per_class"]] == list(names)
    assert table in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert len({line.count(" | ") for line in table.replace("\\|", "").splitlines()}) == 1
    table = markdown_table(["data set"], [["<b>a|b</b> $x$ *y* `z` [w] \\ &amp;\n1"]])
    cell = r"| \<b>a\|b\</b> \$x\$ \*y\* \`z\` \[w] \\ \&amp; 1 |"
    assert table.splitlines()[2] == cell
