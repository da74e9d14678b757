"""Classifiers on frozen features, by scikit-learn: a linear probe, and the k nearest images.

The probe is logistic regression with an L2 penalty (Radford et al., arXiv 2103.00020, appendix
A.3). Its C is chosen on a held-out fifth of each class, or by cross-validation if that would be too
few; then all images are fitted together.

The k nearest training images vote as in DINO (Caron et al., arXiv 2104.14294, appendix F.1): each
for its label with the weight exp(cosine / temperature). The search is exact.
"""

import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unicl_fast.evaluation.choices import Metric
from unicl_fast.evaluation.labelled import LabelledFeatures
from unicl_fast.evaluation.report import (
    RATE_NAMES,
    ClassificationCounts,
    ClassificationResult,
    interval_text,
    percent,
)
from unicl_fast.evaluation.splits import Rows, draw_shots, hold_out, split_folds
from unicl_fast.system.bar import Bar
from unicl_fast.system.installation import install_command
from unicl_fast.system.phases import heartbeat_and_check_stop
from unicl_fast.system.wording import count_of, markdown_table

logger = logging.getLogger(__name__)

C_GRID = tuple(10 ** (half_decade / 2) for half_decade in range(-12, 13))
"""1e-6 to 1e6, as in CLIP's search."""
DEFAULT_C = 1.0  # scikit-learn's; used if no class has two images, so that C cannot be chosen
MAX_ITERATIONS = 1000  # L-BFGS iterations of a fit, as CLIP's
_DEFAULT_TAKEN = (
    "C IS NOT CHOSEN: no class has two training images, so C is the default, %g; give C (--c), or "
    "images to choose it by (--validation)"
)
_PATIENCE = 4  # values of C above 1 that are tried after the best one so far: two decades
_ROWS_AT_ONCE = 4096

ChosenBy = Literal["given", "validation", "cross-validation", "default"]
Pair = tuple[LabelledFeatures, LabelledFeatures]  # samples to fit on, and samples held out


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """How good a linear probe is, and how its C was chosen."""

    classes: ClassificationResult
    metric: Metric  # C was chosen by it
    c: float
    chosen_by: ChosenBy
    validation: dict[float, float]  # each C that was tried -> the metric on the held-out images
    num_folds: int  # folds of the cross-validation, or 0
    num_validation: int  # images held out for the search, or 0 in a cross-validation
    num_fitted: int  # images of the last fit

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"c_chosen_by": self.chosen_by}
        if self.num_folds:
            values["num_folds"] = self.num_folds
        if self.validation:
            tried = [{"c": c, self.metric: value} for c, value in self.validation.items()]
            values |= {"validation": tried, "num_validation": self.num_validation}
        return values | {"c": self.c, "num_fitted": self.num_fitted} | self.classes.to_json()

    def to_table(self) -> str:
        how = f"chosen by {self.chosen_by}" if self.validation else self.chosen_by
        if self.num_folds:
            how += f" in {self.num_folds} folds, since too few images could be held out"
        edge = ""
        if self.c in (C_GRID[0], C_GRID[-1]):
            edge = ", at the edge of the search: a better one may lie beyond"
        fitted = count_of(self.num_fitted, "sample")
        return f"{self.classes.to_table()}\nC {self.c:.4g} ({how}{edge}), fitted on {fitted}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewShotResult:
    """Linear probes on several draws of a few images of each class."""

    shots: int
    draws: tuple[ProbeResult, ...]

    @property
    def values(self) -> list[float]:
        return [one.classes.value(one.metric) for one in self.draws]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float | None:
        """None for a single draw."""
        return float(np.std(self.values, ddof=1)) if len(self.draws) > 1 else None

    def to_json(self) -> dict[str, Any]:
        names = ("shots", "mean", "standard_deviation")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values |= {"draws": self.values, "c": [one.c for one in self.draws]}
        return values | {"c_chosen_by": self.draws[-1].chosen_by}


def few_shot_table(results: Sequence[FewShotResult]) -> str:
    rows = []
    for one in results:
        spread = one.standard_deviation
        lowest_to_highest = interval_text((min(one.values), max(one.values)))
        deviation = "" if spread is None else percent(spread)
        rows.append([str(one.shots), percent(one.mean), deviation, lowest_to_highest])
    rate = RATE_NAMES[results[0].draws[0].metric]
    return markdown_table(["shots", f"{rate}, %", "standard deviation", "range"], rows)


