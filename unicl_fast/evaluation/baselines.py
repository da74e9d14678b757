"""Baselines that need minutes to write: what frozen image features give without a contrastive run.

For labels the nearest training image, and logistic regression; for captions ridge regression from
image features to tf-idf, so that a text finds the images whose predicted words are most similar. A
trained model should beat all of them. `bases` compares encoders by them, and `of_run` computes them
for the model of a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions, all_labels
from unicl_fast.evaluation.features import ModelOnRanks
from unicl_fast.evaluation.labelled import LabelledFeatures, kept_features, with_labels
from unicl_fast.evaluation.probes import linear_probe, nearest_neighbours, require_scikit_learn
from unicl_fast.evaluation.report import (
    ClassificationResult,
    interval_text,
    percent,
    wilson_interval,
)
from unicl_fast.evaluation.retrieval import RetrievalResult, rank_captions
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.data import folder_and_weight, open_datasets
from unicl_fast.training.stored_features import find_stored

Kind = Literal["labels", "captions"]
MOST_IMAGES = 20_000
"""Two cores encode so many in two to fifteen minutes; more training images have no baselines."""
_MOST_FITTED = 2e9  # images x width x classes of a logistic regression: about a minute of fits
_C_GRID = (1e-3, 1e-2, 0.1, 1.0)  # for standardised features
_MOST_WORDS = 20_000
_PENALTY = 5.0  # of ridge regression, as a multiple of the width of standardised features
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A rate of correct answers."""

    name: str  # top-1, or R@k: texts that find their image among the first k
    num_right: int
    num_tried: int

    @property
    def rate(self) -> float:
        """In 0 to 1."""
        return self.num_right / self.num_tried

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, for 95 %."""
        return wilson_interval(self.num_right, self.num_tried)

    def __str__(self) -> str:
        return f"{percent(self.rate)} ({interval_text(self.interval)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A method and its figures."""

    name: str
    figures: tuple[Figure, ...]
    cpu_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        figures = {
            one.name: asdict(one) | {"rate": one.rate, "interval_95": one.interval}
            for one in self.figures
        }
        return {"name": self.name, "figures": figures, "cpu_seconds": self.cpu_seconds}

    def cells(self, names: Sequence[str]) -> list[str]:
        """The figures `names` and the CPU seconds, as cells of a table."""
        figures = {one.name: str(one) for one in self.figures}
        seconds = "" if self.cpu_seconds is None else f"{self.cpu_seconds:.1f}"
        return [*(figures.get(name, "") for name in names), seconds]


def figure_names(methods: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(one.name for method in methods for one in method.figures))


def top_1(result: ClassificationResult) -> tuple[Figure, ...]:
    right, tried = result.num_correct, result.num_samples
    return (Figure(name="top-1", num_right=right, num_tried=tried),)


