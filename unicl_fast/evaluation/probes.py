"""Classifiers on frozen features: a linear probe, and the k nearest training images.

The probe is logistic regression as CLIP and scikit-learn have it. For features x, labels y and
C > 0 the weights W [k d] and biases b [k] minimise

    C * sum_i cross_entropy(W x_i + b, y_i) + 1/2 |W|^2

by L-BFGS over the full batch. C is chosen on a validation split by CLIP's parametric binary search
(Radford et al., arXiv 2103.00020, appendix A.3), then training and validation samples are fitted
together. Where a validation split would be too small, C is chosen by cross-validation. With few
shots the probe is fitted on several draws of them instead.

Neighbours are weighted as DINO does: each of the k training samples most similar to an image votes
for its label with weight exp(similarity / temperature); similarity is the cosine (Caron et al.,
arXiv 2104.14294, appendix F.1). The search is exact: every training sample is compared.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from unicl_fast.evaluation.features import (
    ExtractedSets,
    LabelledFeatures,
    draw_shots,
    extract_sets,
    require_finite,
    split_folds,
    split_validation,
)
from unicl_fast.evaluation.report import (
    RATE_NAMES,
    ClassificationCounts,
    ClassificationResult,
    classification_table,
    draw_confusion,
    interval_text,
    percent,
    rank_classes,
    write_results,
)
from unicl_fast.evaluation.requests import Knn, LinearProbe, Metric
from unicl_fast.models.precision import without_tf32
from unicl_fast.system.progress import heartbeat_and_check_stop
from unicl_fast.system.wording import count_of, markdown_table

logger = logging.getLogger(__name__)

MAX_ITERATIONS = 1000
"""L-BFGS iterations of a fit, as CLIP's."""
LOG10_C = tuple(-6 + step / 8 for step in range(97))
"""The grid of the search: 1e-6 to 1e6 in eighths of a decade."""

DEFAULT_C = 1.0
"""Taken where no class has two samples, so that nothing can choose C; scikit-learn's default."""

_FEWEST_HELD_OUT = 4
"""Validation samples of each class, on the average, that are enough to choose C by."""
_DEFAULT_TAKEN = (
    "C IS NOT CHOSEN: no class has two training images, so C is the default, %g; give images to "
    "choose it by with --validation, or C with --c"
)
_FIRST_STEP = 16
_TOLERANCE = 1e-6
"""A hundredth of scikit-learn's default, whose answers differ in the third digit from one start to
another."""
_LOGITS_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 16_384
_QUERIES, _KEYS = 512, 65_536
"""Similarities at once: 128 MiB."""


