"""Classifiers on frozen features, by scikit-learn: a linear probe, and the k nearest images.

The probe is logistic regression with an L2 penalty (Radford et al., arXiv 2103.00020, appendix
A.3). Its C is chosen on images that are held out, a fifth of each class; where that would be few,
by cross-validation. Then all images are fitted together.

The k nearest training images vote as in DINO (Caron et al., arXiv 2104.14294, appendix F.1): each
for its label with the weight exp(cosine / temperature). The search is exact.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from unicl_fast.checkpoints.load import find_model
from unicl_fast.evaluation.data import choose_metric
from unicl_fast.evaluation.features import model_on_ranks
from unicl_fast.evaluation.labelled import LabelledFeatures, labelled_features
from unicl_fast.evaluation.report import (
    RATE_NAMES,
    ClassificationCounts,
    ClassificationResult,
    classification_table,
    draw_confusion,
    interval_text,
    percent,
    write_results,
)
from unicl_fast.evaluation.requests import FrozenFeatures, Knn, Layer, LinearProbe, Metric
from unicl_fast.evaluation.splits import Rows, draw_shots, hold_out, split_folds
from unicl_fast.system.progress import heartbeat_and_check_stop
from unicl_fast.system.wording import count_of, markdown_table

logger = logging.getLogger(__name__)

C_GRID = tuple(10 ** (half_decade / 2) for half_decade in range(-12, 13))
"""Range of C: 1e-6 to 1e6, as in CLIP's search."""
DEFAULT_C = 1.0
"""Taken where no class has two images, so that nothing can choose C; scikit-learn's default."""
MAX_ITERATIONS = 1000
"""L-BFGS iterations of a fit, as CLIP's."""
_DEFAULT_TAKEN = (
    "C IS NOT CHOSEN: no class has two training images, so C is the default, %g; give images to "
    "choose it by (--validation), or C (--c)"
)
_PATIENCE = 4
"""Values of C from 1 on that are tried after the best one so far: two decades."""
_ROWS_AT_ONCE = 4096

