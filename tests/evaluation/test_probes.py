"""Linear probe, its splits, and nearest neighbours, on features with known answers."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from unicl_fast.evaluation import probes
from unicl_fast.evaluation.labelled import LabelledFeatures, with_labels
from unicl_fast.evaluation.probes import C_GRID, few_shot_probes, linear_probe, nearest_neighbours
from unicl_fast.evaluation.report import ClassificationCounts
from unicl_fast.evaluation.splits import draw_shots, hold_out

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
    """The search tries six values of C, none of them with a fit of a thousand iterations."""
    monkeypatch.setattr(probes, "C_GRID", C_GRID[2:18:3])


def right_by(classifier: object, test: LabelledFeatures) -> int:
    return int((classifier.predict(test.features) == test.labels).sum())


@pytest.mark.parametrize("num_classes", [6, 2])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_a_given_c_is_scikit_learns_on_all_samples(c, num_classes):
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
def test_a_probe_takes_the_c_that_validates_best_and_fits_both_parts():
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
def test_the_search_ends_two_decades_after_the_best_c(best, last, monkeypatch):
    """The classifier is its C, and right for one more sample the nearer C is to the best one."""

    def count(counts: ClassificationCounts, c: float, held_out: LabelledFeatures) -> None:
        right = 30 - round(2 * abs(np.log10(c / best)))
        counts.add([[0]] * len(held_out), [[0]] * right + [[1]] * (len(held_out) - right))

    monkeypatch.setattr(probes, "_fit", lambda classifier, samples: classifier.C)
    monkeypatch.setattr(probes, "_count", count)
    train = clusters(30, seed=0)
    tried = list(probes._search_c([(train, train)], c_grid=C_GRID, metric="top1"))
    assert tried == [c for c in C_GRID if c <= 1.001 * last]
    assert (C_GRID[0], C_GRID[-1]) == (1e-6, 1e6)


@pytest.mark.usefixtures("few_cs")
def test_c_follows_the_metric():
    train, validation = (
        one.take(np.r_[np.flatnonzero(one.labels < 5)[:300], np.flatnonzero(one.labels == 5)[:8]])
        for one in (clusters(600, seed=seed, spread=1.0) for seed in (0, 3))
    )
    for metric in ("top1", "mean_per_class"):
        result = linear_probe(train, validation, validation=validation, metric=metric)
        assert result.validation[result.c] == max(result.validation.values())
        theirs = linear_probe(train, validation, c=result.c).classes
        assert result.validation[result.c] == pytest.approx(theirs.value(metric), abs=0.02)


@pytest.mark.usefixtures("few_cs")
def test_few_samples_choose_c_by_cross_validation_and_one_a_class_not_at_all(caplog):
    result = linear_probe(balanced(5, seed=0), clusters(100, seed=1))
    assert (result.chosen_by, result.num_folds) == ("cross-validation", 5)
    assert (result.num_validation, result.num_fitted) == (0, 30)
    assert result.validation[result.c] == max(result.validation.values())
    held_out = linear_probe(balanced(20, seed=0), clusters(100, seed=1))
    assert (held_out.chosen_by, held_out.num_folds) == ("validation", 0)
    assert (held_out.num_validation, held_out.num_fitted) == (24, 120)
    train, test = balanced(1, seed=0), clusters(50, seed=1)
    given = linear_probe(train, test, c=3.0)
    assert (given.chosen_by, given.c) == ("given", 3.0)
    assert not caplog.text
    result = linear_probe(train, test)
    assert (result.chosen_by, result.c, result.validation) == ("default", probes.DEFAULT_C, {})
    assert "C IS NOT CHOSEN" in caplog.text


@pytest.mark.usefixtures("few_cs")
def test_few_shots_are_fitted_on_the_shots_only_and_c_by_others(monkeypatch):
    fits = []

    def fit(fitted: LabelledFeatures, test: LabelledFeatures, pairs: list, **settings: object):
        fits.append((len(fitted), [(len(one), len(other)) for one, other in pairs]))
        return whole(fitted, test, pairs, **settings)

    whole = probes._probe
    monkeypatch.setattr(probes, "_probe", fit)
    train, test = balanced(6, seed=0), clusters(100, seed=1)
    found = few_shot_probes(train, test, shots=(1, 4, 6), draws=2)
    assert fits[:4:2] == [(6, [(6, 6)]), (24, [(24, 12)])]
    num_fitted, folds = fits[4]
    assert num_fitted == 36
    assert [kept + aside for kept, aside in folds] == [36] * 5
    chosen_by = [probe.chosen_by for one in found for probe in one.draws[1:]]
    assert chosen_by == ["validation", "validation", "cross-validation"]
    assert all(probe.c in C_GRID for one in found for probe in one.draws)
    assert found[0].mean == pytest.approx(np.mean(found[0].values))
    assert found[0].standard_deviation == pytest.approx(np.std(found[0].values, ddof=1))
    (one,) = few_shot_probes(train, test, shots=(2,), draws=1, validation=test)
    assert fits[-1] == (12, [(12, 100)])
    assert one.standard_deviation is None


def test_any_of_several_labels_is_right_and_samples_without_are_left_out():
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


def test_unequal_features_and_a_missing_scikit_learn_are_refused(monkeypatch):
    train, test = clusters(50, seed=0), clusters(30, seed=1)
    broken = dataclasses.replace(test, features=np.full_like(test.features, np.nan))
    others = dataclasses.replace(test, class_names=NAMES[::-1])
    for one, said in ((broken, "not finite"), (others, "have other classes")):
        with pytest.raises(ValueError, match=said):
            linear_probe(train, one, c=1.0)
        with pytest.raises(ValueError, match=said):
            nearest_neighbours(train, one)
    with pytest.raises(ValueError, match="k must lie in 1 to the 50 training samples, not 51"):
        nearest_neighbours(train, test, ks=(51,))
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[evaluation\]"):
        nearest_neighbours(train, test)


@pytest.mark.parametrize("rows_at_once", [4096, 7])
def test_neighbours_vote_as_scikit_learns_do(rows_at_once, monkeypatch):
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


@pytest.mark.parametrize(
    ("sizes", "folds"),
    [((20, 20), 1), ((19, 21), 1), ((9, 7, 6), 5), ((4, 3), 3), ((5, 2), 2), ((4, 1), 2),
     ((60, 10, 1), 1), ((1, 1, 1), 0)],
)  # fmt: skip
def test_each_class_is_held_out_in_part_but_never_its_only_sample(sizes, folds):
    """A fifth where that has four samples a class, or every sample once in one of the folds."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    found = hold_out(labels, seed=0)
    assert len(found) == folds
    for kept, aside in found:
        assert sorted([*kept, *aside]) == list(range(len(labels)))
        assert set(labels[kept]) == set(labels)
    held_out = sorted(row for _, aside in found for row in aside)
    if folds == 1:
        expected = [round(size / 5) if size > 1 else 0 for size in sizes]
        assert np.bincount(labels[held_out], minlength=len(sizes)).tolist() == expected
    else:
        assert held_out == [row for row, label in enumerate(labels) if sizes[label] > 1]
    if len(labels) > 10:
        assert not np.array_equal(hold_out(labels, seed=1)[0][1], found[0][1])


def test_shots_are_drawn_of_each_class_and_others_to_choose_by():
    labels = np.repeat([0, 1, 2], [50, 10, 2])
    shots, others = draw_shots(labels, shots=8, seed=0)
    assert np.bincount(labels[shots]).tolist() == [8, 8, 2]
    assert np.bincount(labels[others], minlength=3).tolist() == [4, 2, 0]
    assert not set(shots) & set(others)
    assert not np.array_equal(shots, draw_shots(labels, shots=8, seed=1)[0])
    assert [len(rows) for rows in draw_shots(labels, shots=64, seed=0)] == [62, 0]