@dataclass(frozen=True, slots=True)
class LinearClassifier:
    """A fitted classifier."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]

    def scores(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Logits, in the type of the features or the weights, whichever is wider."""
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        return F.linear(features.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


@dataclass(frozen=True, slots=True)
class PreparedFeatures:
    """Training features in the coordinates in which the search is short, for any number of fits.

    The penalty does not change under rotation, so features are centred and turned to their
    principal axes, where the Hessian is nearly diagonal. That is undone exactly in the result: the
    minimum is that of the features given, in a third of the steps (docs/evaluation.md).
    """

    rotated: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d d"]
    """Orthonormal columns."""
    variances: Float[Tensor, " d"]

    def __len__(self) -> int:
        return len(self.rotated)

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> PreparedFeatures:
        """Costs 4 n d^2 operations, as much as d / k steps of a fit of k classes."""
        require_finite(features)
        mean = features.double().mean(dim=0)
        covariance = mean.new_zeros(len(mean), len(mean))
        for rows in features.split(_ROWS_AT_ONCE):
            centred = rows.double() - mean
            covariance.addmm_(centred.T, centred)
        variances, axes = torch.linalg.eigh(covariance / max(1, len(features)))
        dtype = features.dtype
        mean, axes = mean.to(dtype), axes.to(dtype)
        rotated = torch.cat([(rows - mean) @ axes for rows in features.split(_ROWS_AT_ONCE)])
        return cls(rotated, mean, axes, variances.clamp(min=0).to(dtype))


def fit_logistic_regression(
    features: Float[Tensor, "n d"] | PreparedFeatures,
    labels: Int[Tensor, " n"],
    *,
    num_classes: int,
    c: float,
    start: LinearClassifier | None = None,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> LinearClassifier:
    """The minimum of the objective above; the bias is not penalised.

    No autograd, and no more than 2**24 logits at once: what is held beside the features is small.

    Args:
        features: [n d] in fp32 or fp64, in which the fit is computed, on any device; prepared
            where there are several fits of the same.
        labels: int64 [n] in 0 to num_classes - 1.
        num_classes: k; classes without samples get small scores.
        c: inverse strength of the penalty, scikit-learn's C.
        start: where to begin; it changes the time, and the result within the tolerance.
        max_iterations: at most so many steps.
        tolerance: of the largest entry of the gradient of the mean loss, with respect to weights
            scaled to a Hessian near 1.

    Raises:
        ValueError: no samples, features that are not finite, labels out of range, or c not above 0.
    """
    _check_fit(len(features), labels, num_classes=num_classes, c=c)
    if not isinstance(features, PreparedFeatures):
        features = PreparedFeatures.of(features)
    rotated, mean, axes = features.rotated, features.mean, features.axes
    # the Hessian's diagonal where all classes are equally likely; its roots scale the weights
    n = len(labels)
    curvature = (num_classes - 1) / num_classes**2
    scale = (curvature * features.variances + 1 / (c * n)).sqrt()
    penalty = 1 / (c * n * scale.square())
    weight = rotated.new_zeros(num_classes, rotated.shape[1])
    bias = rotated.new_zeros(num_classes)
    if start is not None:
        weight.copy_((start.weight @ axes) * scale)
        bias.copy_(start.bias + start.weight @ mean)
    weight_grad, bias_grad = torch.zeros_like(weight), torch.zeros_like(bias)
    weight.grad, bias.grad = weight_grad, bias_grad
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=torch.finfo(rotated.dtype).eps / 100,  # nothing more is gained
        line_search_fn="strong_wolfe",
    )
    size = max(1, _LOGITS_AT_ONCE // num_classes)
    pieces = list(zip(rotated.split(size), labels.unsqueeze(1).split(size), strict=True))

    def loss_and_gradient() -> Tensor:
        weight_grad.copy_(weight).mul_(penalty)
        bias_grad.zero_()
        loss = (weight.square() * penalty).sum() / 2
        scaled = weight / scale
        for rows, own in pieces:
            logits = torch.addmm(bias, rows, scaled.T)
            log_probabilities = logits.log_softmax(dim=1)
            loss -= log_probabilities.gather(1, own).sum() / n
            error = log_probabilities.exp_()
            error.scatter_add_(1, own, error.new_full(own.shape, -1.0))
            error /= n
            weight_grad.add_((error.T @ rows) / scale)
            bias_grad.add_(error.sum(dim=0))
        heartbeat_and_check_stop()  # shows progress
        return loss

    with torch.no_grad():
        optimizer.step(loss_and_gradient)
        weight = (weight / scale) @ axes.T
        bias = bias - weight @ mean
    return LinearClassifier(weight, bias)


def _check_fit(num_samples: int, labels: Tensor, *, num_classes: int, c: float) -> None:
    if not c > 0 or not math.isfinite(c):
        raise ValueError(f"C must be a positive number, not {c}")
    if num_samples == 0 or len(labels) != num_samples:
        raise ValueError(
            f"a fit needs samples and a label for each, not {num_samples} and {len(labels)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < num_classes:
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}, not {low} to {high}")


def search_peak(
    score: Callable[[int], float], *, size: int, first_step: int
) -> tuple[int, dict[int, float]]:
    """CLIP's parametric binary search over a grid: coarse first, then half as far around the best.

    `score` of a point is better the higher it is, and asked once for each; `first_step`, the
    distance of the first points, is a power of two. Returns the best point (of equals the lowest),
    and all scores that were asked for.
    """
    scores: dict[int, float] = {}

    def best() -> int:
        return max(scores, key=lambda point: (scores[point], -point))

    for point in range(0, size, first_step):
        scores[point] = score(point)
    step = first_step // 2
    while step:
        peak = best()
        for point in (peak - step, peak + step):
            if 0 <= point < size and point not in scores:
                scores[point] = score(point)
        step //= 2
    return best(), scores


@without_tf32()
def evaluate_classifier(
    classifier: LinearClassifier,
    samples: LabelledFeatures,
    *,
    class_names: Sequence[str],
    confusion: bool = False,
) -> ClassificationResult:
    """Counts how often the best class is a label of the sample."""
    counts = ClassificationCounts(class_names, confusion=confusion)
    _count(counts, classifier, samples)
    return _result(counts, samples, what="a linear probe")


def _result(
    counts: ClassificationCounts, samples: LabelledFeatures, *, what: str
) -> ClassificationResult:
    without = samples.num_without_label  # which are not among them
    return dataclasses.replace(counts.result(what=what), num_without_label=without)


def _count(
    counts: ClassificationCounts, classifier: LinearClassifier, samples: LabelledFeatures
) -> None:
    size = max(1, _LOGITS_AT_ONCE // len(classifier.bias))
    for start in range(0, len(samples), size):
        scores = classifier.scores(samples.features[start : start + size])
        counts.add(rank_classes(scores), samples.all_labels[start : start + size])


def hold_out(
    samples: LabelledFeatures, *, fraction: float, seed: int
) -> tuple[LabelledFeatures, LabelledFeatures | None]:
    """Training and validation samples; all and None where so few would choose C at random.

    Those are fewer than four of each class on the average.
    """
    labels = samples.labels.cpu().numpy()
    kept, aside = split_validation(labels, fraction=fraction, seed=seed)
    if len(aside) < _FEWEST_HELD_OUT * len(np.unique(labels)):
        return samples, None
    return samples.take(kept), samples.take(aside)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFit:
    """A fitted probe and its C."""

    classifier: LinearClassifier
    c: float
    chosen_by: Literal["given", "validation", "cross-validation", "default"]
    """How C was chosen; `DEFAULT_C` is taken where no class has two samples."""
    validation: dict[float, float]
    """C -> the metric on the samples held out, of all that were tried, rising C; empty if C was
    given or is the default."""
    num_folds: int = 0
    """Folds of the cross-validation."""


@without_tf32()
def fit_probe(
    train: LabelledFeatures,
    validation: LabelledFeatures | None,
    *,
    class_names: Sequence[str],
    c: float = 0.0,
    metric: Metric = "top1",
    refit: bool = True,
    seed: int = 0,
    max_iterations: int = MAX_ITERATIONS,
    progress: bool = False,
) -> ProbeFit:
    """Fits a probe; with c = 0, C is chosen by a metric on the validation samples.

    Without validation samples it is chosen by cross-validation over the training samples, whose
    folds `seed` draws. With `refit` the result is fitted on training and validation samples
    together, as CLIP does; else on the training samples alone, as few-shot protocols have it.
    `progress` shows a bar.
    """
    scores: dict[int, float] = {}
    classifier: LinearClassifier | None = None
    chosen_by: Literal["given", "validation", "cross-validation", "default"] = "given"
    parts: list[tuple[LabelledFeatures, LabelledFeatures]] = []
    if not c and validation is not None:
        chosen_by, parts = "validation", [(train, validation)]
    elif not c:
        folds = split_folds(train.labels.cpu().numpy(), seed=seed)
        parts = [(train.take(kept), train.take(aside)) for kept, aside in folds]
        chosen_by, c = "cross-validation" if parts else "default", 0.0 if parts else DEFAULT_C
    if parts:
        scores, best, fits = _search_c(
            parts,
            class_names=class_names,
            metric=metric,
            max_iterations=max_iterations,
            progress=progress,
        )
        classifier, c = fits[0], 10 ** LOG10_C[best]
    if classifier is None or refit or validation is None:
        samples = train if validation is None or not refit else train.join(validation)
        classifier = fit_logistic_regression(
            samples.features,
            samples.labels,
            num_classes=len(class_names),
            c=c,
            start=classifier,
            max_iterations=max_iterations,
        )
    validated = {10 ** LOG10_C[point]: scores[point] for point in sorted(scores)}
    num_folds = len(parts) if chosen_by == "cross-validation" else 0
    return ProbeFit(
        classifier=classifier,
        c=c,
        chosen_by=chosen_by,
        validation=validated,
        num_folds=num_folds,
    )


def _search_c(
    parts: Sequence[tuple[LabelledFeatures, LabelledFeatures]],
    *,
    class_names: Sequence[str],
    metric: Metric,
    max_iterations: int,
    progress: bool,
) -> tuple[dict[int, float], int, list[LinearClassifier]]:
    """Searches C for pairs of samples to fit on and samples held out, which are counted together.

    Returns the metric at all points of the grid that were tried, the best point, and its fits.
    """
    fits: dict[int, list[LinearClassifier]] = {}
    prepared = [PreparedFeatures.of(train.features) for train, _ in parts]
    bar = tqdm(desc="fit", unit=" fits", disable=not progress)

    def score(point: int) -> float:
        nearest = min(fits, key=lambda other: abs(other - point), default=None)
        counts = ClassificationCounts(class_names)
        fits[point] = []
        for number, (train, held_out) in enumerate(parts):
            classifier = fit_logistic_regression(
                prepared[number],
                train.labels,
                num_classes=len(class_names),
                c=10 ** LOG10_C[point],
                start=None if nearest is None else fits[nearest][number],
                max_iterations=max_iterations,
            )
            fits[point].append(classifier)
            _count(counts, classifier, held_out)
            bar.update()
        value = counts.result(what="a linear probe").value(metric)
        bar.set_postfix_str(f"C {10 ** LOG10_C[point]:.3g}: {percent(value)} %")
        return value

    best, scores = search_peak(score, size=len(LOG10_C), first_step=_FIRST_STEP)
    bar.close()
    return scores, best, fits[best]


def run_linear_probe(command: LinearProbe) -> None:
    """Extracts features on all ranks; rank 0 fits, prints and writes."""
    dtype = torch.float64 if command.fit_precision == "fp64" else torch.float32
    sets = extract_sets(command, dtype=dtype)
    if sets is None:
        return
    if command.shots:
        values, table = _few_shot(command, sets)
        write_results(command, sets.described(command) | values, table)
        return
    result, values, table = _full_probe(command, sets)
    write_results(command, sets.described(command) | values, table)
    title = f"{sets.test_name}, linear probe"
    draw_confusion(result, sets.class_names, command.figures, "linear-probe", title=title)


def _full_probe(
    command: LinearProbe, sets: ExtractedSets
) -> tuple[ClassificationResult, dict[str, Any], str]:
    """Fits on everything and tests; returns the result, values for the JSON and a table."""
    train, validation = sets.train, sets.validation
    if validation is None and not command.c:
        train, validation = hold_out(train, fraction=command.validation_fraction, seed=command.seed)
    fit = fit_probe(
        train,
        validation,
        class_names=sets.class_names,
        c=command.c,
        metric=sets.metric,
        seed=command.seed,
        max_iterations=command.max_iterations,
        progress=sys.stderr.isatty(),
    )
    values: dict[str, Any] = {"c_chosen_by": fit.chosen_by}
    how = f"chosen by {fit.chosen_by}" if fit.validation else fit.chosen_by
    num_validation = 0 if validation is None else len(validation)
    if fit.num_folds:
        values["num_folds"] = fit.num_folds
        how += f" in {fit.num_folds} folds, since too few images could be set aside"
    if fit.chosen_by == "default":
        logger.warning(_DEFAULT_TAKEN, fit.c)
    if fit.validation:
        tried = [{"c": c, sets.metric: value} for c, value in fit.validation.items()]
        values |= {"validation": tried, "num_validation": num_validation}
        if fit.c in (10 ** LOG10_C[0], 10 ** LOG10_C[-1]):
            print(f"C {fit.c:g} is at the edge of what is searched; a better one may lie beyond")
    num_fitted = len(train) + num_validation
    result = evaluate_classifier(
        fit.classifier,
        sets.test,
        class_names=sets.class_names,
        confusion=command.figures is not None,
    )
    values |= {"c": fit.c, "num_fitted": num_fitted} | result.to_json()
    print(result.to_table())
    print(
        f"C {fit.c:.4g} ({how}), fitted on {count_of(num_fitted, 'sample')}, features of the "
        f"{command.layer}"
    )
    return result, values, classification_table([(sets.test_name, sets.metric, result)])


def _few_shot(command: LinearProbe, sets: ExtractedSets) -> tuple[dict[str, Any], str]:
    """Draws shots, fits and tests; returns values for the JSON and a table."""
    train, validation, names = sets.train, sets.validation, sets.class_names
    labels = train.labels.cpu().numpy()
    counts = np.bincount(labels)
    ways: dict[int, str] = {}
    found: dict[int, list[tuple[float, float]]] = {shots: [] for shots in command.shots}
    work = [(shots, draw) for shots in command.shots for draw in range(command.draws)]
    for shots, draw in tqdm(work, desc="few-shot", disable=not sys.stderr.isatty()):
        kept, aside = draw_shots(labels, shots=shots, seed=command.seed + draw)
        others = validation
        if others is None and len(aside) >= np.count_nonzero(counts):
            others = train.take(aside)
        fit = fit_probe(
            train.take(kept),
            others,
            class_names=names,
            c=command.c,
            metric=sets.metric,
            refit=False,
            seed=command.seed + draw,
            max_iterations=command.max_iterations,
        )
        result = evaluate_classifier(fit.classifier, sets.test, class_names=names)
        found[shots].append((result.value(sets.metric), fit.c))
        if fit.chosen_by == "default" and shots not in ways:
            logger.warning(_DEFAULT_TAKEN, fit.c)
        ways[shots] = fit.chosen_by
    values: list[dict[str, Any]] = []
    rows = []
    for shots, results in found.items():
        draws = np.array([value for value, _ in results])
        spread = float(draws.std(ddof=1)) if len(draws) > 1 else None
        value: dict[str, Any] = {
            "shots": shots,
            "mean": float(draws.mean()),
            "standard_deviation": spread,
        }
        value |= {"draws": draws.tolist(), "c": [c for _, c in results]}
        values.append(value | {"c_chosen_by": ways[shots]})
        deviation = "" if spread is None else percent(spread)
        lowest_to_highest = interval_text((draws.min(), draws.max()))
        rows.append([str(shots), percent(draws.mean()), deviation, lowest_to_highest])
    header = ["shots", f"{RATE_NAMES[sets.metric]}, %", "standard deviation", "range"]
    table = markdown_table(header, rows)
    print(table)
    print(
        f"{count_of(command.draws, 'draw')} each, {len(sets.test):,} test samples, "
        f"{count_of(len(names), 'class')}"
    )
    smallest = int(counts[counts > 0].min())
    if smallest < max(command.shots):
        print(f"the smallest class has {smallest} training samples, and gave all it has")
    return {"shots": values, "num_draws": command.draws, "smallest_class": smallest}, table


def nearest(
    queries: Float[Tensor, "q d"],
    keys: Float[Tensor, "n d"],
    *,
    k: int,
    queries_at_once: int = _QUERIES,
    keys_at_once: int = _KEYS,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Cosines with the k most similar keys, falling, and the rows of these keys.

    Memory is that of queries_at_once * keys_at_once similarities, whatever q and n.
    """
    keys = F.normalize(keys, dim=1)
    found_cosines, found_keys = [], []
    for query in F.normalize(queries, dim=1).split(queries_at_once):
        heartbeat_and_check_stop()  # shows progress
        best = query.new_empty(len(query), 0)
        rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(keys), keys_at_once):
            piece = query @ keys[start : start + keys_at_once].T
            top, where = piece.topk(min(k, piece.shape[1]), dim=1)
            best = torch.cat([best, top], dim=1)
            rows = torch.cat([rows, where + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            rows = rows.gather(1, order)
        found_cosines.append(best)
        found_keys.append(rows)
    return torch.cat(found_cosines), torch.cat(found_keys)


@without_tf32()
def knn_accuracy(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    class_names: Sequence[str],
    ks: Sequence[int],
    temperature: float = 0.07,
    confusion: bool = False,
) -> dict[int, ClassificationResult]:
    """Results for several numbers `ks` of neighbours, from one search.

    Each training sample votes for its first label; `temperature` is positive. `confusion` also
    counts which class is taken for which.

    Raises:
        ValueError: more neighbours than training samples, or features that are not finite.
    """
    if not ks or min(ks) < 1 or max(ks) > len(train):
        raise ValueError(
            f"k must lie in 1 to the {len(train)} training samples, not {', '.join(map(str, ks))}"
        )
    require_finite(train.features, test.features)
    cosines, neighbours = nearest(test.features, train.features, k=max(ks))
    results = {}
    for k in ks:
        counts = ClassificationCounts(class_names, confusion=confusion)
        for start in range(0, len(test), _QUERIES):
            rows = slice(start, start + _QUERIES)
            # relative to the nearest: exp(1 / temperature) may be more than fp32 holds
            votes = ((cosines[rows, :k] - cosines[rows, :1]) / temperature).exp()
            scores = votes.new_zeros(len(votes), len(class_names))
            scores.scatter_add_(1, train.labels[neighbours[rows, :k]], votes)
            # a class without a vote is not found, even if the first five have room for it
            voted = (scores > 0).sum(dim=1).tolist()
            rankings = [best[:n] for best, n in zip(rank_classes(scores), voted, strict=True)]
            counts.add(rankings, test.all_labels[rows])
        results[k] = _result(counts, test, what="nearest neighbours")
    return results


def run_knn(command: Knn) -> None:
    """Extracts features on all ranks; rank 0 searches, prints and writes."""
    sets = extract_sets(command)
    if sets is None:
        return
    results = knn_accuracy(
        sets.train,
        sets.test,
        class_names=sets.class_names,
        ks=command.k,
        temperature=command.temperature,
        confusion=command.figures is not None,
    )
    rows = [(f"k = {k}", sets.metric, result) for k, result in results.items()]
    table = classification_table(rows, mean=False)  # a mean over k would mean nothing
    print(table)
    best = max(results, key=lambda k: results[k].value(sets.metric))
    title = f"{sets.test_name}, {best} nearest neighbours"
    found = [{"k": k} | result.to_json() for k, result in results.items()]
    values = {"temperature": command.temperature, "results": found}
    write_results(command, sets.described(command) | values, table)
    draw_confusion(results[best], sets.class_names, command.figures, "knn", title=title)