ChosenBy = Literal["given", "validation", "cross-validation", "default"]
Pair = tuple[LabelledFeatures, LabelledFeatures]
"""Samples to fit on, and samples held out."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """How good a linear probe is, and how its C was chosen."""

    classes: ClassificationResult
    c: float
    chosen_by: ChosenBy
    """`DEFAULT_C` is the default, where no class has two images."""
    validation: dict[float, float]
    """C -> the metric on the held-out images, of all that were tried."""
    num_folds: int
    """Folds of the cross-validation, or 0."""
    num_validation: int
    """Images that were held out of the search, or 0 in a cross-validation."""
    num_fitted: int
    """Images of the last fit."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FewShotResult:
    """Linear probes on several draws of a few images of each class."""

    shots: int
    values: tuple[float, ...]
    """The metric of each draw."""
    c: tuple[float, ...]
    """The C of each draw."""
    chosen_by: ChosenBy

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_deviation(self) -> float | None:
        """That of the draws; None for a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


def require_scikit_learn() -> None:
    """Raises ModuleNotFoundError, which says how to install it, where scikit-learn is missing."""
    if importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(
            "linear probes and nearest neighbours are scikit-learn's: pip install "
            "'unicl_fast[evaluation]'"
        )


def linear_probe(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    validation: LabelledFeatures | None = None,
    c: float = 0.0,
    metric: Metric = "top1",
    seed: int = 0,
    confusion: bool = False,
    progress: bool = False,
) -> ProbeResult:
    """Fits logistic regression on labelled features, and tests it on others.

    Args:
        train: each is fitted with its first label.
        test: any label of an image is right.
        validation: images to choose C by, instead of a part of `train`; they are fitted too.
        c: inverse strength of the penalty; 0 chooses it.
        metric: C is chosen by it.
        seed: decides which images are held out.
        confusion: also count which class is taken for which.
        progress: shows a bar.

    Raises:
        ValueError: features that are not finite, other classes, or only one class to fit.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if validation is not None:
        fitted, pairs = train.join(validation), [(train, validation)]
    else:
        fitted, pairs = train, _pairs(train, hold_out(train.labels, seed=seed))
    return _probe(fitted, test, pairs, c=c, metric=metric, confusion=confusion, progress=progress)


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

    C is chosen by `validation` or by up to four other images of each class, as in CoOp. Where the
    others are fewer than one a class on average, it is chosen by cross-validation over the shots.
    The fit is on the shots only. Arguments and errors are those of `linear_probe`.
    """
    num_classes = len(np.unique(train.labels))
    found: dict[int, list[ProbeResult]] = {count: [] for count in shots}
    work = [(count, draw) for count in shots for draw in range(draws)]
    for count, draw in tqdm(work, desc="few-shot", disable=not progress):
        kept, aside = draw_shots(train.labels, shots=count, seed=seed + draw)
        fitted, others = train.take(kept), validation
        if others is None and len(aside) >= num_classes:
            others = train.take(aside)
        folds = split_folds(fitted.labels, seed=seed + draw) if others is None else []
        pairs = _pairs(fitted, folds) if others is None else [(fitted, others)]
        found[count].append(_probe(fitted, test, pairs, c=c, metric=metric))
    return [
        FewShotResult(
            shots=count,
            values=tuple(one.classes.value(metric) for one in results),
            c=tuple(one.c for one in results),
            chosen_by=results[-1].chosen_by,
        )
        for count, results in found.items()
    ]


def nearest_neighbours(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    confusion: bool = False,
) -> dict[int, ClassificationResult]:
    """Results for several numbers `ks` of neighbours, from one search.

    Each training sample votes for its first label; `temperature` is positive. `confusion` also
    counts which class is taken for which.

    Raises:
        ValueError: more neighbours than training samples, features that are not finite, or other
            classes.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    _check(train, test)
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(
            f"k must lie in 1 to the {len(train)} training samples, not {', '.join(map(str, ks))}"
        )
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=max(ks), algorithm="brute", metric="cosine")
    search.fit(train.features)
    counts = {k: ClassificationCounts(train.class_names, confusion=confusion) for k in ks}
    for rows in _blocks(len(test)):
        heartbeat_and_check_stop()  # shows progress
        distances, neighbours = search.kneighbors(test.features[rows])
        # relative to the nearest: exp(1 / temperature) may be more than a float holds
        weights = np.exp((distances[:, :1] - distances) / temperature)
        for k in ks:
            votes = np.zeros((len(weights), len(train.class_names)))
            own = np.arange(len(weights))[:, None]
            np.add.at(votes, (own, train.labels[neighbours[:, :k]]), weights[:, :k])
            # a class without a vote is not found, even if the first five have room for it
            voted = (votes > 0).sum(axis=1).tolist()
            rankings = [best[:n] for best, n in zip(_best(votes).tolist(), voted, strict=True)]
            counts[k].add(rankings, test.all_labels[rows])
    return {k: _result(counts[k], test, what="nearest neighbours") for k in ks}


def _check(train: LabelledFeatures, *others: LabelledFeatures) -> None:
    """Refuses features that cannot be compared, or a missing scikit-learn."""
    require_scikit_learn()
    for other in others:
        if other.class_names != train.class_names:
            raise ValueError(
                "features to learn from and to test on have other classes: take both from one call "
                "of labelled_features"
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
    metric: Metric,
    confusion: bool = False,
    progress: bool = False,
) -> ProbeResult:
    """Chooses C by pairs where it is 0, then fits and tests."""
    _check(fitted, test, *(held_out for _, held_out in pairs))
    chosen_by: ChosenBy = "given"
    scores: dict[float, float] = {}
    if not c:
        ways: list[ChosenBy] = ["default", "validation", "cross-validation"]
        chosen_by = ways[min(len(pairs), 2)]
        scores = _search_c(pairs, metric=metric, progress=progress)
        c = max(scores, key=scores.__getitem__, default=DEFAULT_C)
        if not pairs:
            logger.warning(_DEFAULT_TAKEN, c)
    counts = ClassificationCounts(fitted.class_names, confusion=confusion)
    _count(counts, _fit(_logistic_regression(c), fitted), test)
    return ProbeResult(
        classes=_result(counts, test, what="a linear probe"),
        c=c,
        chosen_by=chosen_by,
        validation=scores,
        num_folds=len(pairs) if chosen_by == "cross-validation" else 0,
        num_validation=len(pairs[0][1]) if chosen_by == "validation" else 0,
        num_fitted=len(fitted),
    )