def require_scikit_learn() -> None:
    """ModuleNotFoundError, with the install command, if scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            "linear probes and nearest neighbours need scikit-learn: "
            f"{install_command('evaluation')}"
        )


def linear_probe(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    validation: LabelledFeatures | None = None,
    c: float = 0.0,
    c_grid: Sequence[float] = (),
    metric: Metric = "top1",
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Fits logistic regression on labelled features, and tests it on others.

    Args:
        train: each is fitted with its first label.
        test: any label of an image is right.
        validation: chooses C instead of a part of `train`, and is fitted too.
        c: inverse strength of the penalty; 0 chooses it.
        c_grid: candidates, ascending; empty means `C_GRID`.
        metric: C is chosen by it.
        seed: decides which images are held out.
        progress: shows a bar after two seconds.

    Raises:
        ValueError: features that are not finite, other classes, or only one class to fit.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if validation is not None:
        fitted, pairs = train.join(validation), [(train, validation)]
    else:
        fitted, pairs = train, _pairs(train, hold_out(train.labels, seed=seed))
    return _probe(fitted, test, pairs, c=c, c_grid=c_grid, metric=metric, progress=progress)


def few_shot_probes(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    shots: Sequence[int],
    draws: int = 3,
    validation: LabelledFeatures | None = None,
    c: float = 0.0,
    metric: Metric = "top1",
    seed: int = 0,
    progress: bool = False,
) -> list[FewShotResult]:
    """Fits linear probes on a few images of each class, several draws for each number of `shots`.

    C is chosen by `validation` or by up to four other images of each class, as in CoOp; with fewer
    than one other a class on average, by cross-validation over the shots. The fit uses the shots
    only. See `linear_probe` for arguments and errors.
    """
    num_classes = len(np.unique(train.labels))
    found: dict[int, list[ProbeResult]] = {count: [] for count in shots}
    work = [(count, draw) for count in shots for draw in range(draws)]
    with Bar(desc="few-shot", total=len(work), shown=progress) as bar:
        for count, draw in work:
            kept, aside = draw_shots(train.labels, shots=count, seed=seed + draw)
            fitted, others = train.take(kept), validation
            if others is None and len(aside) >= num_classes:
                others = train.take(aside)
            folds = split_folds(fitted.labels, seed=seed + draw) if others is None else []
            pairs = _pairs(fitted, folds) if others is None else [(fitted, others)]
            found[count].append(_probe(fitted, test, pairs, c=c, metric=metric))
            bar.update()
    return [FewShotResult(shots=count, draws=tuple(probes)) for count, probes in found.items()]


def nearest_neighbours(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    progress: bool = False,
) -> dict[int, ClassificationResult]:
    """Results for several numbers `ks` of neighbours, from one search.

    Each training sample votes for its first label; `temperature` is positive. Raises as
    `linear_probe`, and ValueError for more neighbours than training samples.
    """
    _check(train, test)
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(
            f"k must lie in 1 to the {len(train)} training samples, not {', '.join(map(str, ks))}"
        )
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=max(ks), algorithm="brute", metric="cosine")
    search.fit(train.features)
    counts = {k: ClassificationCounts(train.class_names) for k in ks}
    for rows in _blocks(len(test), progress=progress):
        heartbeat_and_check_stop()  # shows progress
        distances, neighbours = search.kneighbors(test.features[rows])
        # relative to the nearest, since exp(1 / temperature) can overflow
        weights = np.exp((distances[:, :1] - distances) / temperature)
        for k in ks:
            votes = np.zeros((len(weights), len(train.class_names)))
            own = np.arange(len(weights))[:, None]
            np.add.at(votes, (own, train.labels[neighbours[:, :k]]), weights[:, :k])
            # a class without a vote is not found, even if there is room among the first five
            voted = (votes > 0).sum(axis=1).tolist()
            rankings = [best[:n] for best, n in zip(_best(votes).tolist(), voted, strict=True)]
            counts[k].add(rankings, test.all_labels[rows])
    left_out = test.num_without_label
    return {k: counts[k].result(what="nearest neighbours", num_without_label=left_out) for k in ks}


def _check(train: LabelledFeatures, *others: LabelledFeatures) -> None:
    """Raises for features that cannot be compared, and without scikit-learn."""
    require_scikit_learn()
    if any(other.class_names != train.class_names for other in others):
        raise ValueError(
            "features to learn from and to test on have other classes: make both by one call of "
            "labelled_features"
        )
    if not all(np.isfinite(one.features).all() for one in (train, *others)):
        raise ValueError("features hold values that are not finite: the model is broken")


def _pairs(samples: LabelledFeatures, splits: Sequence[tuple[Rows, Rows]]) -> list[Pair]:
    return [(samples.take(kept), samples.take(aside)) for kept, aside in splits]


def _probe(
    fitted: LabelledFeatures,
    test: LabelledFeatures,
    pairs: Sequence[Pair],
    *,
    c: float,
    c_grid: Sequence[float] = (),
    metric: Metric,
    progress: bool = False,
) -> ProbeResult:
    """Chooses C by `pairs` if it is 0, then fits and tests."""
    _check(fitted, test, *(held_out for _, held_out in pairs))
    chosen_by: ChosenBy = "given"
    scores: dict[float, float] = {}
    if not c:
        ways: list[ChosenBy] = ["default", "validation", "cross-validation"]
        chosen_by = ways[min(len(pairs), 2)]
        scores = _search_c(pairs, c_grid=c_grid or C_GRID, metric=metric, progress=progress)
        c = max(scores, key=scores.__getitem__, default=DEFAULT_C)
        if not pairs:
            logger.warning(_DEFAULT_TAKEN, c)
    counts = ClassificationCounts(fitted.class_names)
    _count(counts, _fit(_logistic_regression(c), fitted), test)
    return ProbeResult(
        classes=counts.result(what="a linear probe", num_without_label=test.num_without_label),
        metric=metric, c=c, chosen_by=chosen_by, validation=scores, num_fitted=len(fitted),
        num_folds=len(pairs) if chosen_by == "cross-validation" else 0,
        num_validation=len(pairs[0][1]) if chosen_by == "validation" else 0,
    )  # fmt: skip


def _search_c(
    pairs: Sequence[Pair], *, c_grid: Sequence[float], metric: Metric, progress: bool = False
) -> dict[float, float]:
    """C -> the metric on all held-out samples, from the smallest C on.

    Each fit starts from the previous one. Fits for large C are the slowest, so above 1 the search
    ends when the metric has been below its best for two decades.
    """
    classifiers = [_logistic_regression(DEFAULT_C) for _ in pairs]
    scores: dict[float, float] = {}
    with Bar(desc="choose C", total=len(c_grid), shown=progress) as bar:
        for c in c_grid if pairs else ():
            counts = ClassificationCounts(pairs[0][0].class_names)
            for classifier, (train, held_out) in zip(classifiers, pairs, strict=True):
                _count(counts, _fit(classifier.set_params(C=c), train), held_out)
            scores[c] = counts.result(what="a linear probe").value(metric)
            bar.set_postfix_str(f"C {c:.3g}: {percent(scores[c])} %", refresh=False)
            bar.update()
            latest = list(scores.values())[-_PATIENCE:]
            if c >= 1 and max(latest) < max(scores.values()):
                break
    return scores


def _logistic_regression(c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, max_iter=MAX_ITERATIONS, warm_start=True)


def _fit(classifier: Any, samples: LabelledFeatures) -> Any:
    from sklearn.exceptions import ConvergenceWarning

    heartbeat_and_check_stop()  # shows progress
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # CLIP stops there too
        return classifier.fit(samples.features, samples.labels)


def _count(counts: ClassificationCounts, classifier: Any, samples: LabelledFeatures) -> None:
    for rows in _blocks(len(samples)):
        scores = classifier.decision_function(samples.features[rows])
        if scores.ndim == 1:  # for two classes scikit-learn returns only the second one's
            scores = np.stack([-scores, scores], axis=1)
        rankings = classifier.classes_[_best(scores)].tolist()
        counts.add(rankings, samples.all_labels[rows])


def _best(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Columns of each row's five highest scores, best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :5]


def _blocks(count: int, *, progress: bool = False) -> Iterator[slice]:
    with Bar(desc="classify", total=count, shown=progress) as bar:
        for start in range(0, count, _ROWS_AT_ONCE):
            yield slice(start, start + _ROWS_AT_ONCE)
            bar.update(min(_ROWS_AT_ONCE, count - start))
