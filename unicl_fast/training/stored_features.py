"""Features of frozen encoders: stored once, and fed instead of images and texts from then on.

A frozen encoder gives a text the same features in every epoch, and an image too unless there are
random crops, flips or augmentation. They are encoded once; a step then costs only the rest of the
model. They are stored unrounded, and found by a hash of all that they depend on
(`efficiency.stored_features`). Images are encoded in the order of a run's own loader, so a step
would have encoded the same; a run shorter than its data encodes only the images and texts it draws.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch
from unicl_fast.dataset.feature_files import (
    FeatureFile,
    KnownRows,
    as_tensor,
    bits_of,
    has_features,
    read_features,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, from_rank_0, tensors_from_rank_0, tensors_to_rank_0
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.system.bar import Bar
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.wording import count_of
from unicl_fast.text.token_rows import TokenArray, distinct_texts, hashes_of, lengths_of
from unicl_fast.training.encoding import encoder_autocast, encoder_input, in_pieces
from unicl_fast.training.kept_rows import RECORDED_AT_ONCE, Store, all_stored, kept_rows, storing
from unicl_fast.training.stages import PlannedLoader

logger = logging.getLogger("unicl_fast")

_VERSION = 3  # part of the keys; a change abandons all stored features
_TEXTS_AT_ONCE = 128  # 256 is no faster on two cores


def stored_image_features(
    model: UniCL,
    datasets: Sequence[PackedDataset],
    *,
    build_loader: Callable[[], PlannedLoader],
    num_draws: int | None,
    on_first_batch: Callable[[Batch], None],
    ranks: Ranks,
    progress: bool = False,
) -> list[FeatureFile]:
    """The features of images, encoded now if they are not stored; all ranks call it.

    `model` is on the device, its image encoder with its final weights; its config names the folder,
    which all ranks share. `build_loader` builds a loader of all data sets with the run's own views;
    its first `num_draws` samples are needed, or None: all. `on_first_batch` gets the first batch
    whose images are encoded.

    Raises:
        SharedRefusal: stored features are damaged.
        OSError: the folder cannot be written.
    """
    folder = Path(model.config.efficiency.stored_features)
    mark("looking for stored features", patience=START_PATIENCE)
    # data sets with the same images share a file
    weights = weights_digest(model, "image_encoder.")
    keys = from_rank_0([_key_of(model, one, weights) for one in datasets], ranks)
    sizes = dict(zip(keys, map(len, datasets), strict=True))
    encoded = 0
    if from_rank_0(not all(all_stored(folder, *one) for one in sizes.items()), ranks):
        mark("waiting for runs that store the same features", waits_for_ranks=True)
        with storing(folder, sizes, ranks) as store, contextlib.closing(build_loader()) as loader:
            images = _Images(model, keys, store, ranks)
            encoded = images.encode(loader, num_draws, on_first_batch, progress=progress)
    mark("reading stored features", patience=START_PATIENCE)
    with refused_together(ranks):
        files = [  # checksums are compared once, by rank 0
            read_features(folder, key, num_samples=len(dataset), check=ranks.is_main)
            for dataset, key in zip(datasets, keys, strict=True)
        ]
    how = f"{count_of(encoded, 'image')} encoded" if encoded else "found again"
    logger.info("features of images: %s in %s", how, folder)
    return files


def find_stored(model: UniCL, dataset: PackedDataset) -> NDArray[np.float32] | None:
    """A data set's features [n w] that a run has stored, NaN for missing rows; None for none."""
    folder = Path(model.config.efficiency.stored_features)
    key = _key_of(model, dataset, weights_digest(model, "image_encoder."))
    if not model.config.efficiency.stored_features or not has_features(folder, key):
        return None
    file = read_features(folder, key, num_samples=len(dataset), check=False)
    rows = as_tensor(np.array(file.rows), file.dtype).float().numpy()
    rows[~file.stored] = np.nan
    rows[sorted(file.unreadable)] = np.nan
    return rows


