"""Features of a frozen image encoder: stored in one epoch, and fed instead of images from then on.

A frozen encoder gives an image the same features in every epoch, unless crops, flips or
augmentation are drawn. They are encoded once, and a step costs the text encoder alone. They are
stored unrounded, and found by a hash of all that they depend on (`efficiency.image_features`). The
epoch is one of the run's own loader, so a step would have encoded the same.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch, Loader
from unicl_fast.dataset.feature_files import (
    FeatureFile,
    RowsWriter,
    feature_key,
    has_features,
    make_rows,
    partial_path,
    read_features,
    seal_features,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, gather_objects, rank_0_alone
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.pipelines.plan.plan import TrainPlan
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.wording import count_of
from unicl_fast.training.encoding import encoder_autocast, encoder_input

logger = logging.getLogger("unicl_fast")

_VERSION = 1  # part of the keys; a change abandons all stored features


class EpochLoader(Loader, Protocol):
    """A loader of whole epochs, by its plan."""

    plan: TrainPlan


def stored_features(
    model: UniCL,
    datasets: Sequence[PackedDataset],
    *,
    build_loader: Callable[[], EpochLoader],
    on_first_batch: Callable[[Batch], None],
    ranks: Ranks,
    device: torch.device,
) -> list[FeatureFile]:
    """The features of all samples, encoded now if they are not stored; all ranks call it.

    `model` is on the device, its image encoder with its final weights; its config names the folder,
    which all ranks share. `build_loader` builds a loader of all data sets by their sizes, with the
    run's own views; `on_first_batch` gets the first batch whose images are encoded.

    Raises:
        SharedRefusal: stored features are damaged.
        OSError: the folder cannot be written.
    """
    folder = Path(model.config.efficiency.image_features)
    mark("looking for stored features", patience=START_PATIENCE)
    weights = weights_digest(model, "image_encoder.")
    keys = from_rank_0([_key_of(model, one, weights, device) for one in datasets], ranks)
    # data sets with the same images share the file of the first
    missing = from_rank_0(
        [n for n, key in enumerate(keys) if not has_features(folder, key) and key not in keys[:n]],
        ranks,
    )
    if missing:
        _store(model, datasets, keys, missing, build_loader, on_first_batch, ranks)
    mark("reading stored features", patience=START_PATIENCE)
    check = ranks.is_main  # reads all of them, once
    with refused_together(ranks):
        files = [
            read_features(folder, key, num_samples=len(dataset), check=check)
            for dataset, key in zip(datasets, keys, strict=True)
        ]
    for number, dataset in enumerate(datasets):
        how = "stored" if number in missing else "found again"
        logger.info("features of %s: %s in %s", dataset.location, how, folder)
    return files


def find_stored(model: UniCL, dataset: PackedDataset) -> NDArray[np.float32] | None:
    """A data set's features [n w] that a run has stored, NaN for missing rows; None for none."""
    folder = Path(model.config.efficiency.image_features)
    key = _key_of(model, dataset, weights_digest(model, "image_encoder."), model.device)
    if not model.config.efficiency.image_features or not has_features(folder, key):
        return None
    file = read_features(folder, key, num_samples=len(dataset), check=False)
    rows = torch.from_numpy(np.array(file.rows)).view(getattr(torch, file.dtype)).float().numpy()
    rows[[n for n in range(len(rows)) if file.row(n) is None]] = np.nan
    return rows


def _key_of(model: UniCL, dataset: PackedDataset, weights: str, device: torch.device) -> str:
    config, data = model.config, model.config.data
    return feature_key(
        data, dataset, encoder=config.model.image_encoder, precision=config.efficiency.precision,
        weights=weights, device_type=device.type, view=data.crop_ratio[0], version=_VERSION,
        max_pixels=data.max_pixels,
    )  # fmt: skip


