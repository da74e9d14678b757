"""Encoder features of a data set that is evaluated, stored as those of training are.

An evaluation sees the middle of an image, so the files are others than a run's. A model whose
encoder is frozen is then evaluated again in the time of its head, and of a changed data set only
new images are encoded.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import EvaluationLoader
from unicl_fast.dataset.feature_files import feature_key, has_features, read_features
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.ranks import Ranks, from_rank_0
from unicl_fast.evaluation.choices import Layer
from unicl_fast.evaluation.kept_rows import kept_rows
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL, weights_digest

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 4096  # projected at once: 20 MB of 1,280 numbers
_KEY_VERSION = 1  # version of the pipeline, part of the key


class RanksEncoder(Protocol):
    """As `features.ModelOnRanks`, which uses this module."""

    @property
    def model(self) -> UniCL: ...
    @property
    def ranks(self) -> Ranks: ...
    def loader(
        self, dataset: PackedDataset, samples: Sequence[int] | None = None
    ) -> EvaluationLoader: ...
    def encoded(
        self, loader: EvaluationLoader, *, num_samples: int, layer: Layer
    ) -> Iterator[tuple[Tensor, Tensor]]: ...
    def projected(self, rows: NDArray[Any]) -> Tensor: ...


def stored_rows(
    on_ranks: RanksEncoder,
    dataset: PackedDataset,
    folder: Path,
    *,
    layer: Layer,
    says_found: bool = False,
) -> tuple[str, NDArray[Any]]:
    """The key and the features [n w] of a data set, mapped from a file that all ranks make.

    `says_found` logs that they were there.

    Raises:
        SharedRefusal: the file is damaged.
        OSError: the folder cannot be written.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    model, ranks = on_ranks.model, on_ranks.ranks
    family, key = from_rank_0([*keys_of_features(model, dataset, layer=layer)], ranks)
    if says_found and ranks.is_main and has_features(folder, key):
        logger.info("features of %s: found again", dataset.location)
    dtype = "float64" if model.config.efficiency.precision == "fp64" else "float32"
    is_space = layer == "projection" and model.has_space

    def encode(new: Sequence[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        encoder = keys_of_features(model, dataset, layer="encoder")[1]
        if layer == "projection" and has_features(folder, encoder):
            known = read_features(folder, encoder, num_samples=len(dataset), check=False).rows
            mine = np.array(new[ranks.rank :: ranks.world_size])
            for rows_of in np.array_split(mine, len(mine) // ROWS_AT_ONCE + 1):
                yield rows_of, on_ranks.projected(known[rows_of]).numpy().astype(dtype, copy=False)
            return
        loader = on_ranks.loader(dataset, new)
        for numbers, features in on_ranks.encoded(loader, num_samples=len(new), layer=layer):
            yield numbers.numpy(), features.numpy().astype(dtype, copy=False)

    rows = kept_rows(
        folder, key, family=family, items=np.ascontiguousarray(dataset.samples["xxh3"]),
        width=model.config.model.embed_dim if is_space else feature_width(model.image_encoder),
        dtype=dtype, encode=encode, ranks=ranks,
    )  # fmt: skip
    return key, rows


def keys_of_features(model: UniCL, dataset: PackedDataset, *, layer: Layer) -> tuple[str, str]:
    """The names of all features of a model, and of those of a data set."""
    config, prefix = model.config, "image_" if layer == "projection" else "image_encoder."
    of = functools.partial(
        feature_key, config.data, encoder=config.model.image_encoder, layer=layer,
        weights=weights_digest(model, prefix), precision=config.efficiency.precision,
        device_type=model.device.type, view=config.data.evaluation_resize, version=_KEY_VERSION,
    )  # fmt: skip
    return of(None), of(dataset)
