"""Linear probe, nearest neighbours and the features they stand on, against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from unicl_fast.evaluation import probes
from unicl_fast.evaluation.features import (
    LabelledFeatures,
    split_validation,
    with_labels,
)
from unicl_fast.evaluation.probes import (
    DEFAULT_C,
    LOG10_C,
    LinearClassifier,
    evaluate_classifier,
    fit_logistic_regression,
    fit_probe,
    hold_out,
    knn_accuracy,
    nearest,
    search_peak,
)

NAMES = ("a", "b", "c", "d", "e", "f")


def clusters(n: int, *, seed: int, spread: float = 2.0) -> LabelledFeatures:
    """Overlapping clusters whose features have a mean and scales of their own, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 12, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    labels = torch.randint(0, 6, (n,), generator=generator)
    noise = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, 12, dtype=torch.float64)
    features = (centres[labels] + spread * noise) * scales + 3
    return LabelledFeatures(features, labels, [[int(label)] for label in labels])


@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_the_fit_is_scikit_learns(c: float) -> None:
    data = clusters(400, seed=0)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20_000)
    theirs.fit(data.features.numpy(), data.labels.numpy())
    ours = fit_logistic_regression(data.features, data.labels, num_classes=6, c=c, tolerance=1e-10)
    # the softmax leaves a common shift of the biases open; the weights' is fixed by the penalty
    bias = torch.from_numpy(theirs.intercept_)
    torch.testing.assert_close(ours.weight, torch.from_numpy(theirs.coef_), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        ours.bias - ours.bias.mean(), bias - bias.mean(), rtol=1e-3, atol=1e-5
    )


def test_fp32_and_another_start_lead_to_the_same_probabilities() -> None:
    data, test = clusters(400, seed=0), clusters(100, seed=1)
    plain = fit_logistic_regression(data.features, data.labels, num_classes=6, c=1.0)
    start = fit_logistic_regression(data.features, data.labels, num_classes=6, c=1e-4)
    narrow = fit_logistic_regression(
        data.features.float(),
        data.labels,
        num_classes=6,
        c=1.0,
        start=LinearClassifier(start.weight.float(), start.bias.float()),
    )
    assert narrow.weight.dtype == torch.float32
    expected = plain.scores(test.features).softmax(dim=1)
    found = narrow.scores(test.features.float()).softmax(dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_a_fit_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clusters(301, seed=0)
    whole = fit_logistic_regression(data.features, data.labels, num_classes=6, c=1.0)
    monkeypatch.setattr("unicl_fast.evaluation.probes._LOGITS_AT_ONCE", 6 * 50)
    pieces = fit_logistic_regression(data.features, data.labels, num_classes=6, c=1.0)
    torch.testing.assert_close(pieces.weight, whole.weight, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 0.0}, "C must be a positive number, not 0.0"),
        ({"num_classes": 3}, "labels must lie in 0 to 2, not 0 to 5"),
        ({"features": torch.full((50, 12), torch.nan)}, "not finite"),
        ({"features": torch.zeros(0, 12), "labels": torch.zeros(0).long()}, "needs samples"),
    ],
    ids=["C", "labels", "not finite", "nothing"],
)
def test_what_cannot_be_fitted_is_refused(change: dict, message: str) -> None:
    data = clusters(50, seed=0)
    arguments = {"features": data.features, "labels": data.labels, "num_classes": 6, "c": 1.0}
    with pytest.raises(ValueError, match=message):
        fit_logistic_regression(**(arguments | change))


@pytest.mark.parametrize("peak", [0, 13, 48, 96])
def test_the_search_finds_the_peak_of_a_hill_in_fifteen_fits(peak: int) -> None:
    best, scores = search_peak(lambda place: -abs(place - peak), size=len(LOG10_C), first_step=16)
    assert best == peak
    assert len(scores) <= 15
    assert LOG10_C[0] == -6
    assert LOG10_C[-1] == 6


def test_a_probe_takes_the_c_that_validates_best_and_fits_both_parts() -> None:
    data, validation = clusters(60, seed=0, spread=4.0), clusters(200, seed=1, spread=4.0)
    fit = fit_probe(data, validation, class_names=NAMES, max_iterations=60)
    assert fit.validation[fit.c] == max(fit.validation.values())
    assert len(set(fit.validation.values())) > 3, "C should matter here"
    both = data.join(validation)
    plain = fit_logistic_regression(both.features, both.labels, num_classes=6, c=fit.c)
    torch.testing.assert_close(fit.classifier.weight, plain.weight, rtol=1e-2, atol=1e-4)
    few = fit_probe(data, validation, class_names=NAMES, refit=False, max_iterations=60)
    assert few.c == fit.c
    assert not torch.allclose(few.classifier.weight, fit.classifier.weight, rtol=0.05)


def balanced(per_class: int, *, seed: int) -> LabelledFeatures:
    """So many samples of each of six classes, overlapping in 12 dimensions."""
    samples = clusters(60 * per_class, seed=seed, spread=1.5)
    rows = np.concatenate([np.flatnonzero(samples.labels == k)[:per_class] for k in range(6)])
    return samples.take(rows)


