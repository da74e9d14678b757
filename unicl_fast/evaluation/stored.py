"""Encoder features of a data set that is evaluated, stored as those of training are.

An evaluation sees the middle of an image, so the files are others than a run's. A model whose
encoder is frozen is then evaluated again in the time of its head.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import EvaluationLoader
from unicl_fast.dataset import feature_files
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_integers, rank_0_alone
from unicl_fast.evaluation.choices import Layer
from unicl_fast.models.image_encoder import feature_width
from unicl_fast.models.unicl import UniCL, weights_digest

logger = logging.getLogger(__name__)

_KEY_VERSION = 1  # version of the pipeline, part of the key


class RanksEncoder(Protocol):
    """As `features.ModelOnRanks`, which uses this module."""

    @property
    def model(self) -> UniCL: ...
    @property
    def ranks(self) -> Ranks: ...
    def loader(self, dataset: PackedDataset) -> EvaluationLoader: ...
    def encoded(
        self, loader: EvaluationLoader, *, num_samples: int, layer: Layer
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


def key_of_features(model: UniCL, dataset: PackedDataset, *, layer: Layer) -> str:
    """The name of the stored features of a data set; evaluations see a central crop."""
    config, prefix = model.config, "image_" if layer == "projection" else "image_encoder."
    return feature_files.feature_key(
        config.data, dataset, encoder=config.model.image_encoder, layer=layer,
        weights=weights_digest(model, prefix), precision=config.efficiency.precision,
        device_type=model.device.type, view=config.data.evaluation_resize, version=_KEY_VERSION,
    )  # fmt: skip


def stored_rows(
    on_ranks: RanksEncoder,
    dataset: PackedDataset,
    folder: Path,
    *,
    layer: Layer,
    says_found: bool = False,
) -> NDArray[Any]:
    """Features [n w] of a data set, mapped from a file, which all ranks make if needed.

    `says_found` logs that they were there.

    Raises:
        SharedRefusal: the file is damaged.
        OSError: the folder cannot be written.
        EvaluationStopped: a stop was requested; raised on all ranks.
    """
    model, ranks = on_ranks.model, on_ranks.ranks
    key = from_rank_0(key_of_features(model, dataset, layer=layer), ranks)
    has = functools.partial(feature_files.has_features, folder, key)
    if from_rank_0(has(), ranks):
        if says_found and ranks.is_main:
            logger.info("features of %s: found again", dataset.location)
    else:
        with contextlib.ExitStack() as stack:
            with rank_0_alone(ranks):
                if ranks.is_main:
                    stack.enter_context(feature_files.sole_storer(folder, key))
            if not from_rank_0(has(), ranks):  # another process may have stored them meanwhile
                _encode_into(folder, key, on_ranks, dataset, layer)
    with refused_together(ranks):
        # one rank is enough: the check reads the whole file
        size, check = len(dataset), ranks.is_main
        return feature_files.read_features(folder, key, num_samples=size, check=check).rows


def _encode_into(
    folder: Path, key: str, on_ranks: RanksEncoder, dataset: PackedDataset, layer: Layer
) -> None:
    """Encodes a data set into the file of that key, on all ranks."""
    model, ranks, num_samples = on_ranks.model, on_ranks.ranks, len(dataset)
    is_space = layer == "projection" and model.has_space
    width = model.config.model.embed_dim if is_space else feature_width(model.image_encoder)
    dtype = "float64" if model.config.efficiency.precision == "fp64" else "float32"
    with rank_0_alone(ranks):
        if ranks.is_main:
            kind = np.dtype(dtype).str
            feature_files.make_rows(folder, key, num_samples=num_samples, width=width, kind=kind)
    with contextlib.closing(feature_files.RowsWriter(folder, key)) as writer:
        loader = on_ranks.loader(dataset)
        for samples, features in on_ranks.encoded(loader, num_samples=num_samples, layer=layer):
            writer.write(samples.numpy(), features.numpy().astype(dtype, copy=False))
        writer.flush()
    gather_integers(0, ranks)  # once all have written
    with rank_0_alone(ranks):
        if ranks.is_main:
            every = np.ones(num_samples, np.bool_)
            feature_files.seal_rows(folder, key, dtype=dtype, stored=every, unreadable=())