def _search_c(pairs: Sequence[Pair], *, metric: Metric, progress: bool) -> dict[float, float]:
    """C -> the metric on all that is held out, from the smallest C on.

    Each fit begins where that of the C before ended. The fits for large C take longest, so from 1
    on the search ends when the metric has been below its best for two decades.
    """
    classifiers = [_logistic_regression(DEFAULT_C) for _ in pairs]
    scores: dict[float, float] = {}
    bar = tqdm(C_GRID if pairs else (), desc="choose C", disable=not progress)
    for c in bar:
        counts = ClassificationCounts(pairs[0][0].class_names)
        for classifier, (train, held_out) in zip(classifiers, pairs, strict=True):
            _count(counts, _fit(classifier.set_params(C=c), train), held_out)
        scores[c] = counts.result(what="a linear probe").value(metric)
        bar.set_postfix_str(f"C {c:.3g}: {percent(scores[c])} %")
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
        warnings.simplefilter("ignore", ConvergenceWarning)  # at most MAX_ITERATIONS, as CLIP does
        return classifier.fit(samples.features, samples.labels)


def _count(counts: ClassificationCounts, classifier: Any, samples: LabelledFeatures) -> None:
    for rows in _blocks(len(samples)):
        scores = classifier.decision_function(samples.features[rows])
        if scores.ndim == 1:  # of two classes scikit-learn gives the second one's
            scores = np.stack([-scores, scores], axis=1)
        rankings = classifier.classes_[_best(scores)].tolist()
        counts.add(rankings, samples.all_labels[rows])