def _store(
    model: UniCL,
    datasets: Sequence[PackedDataset],
    keys: Sequence[str],
    missing: Sequence[int],
    build_loader: Callable[[], EpochLoader],
    on_first_batch: Callable[[Batch], None],
    ranks: Ranks,
) -> None:
    """Encodes one epoch, each rank its local batches, into files that all ranks write to."""
    config, folder = model.config, Path(model.config.efficiency.image_features)
    token = from_rank_0(secrets.token_hex(4), ranks)  # no other run's, in any container
    asides = {number: partial_path(folder, keys[number], token) for number in missing}
    total = sum(map(len, datasets))
    logger.info("encoding %s once, for %s", count_of(total, "image"), folder)
    rows_of: dict[int, RowsWriter] = {}
    unreadable: dict[int, set[int]] = {number: set() for number in missing}
    dtype = ""
    model.train()  # as in a step: frozen parts are in evaluation mode
    try:
        with contextlib.closing(build_loader()) as loader:
            steps = -(-total // config.run.global_batch_size)
            while min(loader.plan.epochs(steps)) < 1:
                steps += 1
            batches = itertools.islice(loader.batches(0), steps)
            for number in range(1, steps + 1):
                phase = f"storing features of batch {number} of {steps}"
                mark(phase, patience=START_PATIENCE, waits_for_ranks=True)
                batch = next(batches)
                if number == 1:
                    on_first_batch(batch)
                features = _encode(model, batch, ranks)
                dtype, bits = str(features.dtype).removeprefix("torch."), _bits_of(features)
                if not rows_of:
                    with rank_0_alone(ranks):
                        if ranks.is_main:
                            make_folder(folder)
                            width, kind = bits.shape[1], bits.dtype.str
                            for number, aside in asides.items():
                                size = len(datasets[number])
                                make_rows(aside, num_samples=size, width=width, kind=kind)
                    rows_of = {number: RowsWriter(aside) for number, aside in asides.items()}
                _write(batch, bits, rows_of, unreadable)
        for rows in rows_of.values():
            rows.flush()
        found = gather_objects([sorted(unreadable[number]) for number in missing], ranks)
        with rank_0_alone(ranks):
            if ranks.is_main:
                for place, number in enumerate(missing):
                    bad = set().union(*(one[place] for one in found))
                    seal_features(asides[number], folder, keys[number], dtype=dtype, unreadable=bad)
    finally:
        for rows in rows_of.values():
            rows.close()
        if ranks.is_main:
            for aside in asides.values():
                aside.unlink(missing_ok=True)


@torch.no_grad()
def _encode(model: UniCL, batch: Batch, ranks: Ranks) -> Tensor:
    """Features of a batch as the encoder gives them in a step, on the host."""
    pieces = batch.images.split(model.config.efficiency.micro_batch_size or len(batch.images))
    with encoder_autocast(model.config.efficiency, ranks, batch.images.device.type):
        features = [model.image_encoder(encoder_input(one, model.config)) for one in pieces]
    return torch.cat(features).cpu()


def _bits_of(features: Tensor) -> NDArray[Any]:
    """Features as NumPy knows them, which has no bfloat16."""
    known = features.view(torch.uint16) if features.dtype == torch.bfloat16 else features
    return known.contiguous().numpy()


def _write(
    batch: Batch,
    bits: NDArray[Any],
    rows_of: dict[int, RowsWriter],
    unreadable: dict[int, set[int]],
) -> None:
    """Writes the rows of a batch, and collects the samples that others replaced."""
    assert batch.source_ids is not None
    assert batch.sample_ids is not None
    assert batch.scheduled_ids is not None
    sources, shown = batch.source_ids.numpy(), batch.sample_ids.numpy()
    scheduled = batch.scheduled_ids.numpy()
    for number, rows in rows_of.items():
        mine = np.flatnonzero(sources == number)
        rows.write(scheduled[mine], bits[mine])
        unreadable[number].update(scheduled[mine][shown[mine] != scheduled[mine]].tolist())
