"""Linear probe: logistic regression on frozen features, as CLIP and scikit-learn have it.

For features x, labels y and C > 0 the weights W [k d] and biases b [k] minimise

    C * sum_i cross_entropy(W x_i + b, y_i) + 1/2 |W|^2

by L-BFGS over the full batch. C is chosen on a validation split by CLIP's parametric binary search
(Radford et al., arXiv 2103.00020, appendix A.3), then training and validation samples are fitted
together. Where the features come from is `features`' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.evaluation.classification import (
    ClassificationCounts,
    ClassificationResult,
    Metric,
    rank_classes,
)
from unicl_fast.system.progress import heartbeat_and_check_stop

MAX_ITERATIONS = 1000
"""Of L-BFGS, as CLIP's."""
LOG10_C = tuple(-6 + step / 8 for step in range(97))
"""The grid of the search: 1e-6 to 1e6 in eighths of a decade."""

_FIRST_STEP = 16
_TOLERANCE = 1e-6
"""A hundredth of scikit-learn's default, whose answers differ in the third digit from one start to
another."""
_LOGITS_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 16_384


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

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> PreparedFeatures:
        """Costs 4 n d^2 operations, as much as d / k steps of a fit of k classes.

        Raises:
            ValueError: features that are not finite.
        """
        if not bool(features.isfinite().all()):
            raise ValueError("features hold values that are not finite: the model is broken")
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
    if not c > 0 or not math.isfinite(c):
        raise ValueError(f"C must be a positive number, not {c}")
    n = len(features.rotated if isinstance(features, PreparedFeatures) else features)
    if n == 0 or len(labels) != n:
        raise ValueError(f"a fit needs samples and a label for each, not {n} and {len(labels)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels must lie in 0 to {num_classes - 1}, not {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    if not isinstance(features, PreparedFeatures):
        features = PreparedFeatures.of(features)
    rotated, mean, axes = features.rotated, features.mean, features.axes
    # the Hessian's diagonal where all classes are equally likely; its roots scale the weights
    curvature = (num_classes - 1) / num_classes**2
    scale = (curvature * features.variances + 1 / (c * n)).sqrt()
    penalty = 1 / (c * n * scale.square())
    weight = rotated.new_zeros(num_classes, rotated.shape[1])
    bias = rotated.new_zeros(num_classes)
    if start is not None:
        weight.copy_((start.weight @ axes) * scale)
        bias.copy_(start.bias + start.weight @ mean)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=torch.finfo(rotated.dtype).eps / 100,  # nothing more is gained
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        assert weight.grad is not None
        assert bias.grad is not None
        weight.grad.copy_(weight).mul_(penalty)
        bias.grad.zero_()
        loss = (weight.square() * penalty).sum() / 2
        scaled = weight / scale
        for rows, own in _pieces(rotated, labels, num_classes):
            logits = torch.addmm(bias, rows, scaled.T)
            log_probabilities = logits.log_softmax(dim=1)
            loss -= log_probabilities.gather(1, own).sum() / n
            error = log_probabilities.exp_()
            error.scatter_add_(1, own, error.new_full(own.shape, -1.0))
            error /= n
            weight.grad.add_((error.T @ rows) / scale)
            bias.grad.add_(error.sum(dim=0))
        heartbeat_and_check_stop()  # shows progress
        return loss

    with torch.no_grad():
        optimizer.step(loss_and_gradient)
        weight = (weight / scale) @ axes.T
        bias = bias - weight @ mean
    return LinearClassifier(weight, bias)


def _pieces(features: Tensor, labels: Tensor, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _LOGITS_AT_ONCE // num_classes)
    return list(zip(features.split(size), labels.unsqueeze(1).split(size), strict=True))


def search_peak(
    score: Callable[[int], float], *, size: int, first_step: int
) -> tuple[int, dict[int, float]]:
    """CLIP's parametric binary search over a grid: coarse first, then half as far around the best.

    Args:
        score: of a place of the grid, higher is better; asked once for each place.
        size: of the grid.
        first_step: distance of the first places, a power of two.

    Returns:
        The best place (of equals the lowest), and all scores that were asked for.
    """
    scores: dict[int, float] = {}

    def best() -> int:
        return max(scores, key=lambda place: (scores[place], -place))

    for place in range(0, size, first_step):
        scores[place] = score(place)
    step = first_step // 2
    while step:
        peak = best()
        for place in (peak - step, peak + step):
            if 0 <= place < size and place not in scores:
                scores[place] = score(place)
        step //= 2
    return best(), scores


@dataclass(frozen=True, slots=True)
class LabelledFeatures:
    """Samples with labels: features, the label each is fitted with, and all that count as right."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    """int64, the first label of each."""
    all_labels: Sequence[Sequence[int]]
    num_without_label: int = 0
    """Samples that were left out."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: npt.NDArray[np.int64]) -> LabelledFeatures:
        """Some of them, in the order of `places`."""
        chosen = torch.from_numpy(places)
        return LabelledFeatures(
            self.features[chosen.to(self.features.device)],
            self.labels[chosen.to(self.labels.device)],
            [self.all_labels[place] for place in places.tolist()],
        )

    def join(self, other: LabelledFeatures) -> LabelledFeatures:
        """Both, one after the other."""
        return LabelledFeatures(
            torch.cat([self.features, other.features]),
            torch.cat([self.labels, other.labels]),
            [*self.all_labels, *other.all_labels],
        )


def with_labels(
    features: Float[Tensor, "n d"], labels: Sequence[Sequence[int]], *, what: str
) -> LabelledFeatures:
    """Features of the samples that have labels.

    Args:
        features: [n d] of all samples.
        labels: of each sample.
        what: names the data set in the message.

    Raises:
        ValueError: no sample has one.
    """
    kept = [place for place, own in enumerate(labels) if own]
    if not kept:
        raise ValueError(f"no sample of {what} has a label")
    return LabelledFeatures(
        features if len(kept) == len(labels) else features[torch.tensor(kept)],
        torch.tensor([labels[place][0] for place in kept], device=features.device),
        [labels[place] for place in kept],
        num_without_label=len(labels) - len(kept),
    )


def evaluate_classifier(
    classifier: LinearClassifier,
    samples: LabelledFeatures,
    *,
    class_names: Sequence[str],
    confusion: bool = False,
) -> ClassificationResult:
    """Counts how often the best class is a label of the sample."""
    counts = ClassificationCounts(class_names, confusion=confusion)
    size = max(1, _LOGITS_AT_ONCE // len(class_names))
    for start in range(0, len(samples), size):
        scores = classifier.scores(samples.features[start : start + size])
        counts.add(rank_classes(scores), samples.all_labels[start : start + size])
    return counts.result(what="a linear probe")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeFit:
    """A probe whose C was chosen on validation samples."""

    classifier: LinearClassifier
    c: float
    validation: dict[float, float]
    """C -> the metric on the validation samples, of all that were tried, rising C."""

    @property
    def at_edge(self) -> bool:
        """Whether the best C is the smallest or largest that is tried, and might lie beyond."""
        return self.c in (10 ** LOG10_C[0], 10 ** LOG10_C[-1])


def fit_probe(
    train: LabelledFeatures,
    validation: LabelledFeatures,
    *,
    class_names: Sequence[str],
    metric: Metric = "top1",
    refit: bool = True,
    max_iterations: int = MAX_ITERATIONS,
    tell: Callable[[str], None] = lambda text: None,
) -> ProbeFit:
    """Chooses C on the validation samples, then fits for good.

    Args:
        train: to fit on.
        validation: to choose C by.
        class_names: k names.
        metric: what C is chosen by.
        refit: fit on training and validation samples together at the end, as CLIP does; else on
            the training samples alone, as few-shot protocols have it.
        max_iterations: of each fit.
        tell: gets a line after each fit.
    """
    fits: dict[int, LinearClassifier] = {}
    prepared = PreparedFeatures.of(train.features)

    def score(place: int) -> float:
        nearest = min(fits, key=lambda other: abs(other - place), default=None)
        fits[place] = fit_logistic_regression(
            prepared,
            train.labels,
            num_classes=len(class_names),
            c=10 ** LOG10_C[place],
            start=None if nearest is None else fits[nearest],
            max_iterations=max_iterations,
        )
        value = evaluate_classifier(fits[place], validation, class_names=class_names).value(metric)
        tell(f"C {10 ** LOG10_C[place]:.3g}: {100 * value:.2f} % of validation")
        return value

    best, scores = search_peak(score, size=len(LOG10_C), first_step=_FIRST_STEP)
    classifier = fits[best]
    if refit:
        both = train.join(validation)
        classifier = fit_logistic_regression(
            both.features,
            both.labels,
            num_classes=len(class_names),
            c=10 ** LOG10_C[best],
            start=fits[best],
            max_iterations=max_iterations,
        )
    return ProbeFit(
        classifier=classifier,
        c=10 ** LOG10_C[best],
        validation={10 ** LOG10_C[place]: scores[place] for place in sorted(scores)},
    )


def split_validation(
    labels: npt.NDArray[np.int64], *, fraction: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sets a part of each class aside, drawn by the seed.

    A class gives round(fraction * its samples), but keeps one at least for training.

    Args:
        labels: [n].
        fraction: part of each class for validation, in (0, 1).
        seed: of the draw.

    Returns:
        Places of training and of validation samples, rising.

    Raises:
        ValueError: nothing is left for validation.
    """
    generator = np.random.default_rng(seed)
    taken = []
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        taken.append(places[: min(round(fraction * len(places)), len(places) - 1)])
    validation = np.sort(np.concatenate(taken))
    if not len(validation):
        raise ValueError(
            f"{len(labels)} training samples are too few to set any aside for validation; give a "
            "validation set, or a fixed C"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def draw_shots(
    labels: npt.NDArray[np.int64], *, shots: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Few-shot samples: `shots` of each class to fit on, and min(shots, 4) others to choose C by.

    The rule of CoOp (Zhou et al., arXiv 2109.01134): validation is no larger than few-shot learning
    could afford. A class with too few samples gives what it has, to training first.

    Args:
        labels: [n] of the pool.
        shots: of each class.
        seed: of the draw.

    Returns:
        Places of training and of validation samples; the latter are none if every class has given
        all it has.
    """
    generator = np.random.default_rng([seed, shots])
    train, validation = [], []
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        train.append(places[:shots])
        validation.append(places[shots : shots + min(shots, 4)])
    return np.concatenate(train), np.concatenate(validation)