def _best(scores: NDArray[Any]) -> NDArray[np.int64]:
    """Columns of the five highest scores of each row, best first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :5]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS_AT_ONCE) for start in range(0, count, _ROWS_AT_ONCE))


def _result(
    counts: ClassificationCounts, samples: LabelledFeatures, *, what: str
) -> ClassificationResult:
    without = samples.num_without_label  # which are not among them
    return dataclasses.replace(counts.result(what=what), num_without_label=without)


def run_linear_probe(command: LinearProbe) -> None:
    """Extracts features on all ranks; rank 0 fits, prints and writes."""
    sets, described = _extract(command)
    if not sets:
        return
    train, test, *more = sets
    metric = choose_metric(command.metric, command.data)
    common: dict[str, Any] = {
        "validation": more[0] if more else None,
        "c": command.c,
        "metric": metric,
        "seed": command.seed,
        "progress": sys.stderr.isatty(),
    }
    if command.shots:
        found = few_shot_probes(train, test, shots=command.shots, draws=command.draws, **common)
        values, table = _report_shots(command, found, train=train, test=test, metric=metric)
        write_results(command, described | values, table)
        return
    confusion = command.figures is not None
    result = linear_probe(train, test, confusion=confusion, **common)
    _say_how_c_was_chosen(result, layer=command.layer)
    values = {"c_chosen_by": result.chosen_by}
    if result.num_folds:
        values["num_folds"] = result.num_folds
    if result.validation:
        tried = [{"c": c, metric: value} for c, value in result.validation.items()]
        values |= {"validation": tried, "num_validation": result.num_validation}
    values |= {"c": result.c, "num_fitted": result.num_fitted} | result.classes.to_json()
    table = classification_table([(test.name, metric, result.classes)])
    write_results(command, described | values, table)
    title = f"{test.name}, linear probe"
    draw_confusion(result.classes, train.class_names, command.figures, "linear-probe", title=title)


def run_knn(command: Knn) -> None:
    """Extracts features on all ranks; rank 0 searches, prints and writes."""
    sets, described = _extract(command)
    if not sets:
        return
    train, test = sets
    metric = choose_metric(command.metric, command.data)
    results = nearest_neighbours(
        train,
        test,
        ks=command.k,
        temperature=command.temperature,
        confusion=command.figures is not None,
    )
    rows = [(f"k = {k}", metric, result) for k, result in results.items()]
    table = classification_table(rows, mean=False)  # a mean over k would mean nothing
    print(table)
    found = [{"k": k} | result.to_json() for k, result in results.items()]
    values = {"temperature": command.temperature, "results": found}
    write_results(command, described | values, table)
    best = max(results, key=lambda k: results[k].value(metric))
    title = f"{test.name}, {best} nearest neighbours"
    draw_confusion(results[best], train.class_names, command.figures, "knn", title=title)


def _extract(command: FrozenFeatures) -> tuple[list[LabelledFeatures], dict[str, Any]]:
    """Features of the data sets of a command, and the first values of its report; rank 0 only."""
    folder = None if command.features == "none" else Path(command.features)
    if command.features == "auto":
        run = find_model(command.checkpoint).parent  # of RUN/checkpoints/step-N, RUN/best, ...
        folder = (run.parent if run.name == "checkpoints" else run) / "features"
    with model_on_ranks(command) as on_ranks:
        sets = labelled_features(on_ranks, *command.data_sets(), layer=command.layer, folder=folder)
    if not sets:
        return [], {}
    return sets, {
        "train": command.train,
        "data": command.data,
        "name": sets[1].name,
        "layer": command.layer,
        "num_train": len(sets[0]),
        "num_test": len(sets[1]),
        "num_features": sets[0].features.shape[1],
        "metric": choose_metric(command.metric, command.data),
    }


def _say_how_c_was_chosen(result: ProbeResult, *, layer: Layer) -> None:
    how = f"chosen by {result.chosen_by}" if result.validation else result.chosen_by
    if result.num_folds:
        how += f" in {result.num_folds} folds, since too few images could be held out"
    if result.c in (C_GRID[0], C_GRID[-1]):
        print(f"C {result.c:g} is at the edge of what is searched; a better one may lie beyond")
    print(result.classes.to_table())
    print(
        f"C {result.c:.4g} ({how}), fitted on {count_of(result.num_fitted, 'sample')}, features of "
        f"the {layer}"
    )


def _report_shots(
    command: LinearProbe,
    found: Sequence[FewShotResult],
    *,
    train: LabelledFeatures,
    test: LabelledFeatures,
    metric: Metric,
) -> tuple[dict[str, Any], str]:
    """Prints a table of the draws; returns values for the JSON, and the table."""
    values: list[dict[str, Any]] = []
    rows = []
    for one in found:
        spread = one.standard_deviation
        values.append(
            {"shots": one.shots, "mean": one.mean, "standard_deviation": spread}
            | {"draws": list(one.values), "c": list(one.c), "c_chosen_by": one.chosen_by}
        )
        deviation = "" if spread is None else percent(spread)
        lowest_to_highest = interval_text((min(one.values), max(one.values)))
        rows.append([str(one.shots), percent(one.mean), deviation, lowest_to_highest])
    header = ["shots", f"{RATE_NAMES[metric]}, %", "standard deviation", "range"]
    table = markdown_table(header, rows)
    print(table)
    print(
        f"{count_of(command.draws, 'draw')} each, {len(test):,} test samples, "
        f"{count_of(len(train.class_names), 'class')}"
    )
    smallest = int(np.unique(train.labels, return_counts=True)[1].min())
    if smallest < max(command.shots):
        print(f"the smallest class has {smallest} training samples, and gave all it has")
    return {"shots": values, "num_draws": command.draws, "smallest_class": smallest}, table
