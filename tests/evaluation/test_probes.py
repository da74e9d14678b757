"""Linear probe and nearest neighbours, on features whose answers are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from unicl_fast.evaluation import probes
from unicl_fast.evaluation.labelled import LabelledFeatures, with_labels
from unicl_fast.evaluation.probes import (
    C_GRID,
    DEFAULT_C,
    linear_probe,
    nearest_neighbours,
)
from unicl_fast.evaluation.report import ClassificationCounts

NAMES = ("a", "b", "c", "d", "e", "f")


def clusters(n: int, *, seed: int, spread: float = 2.0, num_classes: int = 6) -> LabelledFeatures:
    """Overlapping clusters whose features have a mean and scales of their own, as real ones do."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_classes, 12))
    labels = generator.integers(0, num_classes, n)
    noise = generator.normal(size=(n, 12))
    features = (centres[labels] + spread * noise) * np.logspace(-1, 1, 12) + 3
    rows = [[int(label)] for label in labels]
    return with_labels(features, rows, name="clusters", class_names=NAMES[:num_classes])


def balanced(per_class: int, *, seed: int) -> LabelledFeatures:
    """`per_class` samples of each of six classes, overlapping in 12 dimensions."""
    samples = clusters(60 * per_class, seed=seed, spread=1.5)
    rows = np.concatenate([np.flatnonzero(samples.labels == k)[:per_class] for k in range(6)])
    return samples.take(rows)


@pytest.fixture
def few_cs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes six values of C, none of them where a fit takes a thousand iterations."""
    monkeypatch.setattr(probes, "C_GRID", C_GRID[2:18:3])


def right_by(classifier: object, test: LabelledFeatures) -> int:
    return int((classifier.predict(test.features) == test.labels).sum())  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_classes", [6, 2])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_a_given_c_is_scikit_learns_on_all_samples(c: float, num_classes: int) -> None:
    train = clusters(400, seed=0, num_classes=num_classes)
    test = clusters(300, seed=1, num_classes=num_classes)
    result = linear_probe(train, test, c=c)
    theirs = LogisticRegression(C=c, max_iter=1000).fit(train.features, train.labels)
    assert result.classes.num_correct == right_by(theirs, test)
    assert result.classes.num_samples == 300
    best = np.argsort(-theirs.predict_proba(test.features), axis=1)[:, :5]
    in_five = (best == test.labels[:, None]).any(axis=1).sum()
    assert result.classes.num_correct_top5 == in_five
    assert sum(count for _, _, count in result.classes.taken_for) == 300
    assert (result.c, result.chosen_by, result.num_fitted) == (c, "given", 400)


@pytest.mark.usefixtures("few_cs")
def test_a_probe_takes_the_c_that_validates_best_and_fits_both_parts() -> None:
    data, validation = clusters(60, seed=0, spread=4.0), clusters(200, seed=1, spread=4.0)
    test = clusters(500, seed=2, spread=4.0)
    result = linear_probe(data, test, validation=validation)
    assert (result.chosen_by, result.num_validation, result.num_fitted) == ("validation", 200, 260)
    assert result.validation[result.c] == max(result.validation.values())
    assert len(set(result.validation.values())) > 3, "C should matter here"
    assert result.classes == linear_probe(data.join(validation), test, c=result.c).classes
    assert result.classes != linear_probe(data, test, c=result.c).classes
    for c, value in result.validation.items():
        theirs = LogisticRegression(C=c, max_iter=1000).fit(data.features, data.labels)
        assert right_by(theirs, validation) / 200 == pytest.approx(value, abs=0.011)


@pytest.mark.parametrize(
    ("best", "last"), [(1e-5, 1.0), (0.01, 1.0), (1.0, 100.0), (1e3, 1e5), (1e6, 1e6)]
)
def test_the_search_ends_two_decades_after_the_best_c(
    best: float, last: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier is its C, and right for one more sample the nearer C is to the best one."""

    def count(counts: ClassificationCounts, c: float, held_out: LabelledFeatures) -> None:
        right = 30 - round(2 * abs(np.log10(c / best)))
        counts.add([[0]] * len(held_out), [[0]] * right + [[1]] * (len(held_out) - right))

    monkeypatch.setattr(probes, "_fit", lambda classifier, samples: classifier.C)
    monkeypatch.setattr(probes, "_count", count)
    train = clusters(30, seed=0)
    tried = list(probes._search_c([(train, train)], metric="top1"))
    assert tried == [c for c in C_GRID if c <= 1.001 * last]
    assert (C_GRID[0], C_GRID[-1]) == (1e-6, 1e6)


