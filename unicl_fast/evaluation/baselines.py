"""Baselines that need minutes to write: what frozen image features give without a contrastive run.

For labels the nearest training image, and logistic regression; for captions ridge regression to
tf-idf. A trained model should beat all of them. `bases` compares encoders by them, and `of_run`
computes them for the model of a run.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.evaluation.data import all_descriptions, all_labels
from unicl_fast.evaluation.features import ModelOnRanks
from unicl_fast.evaluation.labelled import LabelledFeatures, by_column, with_labels
from unicl_fast.evaluation.predicted import PredictedWords, standardised
from unicl_fast.evaluation.probes import linear_probe, nearest_neighbours, require_scikit_learn
from unicl_fast.evaluation.report import (
    ClassificationResult,
    interval_text,
    percent,
    wilson_interval,
)
from unicl_fast.evaluation.retrieval import (
    Recall,
    RetrievalFeatures,
    RetrievalResult,
    rank_captions,
    rank_images,
)
from unicl_fast.evaluation.signals import Scores, fuse, standardise
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import count_of, markdown_table
from unicl_fast.training.data import folder_and_weight, open_datasets
from unicl_fast.training.stored_features import find_stored

Kind = Literal["labels", "captions"]
TOGETHER = "both together, as in unicl-eval search"
MOST_IMAGES = 20_000
"""Images encoded for the baselines of a run: two cores need two to fifteen minutes."""
MOST_STORED = 100_000  # training images, whose features need 1 GB in fp64
_MOST_FITTED = 2e9  # images x width x classes of a logistic regression: about a minute of fits
_C_GRID = (1e-3, 1e-2, 0.1, 1.0)  # for standardised features


@dataclass(frozen=True, slots=True)
class Figure:
    """A rate of correct answers, in 0 to 1, and its 95 % interval."""

    rate: float
    interval_95: tuple[float, float]
    num_tried: int

    @classmethod
    def of(cls, num_right: int, num_tried: int) -> Figure:
        return cls(num_right / num_tried, wilson_interval(num_right, num_tried), num_tried)

    def __str__(self) -> str:
        return f"{percent(self.rate)} ({interval_text(self.interval_95)})"


Figures = dict[str, Figure]
"""By name: top-1, for several label columns with their names, and R@k for texts that find their
image among the first k."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A method and its figures."""

    name: str
    figures: Figures
    cpu_seconds: float | None = None

    @classmethod
    def timed(cls, name: str, measure: Callable[[], Figures]) -> Measured:
        start = time.process_time()
        figures = measure()
        return cls(name, figures, time.process_time() - start)

    def cells(self, names: Iterable[str]) -> list[str]:
        """The figures `names` and the CPU seconds, as cells of a table."""
        seconds = "" if self.cpu_seconds is None else f"{self.cpu_seconds:.1f}"
        return [*(str(self.figures.get(name, "")) for name in names), seconds]


def top_1(results: Mapping[str, ClassificationResult]) -> Figures:
    return {
        f"top-1 {column}".rstrip(): Figure.of(one.num_correct, one.num_samples)
        for column, one in results.items()
    }


def recalls(of_texts: Iterable[Recall]) -> Figures:
    return {f"R@{one.k}": Figure.of(one.num_found, one.num_queries) for one in of_texts}


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

    def only(self, kind: Kind) -> Part:
        """Without captions, or without labels."""
        if kind == "labels":
            return replace(self, captions=[()] * len(self.captions))
        return replace(self, labels=[()] * len(self.labels))

    def labelled(
        self, class_names: Sequence[str], columns: Mapping[str, Sequence[int]]
    ) -> LabelledFeatures:
        return with_labels(
            self.features, self.labels, name="the data", class_names=class_names, columns=columns
        )

    def captioned(self) -> Part:
        """The samples with captions."""
        return self.take([row for row, own in enumerate(self.captions) if own])

    @property
    def texts(self) -> list[str]:
        return [text for own in self.captions for text in own]

    def ranked(self, images: NDArray[Any], texts: NDArray[Any]) -> RetrievalResult:
        """Ranks n images and all `texts` of them by the products of their rows."""
        owners = np.repeat(np.arange(len(self.captions)), list(map(len, self.captions)))
        number_of = {text: number for number, text in enumerate(dict.fromkeys(self.texts))}
        ids = torch.tensor([number_of[text] for text in self.texts])
        first, second = (
            torch.from_numpy(np.ascontiguousarray(one, np.float32)) for one in (images, texts)
        )
        return rank_captions(first, second, torch.from_numpy(owners), ids)


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