def feature_key(
    model: UniCL, dataset: PackedDataset | None, *, view: Any, weights: str, **more: Any
) -> str:
    """The key of a data set's features: equal if and only if the features are.

    Without a data set: of all features made in the same way. `view` is the part of an image shown,
    beyond the config's sizes, and `weights` the digest of those that affect features. `view` and
    `more` are JSON values.
    """
    config, data = model.config, model.config.data
    images = b"" if dataset is None else dataset.samples["xxh3"].tobytes()
    return _hash_of(
        model, weights, encoder=config.model.image_encoder,
        images=[xxhash.xxh3_64_hexdigest(images), len(images) // 8],
        view=[data.image_size, view, data.interpolation, data.resample],
        normalisation=[*data.mean, *data.std], decode_device=data.decode_device, **more,
    )  # fmt: skip


def _key_of(model: UniCL, dataset: PackedDataset, weights: str) -> str:
    data = model.config.data
    view = data.crop_ratio[0] if data.part_shown == 1 else [data.crop_ratio[0], data.part_shown]
    return feature_key(model, dataset, view=view, weights=weights, max_pixels=data.max_pixels)


def _key_of_texts(model: UniCL) -> str:
    """A hash of all that features of texts depend on, besides their tokens."""
    given = dataclasses.asdict(model.config.model)
    facts = {name: given[name] for name in given if name.startswith("text_")}
    del facts["text_projection"]
    weights, length = weights_digest(model, "text_encoder."), model.config.model.context_length
    return _hash_of(model, weights, length=length, **facts)


def _hash_of(model: UniCL, weights: str, **facts: Any) -> str:
    facts |= {
        "weights": weights,
        "precision": model.config.efficiency.precision,
        "device": model.device.type,
        "version": _VERSION,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


class _Images:
    """Encodes batches, each rank its own."""

    def __init__(self, model: UniCL, keys: Sequence[str], store: Store, ranks: Ranks) -> None:
        """`keys` are each data set's."""
        self._model, self._keys, self._store, self._ranks = model, list(keys), store, ranks

    def encode(
        self,
        loader: PlannedLoader,
        num_draws: int | None,
        on_first_batch: Callable[[Batch], None],
        *,
        progress: bool,
    ) -> int:
        """Stores what a loader's first `num_draws` samples lack; returns how many were encoded."""
        size, plan, stored = loader.plan.global_batch_size, loader.plan, self._store.stored
        before = sum(map(np.count_nonzero, stored.values()))
        steps = -(-(num_draws or sum(plan.sizes)) // size)
        while num_draws is None and min(plan.epochs(steps)) < 1:
            steps += 1
        missing, count = np.zeros(steps * size, np.bool_), 0
        sources, samples = plan.schedule(0, steps, rank=0, world_size=1)
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero(sources == number)
            missing[mine] = ~stored[key][samples[mine]]
            count += len(np.unique(samples[mine][missing[mine]]))
        if not count:
            return 0
        first = int(missing.argmax()) // size
        logger.info(
            "encoding %s once, for %s", count_of(count, "image"),
            self._model.config.efficiency.stored_features,
        )  # fmt: skip
        side = self._model.config.data.image_size
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self._model.device)
        with (
            _in_evaluation_mode(self._model),
            self._store.writing(**_kind_of(self._encode(blank))),
            Bar(desc="encode images", total=(steps - first) * size, shown=progress) as bar,
        ):
            batches = itertools.islice(loader.batches(first), steps - first)
            for number in range(first + 1, steps + 1):
                mark("storing features", number, patience=START_PATIENCE, waits_for_ranks=True)
                batch = next(batches)
                if number == first + 1:
                    on_first_batch(batch)
                self._write(batch)
                bar.update(size)
                if number == steps or not number % max(1, RECORDED_AT_ONCE // size):
                    self._store.record()
        return sum(map(np.count_nonzero, stored.values())) - before

    def _write(self, batch: Batch) -> None:
        """Writes the rows of a batch that are not stored, and collects the unreadable samples."""
        assert batch.source_ids is not None
        assert batch.sample_ids is not None
        assert batch.scheduled_ids is not None
        sources, shown = batch.source_ids.numpy(), batch.sample_ids.numpy()
        scheduled, lacks = batch.scheduled_ids.numpy(), np.zeros(batch.batch_size, np.bool_)
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero(sources == number)
            lacks[mine] = ~self._store.stored[key][shown[mine]]
            self._store.leave_out(key, scheduled[mine][shown[mine] != scheduled[mine]])
        if not lacks.any():
            return
        bits = bits_of(self._encode(batch.images))
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero((sources == number) & lacks)
            self._store.write(key, shown[mine], bits[mine])

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """Features of images as the encoder gives them in a step, on the host."""
        model, config = self._model, self._model.config
        at_once = config.efficiency.micro_batch_size or len(images)
        pieces = (piece for part in images.split(at_once) for piece in in_pieces(part))
        with encoder_autocast(config.efficiency, self._ranks, images.device.type):
            return torch.cat(
                [model.image_encoder(encoder_input(one, config)) for one in pieces]
            ).cpu()


def _kind_of(features: Tensor) -> dict[str, Any]:
    return {"width": features.shape[1], "dtype": str(features.dtype).removeprefix("torch.")}


def stored_text_features(
    model: UniCL, tokens: TokenArray, folder: Path, *, ranks: Ranks, progress: bool = False
) -> KnownRows:
    """The features of texts [m l], padded with 0, encoded now if they are not stored.

    All ranks call it with the same folder, each with any texts; all get the features of all.
    `model` is on its device, its text encoder with its final weights. Texts are encoded beside
    others of their length, so nothing depends on the number of ranks.

    Raises:
        SharedRefusal: stored features are damaged.
        OSError: the folder cannot be written.
    """
    family = from_rank_0(_key_of_texts(model), ranks)
    with refused_together(ranks):
        stored = KnownRows(folder, family, check=ranks.is_main)
    lacking = np.ascontiguousarray(tokens[stored.find(hashes_of(tokens)) < 0], np.uint32)
    parts = tensors_to_rank_0({str(ranks.rank): torch.from_numpy(lacking.view(np.int32))}, ranks)
    united = {}
    if ranks.is_main:
        each = [one.numpy().view(np.uint32) for one in parts.values()]
        united["tokens"] = torch.from_numpy(distinct_texts(*each).view(np.int32))
    wanted = tensors_from_rank_0(united, ranks)["tokens"].numpy().view(np.uint32)
    if not len(wanted):
        return stored
    logger.info("encoding %s once, for %s", count_of(len(wanted), "text"), folder)
    lengths, items = lengths_of(wanted), hashes_of(wanted)

    def encode(new: Sequence[int]) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        batches = [
            group[start : start + _TEXTS_AT_ONCE]
            for group in (list(one) for _, one in itertools.groupby(new, lengths.__getitem__))
            for start in range(0, len(group), _TEXTS_AT_ONCE)
        ]
        for number, batch in enumerate(batches):
            if number % ranks.world_size == ranks.rank:
                mark("storing features of texts", number, patience=START_PATIENCE)
                rows = wanted[batch, : max(1, int(lengths[batch[0]]))]
                yield np.array(batch), bits_of(_encode_texts(model, rows, ranks))
            bar.update(len(batch))

    with (
        _in_evaluation_mode(model),
        Bar(desc="encode texts", total=len(wanted), shown=progress) as bar,
    ):
        kept_rows(
            folder, xxhash.xxh3_128_hexdigest(family.encode() + items.tobytes()), family=family,
            items=items, **_kind_of(_encode_texts(model, wanted[:1], ranks)), encode=encode,
            ranks=ranks, at_once=RECORDED_AT_ONCE, known=stored,
        )  # fmt: skip
    with refused_together(ranks):
        return KnownRows(folder, family, check=False)


@contextlib.contextmanager
def _in_evaluation_mode(model: UniCL) -> Iterator[None]:
    """As frozen parts are in a step; an evaluation may have come with a model in training mode."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@torch.no_grad()
def _encode_texts(model: UniCL, rows: TokenArray, ranks: Ranks) -> Tensor:
    """Features [k w] of texts of one length, as the encoder gives them in a step, on the host."""
    tokens = torch.from_numpy(rows.astype(np.int64)).to(model.device)
    with encoder_autocast(model.config.efficiency, ranks, model.device.type):
        return model.text_encoder(tokens).cpu()  # type: ignore[no-any-return]
