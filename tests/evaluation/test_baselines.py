"""Trivial baselines against scikit-learn's own, and their place beside a model's figures."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from unicl_fast.evaluation.baselines import Figure, Measured, Part, baselines, beside_table
from unicl_fast.evaluation.predicted import standardised
from unicl_fast.evaluation.retrieval import RetrievalFeatures
from unicl_fast.evaluation.signals import standardise

NAMES = ("apple", "pear", "plum")
ALL = {"": range(3)}
WORDS = ("red", "round", "green", "sweet", "small", "tall")


def part(n: int, *, seed: int) -> Part:
    """Features [n 8] of three classes, whose captions have words that follow from the features."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(3, 8))
    labels = random.integers(3, size=n)
    features = (centres[labels] + 0.5 * random.normal(size=(n, 8))) * np.logspace(-1, 1, 8) + 2
    signs = features[:, : len(WORDS)] > centres[labels][:, : len(WORDS)]
    captions = [
        tuple(f"{NAMES[label]} {' '.join(np.array(WORDS)[own])} of {number}" for number in range(2))
        for label, own in zip(labels.tolist(), signs, strict=True)
    ]
    rows = [[label] for label in labels.tolist()]
    return Part(features=features.astype(np.float32), labels=rows, captions=captions)


def test_labels_are_found_by_the_nearest_image_and_by_regression():
    train, test = part(150, seed=0), part(200, seed=1)
    nearest, regression = baselines(train.only("labels"), test, class_names=NAMES, columns=ALL)
    unit = [one.features / np.linalg.norm(one.features, axis=1)[:, None] for one in (train, test)]
    closest = (unit[1] @ unit[0].T).argmax(axis=1)
    right = sum(train.labels[row] == own for row, own in zip(closest, test.labels, strict=True))
    assert nearest.figures == {"top-1": Figure.of(right, 200)}
    assert regression.name == "logistic regression"
    found = regression.figures["top-1"]
    low, high = found.interval_95
    assert low < found.rate <= high
    assert found.rate > max(0.9, nearest.figures["top-1"].rate - 0.02)


def test_captions_are_found_as_by_scikit_learns_ridge():
    train, test = part(150, seed=0), part(60, seed=1)
    (ours,) = baselines(train.only("captions"), test, class_names=NAMES, columns=ALL)
    words = TfidfVectorizer()
    expected = words.fit_transform([" ".join(own) for own in train.captions]).toarray()
    x, y = standardised(train.features, test.features)
    predicted = Ridge(alpha=5.0 * x.shape[1]).fit(x, expected).predict(y)
    predicted /= np.linalg.norm(predicted, axis=1)[:, None]
    scores = words.transform(test.texts).toarray() @ predicted.T
    owners = np.repeat(np.arange(60), 2)
    texts = np.array(test.texts)
    assert list(ours.figures) == ["R@1", "R@5", "R@10"]
    for name, one in ours.figures.items():
        k = int(name.removeprefix("R@"))
        found = 0
        for query, text in enumerate(texts):
            own = np.isin(np.arange(60), owners[texts == text])  # equal captions share their images
            best = scores[query][own].max()
            found += int((scores[query][~own] >= best - 1e-6).sum() < k)
        assert one.rate * 120 == pytest.approx(found, abs=1.01), name
        assert one.num_tried == 120
    assert ours.figures["R@10"].rate > 0.5
    unit = [torch.randn(count, 4, generator=torch.manual_seed(0)) for count in (60, 120)]
    found = RetrievalFeatures(
        image_features=unit[0], text_features=unit[1], image_of_text=torch.tensor(owners),
        text_ids=torch.tensor(np.unique(texts, return_inverse=True)[1]), samples=np.arange(60),
    )  # fmt: skip
    *_, both = baselines(train.only("captions"), test, class_names=NAMES, columns=ALL, ours=found)
    summed = standardise({"images": (unit[1] @ unit[0].T).numpy(), "predicted": scores})
    total = summed["images"] + summed["predicted"]
    hits = [
        (total[query] >= total[query][np.isin(np.arange(60), owners[texts == text])].max()).sum()
        for query, text in enumerate(texts)
    ]
    assert both.figures["R@1"].rate * 120 == pytest.approx(sum(hit == 1 for hit in hits), abs=2.01)


def test_only_what_both_parts_have_is_measured():
    train, test = part(60, seed=0), part(40, seed=1)
    unlabelled = Part(features=test.features, labels=[[]] * 40, captions=test.captions)
    (ridge,) = baselines(train, unlabelled, class_names=(), columns={})
    assert ridge.name == "ridge to tf-idf"
    bare = Part(features=test.features, labels=[[]] * 40, captions=[()] * 40)
    assert baselines(train, bare, class_names=NAMES, columns=ALL) == []


def test_a_dimension_that_never_varies_in_training_does_not_blow_up_a_test_image():
    train, test = np.ones((5, 3), np.float32), np.full((2, 3), 2, np.float32)
    train[:, 0] = np.arange(5)
    for rows in standardised(train, test):
        assert np.isfinite(rows).all()
        assert rows.dtype == np.float32
    assert np.isfinite(standardised(np.ones((4, 3), np.float32))[0]).all()


def test_a_sentence_says_which_baselines_win_and_by_how_much():
    ours = Measured("this model", {"top-1": Figure.of(50, 100)})
    worse = Measured("nearest", {"top-1": Figure.of(50, 100)})
    better = Measured("regression", {"top-1": Figure.of(61, 100)}, 1.25)
    assert "BELOW" not in beside_table(ours, [worse])
    table = beside_table(ours, [worse, better])
    assert "BELOW A BASELINE: this model finds less than regression (top-1 61.00 against" in table
    assert "--preset photos-heads" in table
    assert "unicl-eval bases" in table
    table = beside_table(ours, [better], freeze=["image", "text"])
    assert "unicl-eval search ranks by both" in table
    assert "   1.2 |" in table