def encoder_features(
    on_ranks: ModelOnRanks, dataset: PackedDataset, *, folder: Path | None
) -> Float[np.ndarray, "n d"]:
    """Features of the image encoder, in this process alone, kept in `folder`."""
    assert on_ranks.ranks.world_size == 1
    rows = on_ranks.features(dataset, layer="encoder", folder=folder)
    assert rows is not None
    return rows.numpy()


def _nearest(train: LabelledFeatures, test: LabelledFeatures) -> ClassificationResult:
    return nearest_neighbours(train, test, ks=(1,))[1]


def _regression(train: LabelledFeatures, test: LabelledFeatures) -> ClassificationResult | None:
    num_classes = len(np.unique(train.labels))
    if num_classes < 2 or train.features.size * num_classes >= _MOST_FITTED:
        return None
    rows = standardised(train.features, test.features)
    fitted, tested = (replace(one, features=rows.pop(0)) for one in (train, test))
    with warnings.catch_warnings():  # of a class for every other image, which a small shop has
        warnings.filterwarnings("ignore", "The number of unique classes")
        return linear_probe(fitted, tested, c_grid=_C_GRID).classes


def _each(
    method: Callable[..., ClassificationResult | None],
    pairs: Mapping[str, Sequence[LabelledFeatures]],
) -> Figures:
    results = {column: method(*pair) for column, pair in pairs.items()}
    return top_1({column: one for column, one in results.items() if one is not None})


def _by_captions(train: Part, test: Part, ours: RetrievalFeatures | None) -> list[Measured]:
    """Ridge regression, by which a text finds the images of the most similar predicted words.

    All samples have captions.
    """
    start = time.process_time()
    words = PredictedWords(train.features, train.captions)
    images, texts = words.of_images(test.features), words.of_texts(test.texts)
    figures = recalls(test.ranked(images, texts).text_to_image)
    found = [Measured("ridge to tf-idf", figures, time.process_time() - start)]
    if ours is not None:
        found.append(Measured.timed(TOGETHER, partial(_together, images, texts, ours)))
    return found


def _together(
    images: Float[np.ndarray, "n e"], texts: Float[np.ndarray, "m e"], ours: RetrievalFeatures
) -> Figures:
    """As a search ranks by images and predicted words, of equal weights."""
    our_images, our_texts = (one.cpu().numpy() for one in (ours.image_features, ours.text_features))

    def scores_of(rows: slice) -> Tensor:
        products: Scores = {
            "images": our_texts[rows] @ our_images.T, "predicted": texts[rows] @ images.T
        }  # fmt: skip
        return torch.from_numpy(fuse(standardise(products), dict.fromkeys(products, 1.0)))

    return recalls(rank_images(scores_of, ours.image_of_text.cpu(), ours.text_ids.cpu()))


def baselines(
    train: Part,
    test: Part,
    *,
    class_names: Sequence[str],
    columns: Mapping[str, Sequence[int]],
    ours: RetrievalFeatures | None = None,
) -> list[Measured]:
    """The baselines that both parts have labels, of each label column, or captions for.

    `TOGETHER` is with `ours`.

    Raises as `linear_probe`. Logistic regression is left out if it would take minutes.
    """
    require_scikit_learn()
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    found = list[Measured]()
    # matrices are small: two threads on busy cores took ten times the CPU time of one
    with threadpool_limits(1, user_api="blas"):
        if any(train.labels) and any(test.labels):
            pairs = by_column(*(one.labelled(class_names, columns) for one in (train, test)))
            methods = {"nearest neighbour": _nearest, "logistic regression": _regression}
            for name, method in methods.items():
                one = Measured.timed(name, partial(_each, method, pairs))
                found += [one] * bool(one.figures)
        if any(train.captions) and any(test.captions):
            found += _by_captions(train.captioned(), test.captioned(), ours)
    return found