@pytest.mark.parametrize(("per_class", "is_held_out"), [(20, True), (19, True), (15, False)])
def test_a_part_is_held_out_where_it_has_four_samples_a_class(
    per_class: int, is_held_out: bool
) -> None:
    samples = balanced(per_class, seed=0)
    kept, aside = hold_out(samples, fraction=0.2, seed=0)
    assert (aside is not None) == is_held_out
    assert len(kept) + (0 if aside is None else len(aside)) == len(samples)


def test_few_samples_choose_c_by_cross_validation() -> None:
    fit = fit_probe(balanced(5, seed=0), None, class_names=NAMES, max_iterations=60)
    assert (fit.chosen_by, fit.num_folds) == ("cross-validation", 5)
    assert fit.validation[fit.c] == max(fit.validation.values())


@pytest.mark.slow
def test_cross_validation_chooses_better_than_one_sample_a_class() -> None:
    test = clusters(600, seed=9, spread=1.5)
    crossed, alone = [], []
    for seed in range(4):
        train = balanced(5, seed=seed)
        fit = fit_probe(train, None, class_names=NAMES, max_iterations=60)
        crossed.append(evaluate_classifier(fit.classifier, test, class_names=NAMES).top1)
        parts = [
            train.take(r) for r in split_validation(train.labels.numpy(), fraction=0.2, seed=0)
        ]
        one = fit_probe(*parts, class_names=NAMES, max_iterations=60)
        alone.append(evaluate_classifier(one.classifier, test, class_names=NAMES).top1)
    assert sum(crossed) > sum(alone), (crossed, alone)


def test_one_sample_a_class_takes_the_default_c() -> None:
    train = balanced(1, seed=0)
    fit = fit_probe(train, None, class_names=NAMES)
    assert (fit.chosen_by, fit.c, fit.validation) == ("default", DEFAULT_C, {})
    given = fit_probe(train, None, class_names=NAMES, c=3.0)
    assert (given.chosen_by, given.c) == ("given", 3.0)


def test_any_of_several_labels_is_right_and_samples_without_are_left_out() -> None:
    features = torch.eye(4, dtype=torch.float64)
    samples = with_labels(features, [[0], [], [2, 3], [1, 3]], what="this")
    assert len(samples) == 3
    assert samples.num_without_label == 1
    identity = LinearClassifier(torch.eye(4).double(), torch.zeros(4).double())
    result = evaluate_classifier(identity, samples, class_names=NAMES[:4], confusion=True)
    assert (result.num_samples, result.num_correct) == (3, 3)
    assert result.num_without_label == 1
    (nearest_one,) = knn_accuracy(samples, samples, class_names=NAMES[:4], ks=(1,)).values()
    assert nearest_one.num_without_label == 1
    assert result.confusion is not None
    assert result.confusion.tolist() == np.diag([1, 1, 1, 0]).tolist()
    with pytest.raises(ValueError, match="no sample of this has a label"):
        with_labels(features, [[], [], [], []], what="this")


def test_fits_and_searches_are_in_fp32_whatever_the_model_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    seen = []

    def seeing(function: Callable[..., Any]) -> Callable[..., Any]:
        def see(*arguments: Any, **options: Any) -> Any:
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return function(*arguments, **options)

        return see

    for name in ("nearest", "fit_logistic_regression", "_count"):
        monkeypatch.setattr(probes, name, seeing(getattr(probes, name)))
    train, test = clusters(40, seed=0), clusters(10, seed=1)
    knn_accuracy(train, test, class_names=NAMES, ks=(1,))
    fit = fit_probe(train, None, class_names=NAMES, c=1.0)
    evaluate_classifier(fit.classifier, test, class_names=NAMES)
    assert seen == [False] * 3
    assert torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False


def test_neighbours_vote_as_scikit_learns_do() -> None:
    train, test = clusters(200, seed=0), clusters(80, seed=1)
    results = knn_accuracy(train, test, class_names=NAMES, ks=(1, 15), temperature=0.1)
    for k, result in results.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.1)
        ).fit(train.features.numpy(), train.labels.numpy())
        right = theirs.predict(test.features.numpy()) == test.labels.numpy()
        assert result.num_correct == right.sum()
    assert results[1].num_correct != results[15].num_correct
    # one neighbour votes for one class, so there is no second to be right
    assert results[1].num_correct_top5 == results[1].num_correct < len(test)
    assert results[15].num_correct_top5 > results[15].num_correct


def test_the_search_in_chunks_finds_the_same_neighbours() -> None:
    train, test = clusters(100, seed=0), clusters(30, seed=1)
    whole = nearest(test.features, train.features, k=7)
    chunks = nearest(test.features, train.features, k=7, queries_at_once=4, keys_at_once=5)
    torch.testing.assert_close(chunks[0], whole[0])
    assert torch.equal(chunks[1], whole[1])
    with pytest.raises(ValueError, match="k must lie in 1 to the 100 training samples"):
        knn_accuracy(train, test, class_names=NAMES, ks=(101,))