def recalls(result: RetrievalResult) -> tuple[Figure, ...]:
    """R@1, 5 and 10 of texts that find images."""
    return tuple(
        Figure(name=f"R@{one.k}", num_right=one.num_found, num_tried=one.num_queries)
        for one in result.text_to_image
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The training or the held-out part: features, labels and captions of n samples."""

    features: Float[np.ndarray, "n d"]
    labels: Sequence[Sequence[int]]
    """Numbers of classes of the held-out part; can be empty, as captions can."""
    captions: Sequence[tuple[str, ...]]

    def take(self, rows: Sequence[int]) -> Part:
        return Part(
            features=self.features[list(rows)],
            labels=[self.labels[row] for row in rows],
            captions=[self.captions[row] for row in rows],
        )

    def labelled(self, class_names: Sequence[str]) -> LabelledFeatures:
        return with_labels(self.features, self.labels, name="the data", class_names=class_names)

    def captioned(self) -> Part:
        """The samples with captions."""
        return self.take([row for row, own in enumerate(self.captions) if own])

    def known(self) -> Part:
        """The samples with features."""
        rows = np.flatnonzero(np.isfinite(self.features).all(axis=1))
        return self.take(rows.tolist())

    @property
    def texts(self) -> list[str]:
        return [text for own in self.captions for text in own]

    def ranked(self, images: NDArray[Any], texts: NDArray[Any]) -> RetrievalResult:
        """Ranks n images and all `texts` of them by the products of their rows."""
        owners = np.repeat(np.arange(len(self.captions)), list(map(len, self.captions)))
        number_of = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        ids = torch.tensor([number_of[text] for text in self.texts])
        rows = (torch.from_numpy(np.ascontiguousarray(one, np.float32)) for one in (images, texts))
        return rank_captions(*rows, torch.from_numpy(owners), ids)


def part_of(
    dataset: PackedDataset, features: Float[np.ndarray, "n d"], class_names: Sequence[str]
) -> Part:
    """A data set's part; labels that `class_names` lack are left out, and so cannot mislead."""
    number_of = {name: number for number, name in enumerate(class_names)}
    table = [number_of.get(name) for name in dataset.manifest.class_names]
    own = ([table[label] for label in labels] for labels in all_labels(dataset))
    captions: list[tuple[str, ...]] = [()] * len(dataset)
    if dataset.manifest.num_captions:
        captions = [one.captions for one in all_descriptions(dataset)]
    labels = [[label for label in one if label is not None] for one in own]
    return Part(features=features, labels=labels, captions=captions)


@contextlib.contextmanager
def cpu_clock() -> Iterator[list[float]]:
    """Receives the CPU seconds of the block."""
    seconds: list[float] = []
    start = time.process_time()
    yield seconds
    seconds.append(time.process_time() - start)


def standardised(
    train: Float[np.ndarray, "n d"], *others: Float[np.ndarray, "m d"]
) -> list[Float[np.ndarray, "k d"]]:
    """Features with the mean and deviation of `train` taken out, in fp32."""
    mean = train.mean(axis=0, dtype=np.float64)
    deviation = train.std(axis=0, dtype=np.float64)
    # a dimension that hardly varies in training must not blow up a test image
    scale = np.maximum(deviation, 1e-3 * deviation.max() or 1.0)
    return [((one - mean) / scale).astype(np.float32) for one in (train, *others)]


def label_baselines(train: LabelledFeatures, test: LabelledFeatures) -> list[Measured]:
    """The nearest neighbour by cosine, and logistic regression on standardised features.

    Regression is left out if it would take minutes. Raises as `probes.linear_probe`.
    """
    with cpu_clock() as seconds:
        (nearest,) = nearest_neighbours(train, test, ks=(1,)).values()
    found = [Measured(name="nearest neighbour", figures=top_1(nearest), cpu_seconds=seconds.pop())]
    num_classes = len(np.unique(train.labels))
    if num_classes < 2 or train.features.size * num_classes > _MOST_FITTED:
        return found
    with cpu_clock() as seconds:
        rows = standardised(train.features, test.features)
        fitted, tested = (replace(one, features=rows.pop(0)) for one in (train, test))
        probe = linear_probe(fitted, tested, c_grid=_C_GRID)
    name = f"logistic regression, C {probe.c:g}"
    return [
        *found, Measured(name=name, figures=top_1(probe.classes), cpu_seconds=seconds.pop()),
    ]  # fmt: skip


def caption_baseline(train: Part, test: Part) -> Measured:
    """Ridge regression from standardised features to tf-idf of words; texts find images by cosine.

    All samples have captions. Raises ValueError for captions without words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    with cpu_clock() as seconds:
        vectorizer = TfidfVectorizer(max_features=_MOST_WORDS)
        words = vectorizer.fit_transform(" ".join(own) for own in train.captions)
        x, y = (one.astype(np.float64) for one in standardised(train.features, test.features))
        gram = x.T @ x + _PENALTY * x.shape[1] * np.eye(x.shape[1])
        # solved here, since scikit-learn's Ridge would store the words of all images densely; x has
        # zero mean, so the intercept is the mean
        weights = np.linalg.solve(gram, (words.T @ x).T)
        mean = np.asarray(words.mean(axis=0))
        norms = [
            np.linalg.norm(mean + y[start : start + _ROWS_AT_ONCE] @ weights, axis=1)
            for start in range(0, len(y), _ROWS_AT_ONCE)
        ]
        # an image's predicted words times a text's, as products of d + 1 numbers
        asked = vectorizer.transform(test.texts)
        texts = np.concatenate([asked @ weights.T, asked @ mean.T], axis=1)
        images = np.concatenate([y, np.ones((len(y), 1))], axis=1) / np.concatenate(norms)[:, None]
        result = test.ranked(images, texts)
    return Measured(name="ridge to tf-idf", figures=recalls(result), cpu_seconds=seconds.pop())


def baselines(
    train: Part,
    test: Part,
    *,
    class_names: Sequence[str],
    kinds: Sequence[Kind] = ("labels", "captions"),
) -> list[Measured]:
    """All baselines of these `kinds` that both parts have labels or captions for."""
    require_scikit_learn()
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    found = list[Measured]()
    # matrices are small: two threads on busy cores took ten times the CPU time of one
    with threadpool_limits(1, user_api="blas"):
        if "labels" in kinds and any(train.labels) and any(test.labels):
            found += label_baselines(train.labelled(class_names), test.labelled(class_names))
        if "captions" in kinds and any(train.captions) and any(test.captions):
            found.append(caption_baseline(train.captioned(), test.captioned()))
    return found


def of_run(
    model: UniCL,
    held_out: PackedDataset,
    *,
    kind: Kind,
    folder: Path | None,
    encodes: bool = True,
    progress: bool = False,
) -> list[Measured] | str:
    """The baselines on the features of a run's image encoder, or a phrase why there are none.

    In this process alone, and never an error, since the run's own figures matter more.

    Args:
        model: a run's, whose config names its training data.
        held_out: the evaluated data.
        kind: which baselines.
        folder: keeps features, as in `labelled_features`.
        encodes: encodes training images whose features are not stored, up to `MOST_IMAGES`.
        progress: shows bars.
    """
    on_ranks = ModelOnRanks(model, progress=progress)
    try:
        require_scikit_learn()  # before images are encoded
        return _of_run(on_ranks, held_out, kind, folder, encodes)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return str(error).strip().split("\n")[0]


def _of_run(
    on_ranks: ModelOnRanks,
    held_out: PackedDataset,
    kind: Kind,
    folder: Path | None,
    encodes: bool,
) -> list[Measured]:
    data, names = on_ranks.model.config.data, held_out.manifest.class_names
    for place, _ in map(folder_and_weight, data.train):
        if is_url(place) or not (Path(place) / MANIFEST_NAME).is_file():
            raise FileNotFoundError(f"the training data {place} are not on this machine")
    weights = weights_digest(on_ranks.model, "image_encoder.", "image_projection")

    def encode(dataset: PackedDataset) -> NDArray[Any]:
        rows = kept_features(
            on_ranks, dataset, layer="encoder", weights=weights, folder=folder,
            name=dataset.location,
        )  # fmt: skip
        assert rows is not None
        return rows

    with contextlib.ExitStack() as stack:
        datasets = [stack.enter_context(one) for one in open_datasets(data, verify=False)[0]]
        known = {name for one in datasets for name in one.manifest.class_names}
        if kind == "labels" and (unknown := [name for name in names if name not in known]):
            raise ValueError(f"the training data lack the class {unknown[0]!r}")
        asked = [
            one
            for one in datasets
            if (one.manifest.class_names if kind == "labels" else one.manifest.num_captions)
        ]
        if not asked:
            raise ValueError(f"the training data have no {kind}")
        found_rows = [find_stored(on_ranks.model, one) for one in asked]
        missing = [one for one, rows in zip(asked, found_rows, strict=True) if rows is None]
        total = sum(map(len, (*missing, held_out)))
        if missing and not encodes:
            raise ValueError(f"the features of {missing[0].location} are not stored")
        if total > MOST_IMAGES:
            raise ValueError(f"{count_of(total, 'image')} would be encoded, over {MOST_IMAGES:,}")
        parts = [
            part_of(one, encode(one) if rows is None else rows, names)
            for one, rows in zip(asked, found_rows, strict=True)
        ]
        train = Part(
            features=np.concatenate([one.features for one in parts]),
            labels=[own for one in parts for own in one.labels],
            captions=[own for one in parts for own in one.captions],
        ).known()
        rows = encode(held_out)
        found = baselines(train, part_of(held_out, rows, names), class_names=names, kinds=[kind])
    if not found:
        raise ValueError(f"the training data have no {kind} in common with {held_out.location}")
    return found


def beside_table(ours: Measured, found: Sequence[Measured]) -> str:
    """A table of a model's figures and the baselines, and a sentence for baselines that win."""
    names = figure_names([ours])
    table = markdown_table(
        ["on the same image features", *(f"{name}, %" for name in names), "CPU s"],
        [[one.name, *one.cells(names)] for one in (ours, *found)],
    )
    ahead = [f"{one.name} ({better})" for one in found if (better := _better(one, ours))]
    if not ahead:
        return table
    return (
        f"{table}\n\nBELOW A BASELINE: {ours.name} finds less than {' and '.join(ahead)}: "
        "freeze both encoders and train heads on stored features, for longer, or choose other "
        "encoders by unicl-eval bases"
    )


def _better(one: Measured, ours: Measured) -> str:
    """The figures in which a method is ahead."""
    own = {figure.name: figure.rate for figure in ours.figures}
    return ", ".join(
        f"{figure.name} {percent(figure.rate)} against {percent(own[figure.name])} %"
        for figure in one.figures
        if figure.rate > own[figure.name]
    )