def of_run(
    model: UniCL,
    held_out: PackedDataset,
    *,
    kind: Kind,
    folder: Path | None,
    encodes: bool = True,
    ours: Callable[[], RetrievalFeatures | None] | None = None,
) -> list[Measured] | str:
    """The baselines on the features of a run's image encoder, or a phrase why there are none.

    In this process alone, and never an error, since the run's own figures matter more.

    Args:
        model: a run's, whose config names its training data.
        held_out: the evaluated data.
        kind: which baselines.
        folder: keeps features, as in `labelled_features`.
        encodes: encodes training images whose features are not stored, up to `MOST_IMAGES`.
        ours: returns the model's features of images and captions; `TOGETHER` is then measured, too.
    """
    names, columns = held_out.manifest.class_names, held_out.manifest.columns
    on_ranks = ModelOnRanks(model, progress=sys.stderr.isatty())
    encode = partial(encoder_features, on_ranks, folder=folder)
    try:
        require_scikit_learn()  # before images are encoded
        train = training_part(
            model, names if kind == "labels" else (),
            encode=encode if encodes else None, num_others=len(held_out),
        )  # fmt: skip
        test = part_of(held_out, encode(held_out), names)
        parts = (one.only(kind) for one in (train, test))
        features = None if ours is None else ours()
        found = baselines(*parts, class_names=names, columns=columns, ours=features)
        return found or f"no {kind} are in both parts"
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        return str(error).strip().split("\n")[0]


def training_part(
    model: UniCL,
    class_names: Sequence[str] = (),
    *,
    encode: Callable[[PackedDataset], Float[np.ndarray, "n d"]] | None = None,
    num_others: int = 0,
) -> Part:
    """The training images of a run, with stored features, or those that `encode` returns.

    `num_others` images are encoded beside them. Labels number `class_names`. ValueError and OSError
    say why there are no features.
    """
    data = model.config.data
    for place, _ in map(folder_and_weight, data.train):
        if is_url(place) or not (Path(place) / MANIFEST_NAME).is_file():
            raise FileNotFoundError(f"the training data {place} are not on this machine")
    with contextlib.ExitStack() as stack:
        datasets = [stack.enter_context(one) for one in open_datasets(data, verify=False)[0]]
        known = {name for one in datasets for name in one.manifest.class_names}
        if unknown := [name for name in class_names if name not in known]:
            raise ValueError(f"the training data lack the class {unknown[0]!r}")
        if (total := sum(map(len, datasets))) > MOST_STORED:
            raise ValueError(f"{count_of(total, 'training image')} are over {MOST_STORED:,}")
        stored = [find_stored(model, one) for one in datasets]
        missing = [one for one, rows in zip(datasets, stored, strict=True) if rows is None]
        if missing and encode is None:
            raise ValueError(f"the features of {missing[0].location} are not stored")
        if (total := sum(map(len, missing)) + num_others) > MOST_IMAGES:
            raise ValueError(f"{count_of(total, 'image')} would be encoded, over {MOST_IMAGES:,}")
        parts = []
        for one, rows in zip(datasets, stored, strict=True):
            if rows is None:
                assert encode is not None
                rows = encode(one)
            parts.append(part_of(one, rows, class_names))
    features = np.concatenate([one.features for one in parts])
    joined = Part(
        features=features,
        labels=[own for one in parts for own in one.labels],
        captions=[own for one in parts for own in one.captions],
    )
    has_row = np.isfinite(features).all(axis=1)
    return joined.take(np.flatnonzero(has_row).tolist())


def beside_table(ours: Measured, found: Sequence[Measured], *, freeze: Sequence[str] = ()) -> str:
    """A table of a model's figures and the baselines, and a sentence for baselines that win.

    `freeze` is the run's `optim.freeze`.
    """
    table = markdown_table(
        ["on the same image features", *(f"{name}, %" for name in ours.figures), "CPU s"],
        [[one.name, *one.cells(ours.figures)] for one in (ours, *found)],
    )
    ahead, by_chance = list[str](), True
    for one in found:
        higher = list[str]()
        for name, own in ours.figures.items() if one.name != TOGETHER else ():
            if (figure := one.figures.get(name)) is not None and figure.rate > own.rate:
                higher.append(f"{name} {percent(figure.rate)} against {percent(own.rate)} %")
                by_chance = by_chance and figure.rate <= own.interval_95[1]
        ahead += [f"{one.name} ({', '.join(higher)})"] * bool(higher)
    if not ahead:
        return table
    begin = "perhaps by chance below a baseline" if by_chance else "BELOW A BASELINE"
    heads = "train heads on two frozen encoders (--preset photos-heads), for longer"
    if {"image", "text"} <= set(freeze):
        heads = "unicl-eval search ranks by both; train for longer"
    return (
        f"{table}\n\n{begin}: {ours.name} finds less than {' and '.join(ahead)}: "
        f"{heads}, or choose other encoders by unicl-eval bases"
    )