@pytest.mark.usefixtures("few_cs")
def test_c_follows_the_metric_that_is_asked_for() -> None:
    common, rare = clusters(600, seed=0, spread=1.0), clusters(600, seed=3, spread=1.0)
    rows = [
        np.concatenate(
            [np.flatnonzero(one.labels < 5)[:count], np.flatnonzero(one.labels == 5)[:8]]
        )
        for one, count in ((common, 300), (rare, 300))
    ]
    train, validation = common.take(rows[0]), rare.take(rows[1])
    found = {
        metric: linear_probe(train, validation, validation=validation, metric=metric)
        for metric in ("top1", "mean_per_class")
    }
    for metric, result in found.items():
        assert result.validation[result.c] == max(result.validation.values())
        theirs = linear_probe(train, validation, c=result.c).classes
        assert result.validation[result.c] == pytest.approx(theirs.value(metric), abs=0.02)


@pytest.mark.usefixtures("few_cs")
def test_few_samples_choose_c_by_cross_validation() -> None:
    result = linear_probe(balanced(5, seed=0), clusters(100, seed=1))
    assert (result.chosen_by, result.num_folds) == ("cross-validation", 5)
    assert (result.num_validation, result.num_fitted) == (0, 30)
    assert result.validation[result.c] == max(result.validation.values())
    held_out = linear_probe(balanced(20, seed=0), clusters(100, seed=1))
    assert (held_out.chosen_by, held_out.num_folds) == ("validation", 0)
    assert (held_out.num_validation, held_out.num_fitted) == (24, 120)


def test_one_sample_a_class_takes_the_default_c(caplog: pytest.LogCaptureFixture) -> None:
    train, test = balanced(1, seed=0), clusters(50, seed=1)
    given = linear_probe(train, test, c=3.0)
    assert (given.chosen_by, given.c) == ("given", 3.0)
    assert not caplog.text
    result = linear_probe(train, test)
    assert (result.chosen_by, result.c, result.validation) == ("default", DEFAULT_C, {})
    assert "C IS NOT CHOSEN" in caplog.text


def test_any_of_several_labels_is_right_and_samples_without_are_left_out() -> None:
    samples = with_labels(np.eye(4), [[0], [], [2, 3], [1, 3]], name="this", class_names=NAMES[:4])
    assert (len(samples), samples.num_without_label) == (3, 1)
    train = with_labels(np.eye(4), [[0], [1], [2], [3]], name="train", class_names=NAMES[:4])
    probe = linear_probe(train, samples, c=1.0).classes
    (nearest,) = nearest_neighbours(train, samples, ks=(1,)).values()
    for result in (probe, nearest):  # the last image is most like d, its second label
        assert (result.num_samples, result.num_correct) == (3, 3)
        assert result.num_without_label == 1
    assert probe.taken_for == ((0, 0, 1), (1, 1, 1), (2, 2, 1))
    with pytest.raises(ValueError, match="no sample of this has a label"):
        with_labels(np.eye(4), [[], [], [], []], name="this", class_names=NAMES)


def test_what_cannot_be_compared_is_refused() -> None:
    train, test = clusters(50, seed=0), clusters(30, seed=1)
    broken = dataclasses.replace(test, features=np.full_like(test.features, np.nan))
    others = dataclasses.replace(test, class_names=NAMES[::-1])
    for learn in (
        lambda one: linear_probe(train, one, c=1.0),
        lambda one: nearest_neighbours(train, one),
    ):
        with pytest.raises(ValueError, match="not finite"):
            learn(broken)
        with pytest.raises(ValueError, match="have other classes"):
            learn(others)
    with pytest.raises(ValueError, match="k must lie in 1 to the 50 training samples, not 51"):
        nearest_neighbours(train, test, ks=(51,))


def test_a_missing_scikit_learn_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[evaluation\]"):
        nearest_neighbours(clusters(50, seed=0), clusters(30, seed=1))


@pytest.mark.parametrize("rows_at_once", [4096, 7])
def test_neighbours_vote_as_scikit_learns_do(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_ROWS_AT_ONCE", rows_at_once)
    train, test = clusters(200, seed=0), clusters(80, seed=1)
    results = nearest_neighbours(train, test, ks=(1, 15), temperature=0.1)
    for k, result in results.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1)
        ).fit(train.features, train.labels)
        assert result.num_correct == right_by(theirs, test)
    assert results[1].num_correct != results[15].num_correct
    # one neighbour votes for one class, so there is no second to be right
    assert results[1].num_correct_top5 == results[1].num_correct < len(test)
    assert results[15].num_correct_top5 > results[15].num_correct
    (cold,) = nearest_neighbours(train, test, ks=(15,), temperature=1e-4).values()
    assert cold.num_correct == results[1].num_correct, "the nearest outweighs all others"
