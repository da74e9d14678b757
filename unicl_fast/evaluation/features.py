"""Features of labelled images: extracted once over all ranks, kept in a folder, put beside labels.

A linear probe and its many fits, nearest neighbours and the first head of fine-tuning need the same
features again and again, and only the encoder takes long. The name of a stored file is a
checksum of everything that decides the features, so nothing stale is ever read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.checkpoints.load import find_model
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import from_rank_0
from unicl_fast.evaluation.data import EvaluationData, open_data
from unicl_fast.evaluation.encode import device_of, model_on_ranks
from unicl_fast.evaluation.requests import FrozenFeatures, Layer, Metric
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.atomic_files import replacing
from unicl_fast.system.keyed_random import fold_key, uniform_tensor

logger = logging.getLogger(__name__)

_SPLIT, _SHOTS = 1, 2
"""Purposes of random numbers, so that a split and a draw of one seed differ."""
_KEY_VERSION = 1
"""Version of what decides features beside `feature_key`'s facts; raised when the pipeline changes.
"""


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

    def to(self, dtype: torch.dtype) -> LabelledFeatures:
        """The same with features of another type."""
        return dataclasses.replace(self, features=self.features.to(dtype))

    def take(self, rows: NDArray[np.int64]) -> LabelledFeatures:
        """Some of them, in the order of `rows`."""
        chosen = torch.from_numpy(rows).to(self.labels.device)
        return LabelledFeatures(
            self.features[chosen],
            self.labels[chosen],
            [self.all_labels[row] for row in rows.tolist()],
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
    """Features of the samples that have labels; `what` names the data set in the message.

    Raises:
        ValueError: no sample has a label.
    """
    kept = [row for row, own in enumerate(labels) if own]
    if not kept:
        raise ValueError(f"no sample of {what} has a label")
    return LabelledFeatures(
        features if len(kept) == len(labels) else features[torch.tensor(kept)],
        torch.tensor([labels[row][0] for row in kept], device=features.device),
        [labels[row] for row in kept],
        num_without_label=len(labels) - len(kept),
    )


def split_validation(
    labels: NDArray[np.int64], *, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sets a part of each class aside, drawn by the seed.

    A class gives round(fraction * its samples), but keeps one at least for training.

    Returns:
        Rows of training and of validation samples, rising.

    Raises:
        ValueError: nothing is left for validation.
    """
    validation = np.sort(
        np.concatenate(
            [
                rows[: min(round(fraction * len(rows)), len(rows) - 1)]
                for rows in _shuffled_classes(labels, fold_key(seed, _SPLIT))
            ]
        )
    )
    if not len(validation):
        raise ValueError(
            f"{len(labels)} training samples are too few to set any aside for validation; give a "
            "validation set, or a fixed C"
        )
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def draw_shots(
    labels: NDArray[np.int64], *, shots: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Few-shot samples: `shots` of each class to fit on, and min(shots, 4) others to choose C by.

    The rule of CoOp (Zhou et al., arXiv 2109.01134): validation is no larger than few-shot learning
    could afford. A class with too few samples gives all it has, to training first.

    Returns:
        Rows of training and of validation samples; the latter are none if every class has given
        all it has.
    """
    classes = _shuffled_classes(labels, fold_key(seed, _SHOTS, shots))
    train = [rows[:shots] for rows in classes]
    return np.concatenate(train), np.concatenate(
        [rows[shots : shots + min(shots, 4)] for rows in classes]
    )


def _shuffled_classes(labels: NDArray[np.int64], key: int) -> list[NDArray[np.int64]]:
    """The rows of each class, in an order that a key decides, whatever NumPy's version."""
    order = uniform_tensor(key, torch.arange(len(labels))).argsort(stable=True).numpy()
    return [order[labels[order] == label] for label in np.unique(labels)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractedSets:
    """Features of the data sets of one command on rank 0, on the device that fits."""

    train: LabelledFeatures
    test: LabelledFeatures
    validation: LabelledFeatures | None
    class_names: tuple[str, ...]
    """Classes of the training data; the labels of all sets are numbers of these."""
    test_name: str
    metric: Metric
    """The metric that is reported first."""

    def to(self, dtype: torch.dtype) -> ExtractedSets:
        """The same with features of another type."""
        validation = None if self.validation is None else self.validation.to(dtype)
        train, test = self.train.to(dtype), self.test.to(dtype)
        return dataclasses.replace(self, train=train, test=test, validation=validation)

    def described(self, command: FrozenFeatures) -> dict[str, object]:
        """The first values of a report."""
        return {
            "train": command.train,
            "data": command.data,
            "layer": command.layer,
            "num_train": len(self.train),
            "num_test": len(self.test),
            "num_features": self.train.features.shape[1],
            "metric": self.metric,
        }


def extract_sets(command: FrozenFeatures) -> ExtractedSets | None:
    """Features and labels of the data sets of a command; None on all ranks but rank 0.

    Raises:
        ValueError: a class that the training data lacks, or a set without labels.
    """
    found: list[LabelledFeatures] = []
    opened: list[EvaluationData] = []
    with model_on_ranks(command) as on_ranks:
        model, ranks = on_ranks.model, on_ranks.ranks
        if command.layer == "projection" and model.image_projection is None:
            raise ValueError(
                "features behind the projection were asked for, and this model, trained by "
                "cross-entropy, has no projection: take those of the encoder (--layer encoder)"
            )
        folder = _features_folder(command)
        weights = weights_checksum(model)
        for spec in command.data_sets():
            with open_data(spec, ranks=ranks, metric=command.metric) as data:
                opened.append(data)
                labels = data.labels_among(opened[0])
                key = feature_key(model, data.dataset, layer=command.layer, weights=weights)
                path = None if folder is None else folder / f"{key}.npy"
                features = None
                if from_rank_0(path is not None and path.is_file(), ranks):
                    if ranks.is_main and path is not None:
                        features = load_features(path, num_samples=len(data.dataset))
                        print(f"features of {spec}: found again")
                else:
                    features = on_ranks.features(data.dataset, layer=command.layer)
                    if features is not None and path is not None:
                        keep_features(path, features)
                if features is not None:
                    found.append(with_labels(features.to(device_of(model)), labels, what=spec))
    if not found:
        return None
    return ExtractedSets(
        train=found[0],
        test=found[1],
        validation=found[2] if len(found) > 2 else None,
        class_names=opened[0].class_names,
        test_name=opened[1].name,
        metric=opened[1].metric,
    )


def weights_checksum(model: UniCL) -> str:
    """XXH3 of everything that turns images into features, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(("image_encoder.", "image_projection")):
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_key(model: UniCL, dataset: PackedDataset, *, layer: Layer, weights: str) -> str:
    """A name for the features of a data set: equal if and only if the features would be."""
    data, efficiency = model.config.data, model.config.efficiency
    images: NDArray[np.uint64] = np.ascontiguousarray(dataset.samples["xxh3"])
    facts = {
        "version": _KEY_VERSION,
        "weights": weights,
        "layer": layer,
        "images": [xxhash.xxh3_64_hexdigest(images.tobytes()), len(dataset)],
        "encoder": model.config.model.image_encoder,
        "view": [data.image_size, data.evaluation_resize, data.interpolation, data.resample],
        "normalisation": [*data.mean, *data.std],
        "precision": efficiency.precision,
        "device": device_of(model).type,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def load_features(path: Path, *, num_samples: int) -> Float[Tensor, "n d"]:
    """Reads kept features.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = np.load(path, allow_pickle=False)
        if values.ndim != 2 or len(values) != num_samples or values.dtype.kind != "f":
            raise ValueError(
                f"{num_samples} rows of features were expected, {values.dtype} "
                f"{list(values.shape)} came"
            )
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}; remove it") from error
    return torch.from_numpy(values)


def keep_features(path: Path, features: Float[Tensor, "n d"]) -> None:
    """Writes features whole or not at all; a disk that refuses is a warning and no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside, aside.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
    except OSError as error:
        logger.warning("features are not kept: %s cannot be written: %s", path, error)


def _features_folder(command: FrozenFeatures) -> Path | None:
    if command.features != "auto":
        return None if command.features == "none" else Path(command.features)
    folder = find_model(command.checkpoint).parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "features"
