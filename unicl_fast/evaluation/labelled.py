"""Features of labelled images, which linear probes and nearest neighbours learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from unicl_fast.evaluation.choices import Layer
from unicl_fast.evaluation.data import EvaluationData, open_data
from unicl_fast.evaluation.features import LoadedModel, ModelOnRanks, require_layer
from unicl_fast.evaluation.report import labels_by_column


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LabelledFeatures:
    """Features of samples with labels, each with at least one."""

    name: str  # name of the data set, for tables and messages
    features: Float[np.ndarray, "n d"]
    all_labels: Sequence[Sequence[int]]
    """Numbers of the classes of each sample; a prediction is right if it is one of them."""
    labels: Int[np.ndarray, " n"]
    """The first label of each sample, which it is fitted with."""
    class_names: tuple[str, ...]
    columns: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    """The classes of each label column, as in `Manifest.columns`."""
    num_without_label: int = 0  # samples without a label, which are left out

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> LabelledFeatures:
        """The samples `rows`, in that order."""
        return dataclasses.replace(
            self,
            features=self.features[rows],
            all_labels=[self.all_labels[row] for row in rows.tolist()],
            labels=self.labels[rows],
            num_without_label=0,
        )

    def join(self, other: LabelledFeatures) -> LabelledFeatures:
        return dataclasses.replace(
            self,
            features=np.concatenate([self.features, other.features]),
            all_labels=[*self.all_labels, *other.all_labels],
            labels=np.concatenate([self.labels, other.labels]),
            num_without_label=self.num_without_label + other.num_without_label,
        )


def with_labels(
    features: Float[np.ndarray, "n d"],
    labels: Sequence[Sequence[int]],
    *,
    name: str,
    class_names: Sequence[str],
    columns: Mapping[str, Sequence[int]] | None = None,
    num_without_label: int = 0,
) -> LabelledFeatures:
    """Keeps the samples that have labels, and counts others; ValueError if none has one."""
    kept = [row for row, own in enumerate(labels) if own]
    if not kept:
        raise ValueError(f"no sample of {name} has a label")
    return LabelledFeatures(
        name=name,
        features=features if len(kept) == len(labels) else features[kept],
        all_labels=[labels[row] for row in kept],
        labels=np.array([labels[row][0] for row in kept], dtype=np.int64),
        class_names=tuple(class_names),
        columns=columns or {"": range(len(class_names))},
        num_without_label=num_without_label + len(labels) - len(kept),
    )


def by_column(*sets: LabelledFeatures) -> dict[str, list[LabelledFeatures]]:
    """The samples of each set with a label in a label column of the first, and only these labels.

    Columns that a set has no label of are left out.
    """
    labels = [labels_by_column(one.all_labels, sets[0].columns) for one in sets]
    return {
        column: [
            with_labels(
                one.features, own[column], name=one.name, class_names=one.class_names,
                columns=one.columns, num_without_label=one.num_without_label,
            )
            for one, own in zip(sets, labels, strict=True)
        ]
        for column in labels[0]
        if all(column in own for own in labels)
    }  # fmt: skip


def labelled_features(
    model: LoadedModel | ModelOnRanks,
    *specs: str | Path,
    layer: Layer = "encoder",
    folder: Path | None = None,
) -> list[LabelledFeatures]:
    """Features and labels of data sets, in fp32 or fp64, on rank 0; an empty list on others.

    Args:
        model: encodes the images.
        specs: labelled images, written as `--data` of `unicl-eval zero-shot`. Labels number the
            classes of the first data set; classes of the others are matched by name.
        layer: CLIP's linear probes use the encoder.
        folder: stores the encoder's features, by a checksum of weights and images.

    Raises:
        ValueError: no labels, a class that the first data set lacks, or the features after the
            projection of a model that has none.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    on_ranks = ModelOnRanks.of(model)
    encoders, ranks = on_ranks.model, on_ranks.ranks
    require_layer(encoders, layer)
    found: list[LabelledFeatures] = []
    first: EvaluationData | None = None
    for spec in specs:
        with open_data(str(spec), ranks=ranks) as data:
            first = first or data
            labels = data.labels_among(first)
            rows = on_ranks.features(data.dataset, layer=layer, folder=folder)
            if rows is not None:
                names, columns = first.class_names, first.dataset.manifest.columns
                found.append(with_labels(
                    rows.numpy(), labels, name=data.name, class_names=names, columns=columns
                ))  # fmt: skip
    return found
