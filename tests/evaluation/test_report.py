"""Intervals and confusions: what reports say, apart from how they are drawn."""

from __future__ import annotations

import math

import numpy as np

from unicl_fast.evaluation.report import most_confused, wilson_interval


def test_intervals_cover_as_often_as_they_say() -> None:
    trials, rate = 200, 0.3
    covered = 0.0
    for right in range(trials + 1):
        low, high = wilson_interval(right, trials)
        probability = math.comb(trials, right) * rate**right * (1 - rate) ** (trials - right)
        covered += probability * (low <= rate <= high)
    assert 0.93 < covered < 0.97
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1


def test_mistakes_are_listed_by_their_number_and_go_from_class_to_what_it_was_taken_for() -> None:
    confusion = np.array([[5, 3, 0], [1, 8, 1], [0, 4, 0]])
    assert most_confused(confusion, ("dog", "cat", "hen")) == [
        ("hen", "cat", 4, 1.0),
        ("dog", "cat", 3, 3 / 8),
        ("cat", "dog", 1, 1 / 10),
        ("cat", "hen", 1, 1 / 10),
    ]
    assert [row[2] for row in most_confused(confusion, ("dog", "cat", "hen"), count=2)] == [4, 3]
