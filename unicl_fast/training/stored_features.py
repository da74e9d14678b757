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
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.batch import Batch, Loader
from unicl_fast.dataset.feature_files import (
    FeatureFile,
    RowsWriter,
    feature_key,
    has_features,
    make_rows,
    read_features,
    seal_rows,
    sole_storer,
)
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.text_files import (
    TextFeatures,
    distinct_texts,
    lengths_of,
    read_text_features,
    write_text_features,
)
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import (
    Ranks,
    from_rank_0,
    gather_integers,
    gather_objects,
    rank_0_alone,
    tensors_from_rank_0,
    tensors_to_rank_0,
)
from unicl_fast.models.unicl import UniCL, weights_digest
from unicl_fast.pipelines.plan.plan import TrainPlan
from unicl_fast.system.bar import Bar
from unicl_fast.system.phases import START_PATIENCE, mark
from unicl_fast.system.wording import count_of
from unicl_fast.text.token_rows import TokenArray
from unicl_fast.training.encoding import encoder_autocast, encoder_input, in_pieces

logger = logging.getLogger("unicl_fast")

_VERSION = 2  # part of the keys; a change abandons all stored features
_SEALED_AT_ONCE = 16_384
"""Images, or texts, between two resume points: about 80 s of a small encoder on two cores."""
_TEXTS_AT_ONCE = 128  # 256 is no faster on two cores


class EpochLoader(Loader, Protocol):
    """A loader of whole epochs, by its plan."""

    plan: TrainPlan


def stored_image_features(
    model: UniCL,
    datasets: Sequence[PackedDataset],
    *,
    build_loader: Callable[[], EpochLoader],
    num_draws: int | None,
    on_first_batch: Callable[[Batch], None],
    ranks: Ranks,
    device: torch.device,
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
    weights = weights_digest(model, "image_encoder.")
    # data sets with the same images share a file
    keys = from_rank_0([_key_of(model, one, weights, device) for one in datasets], ranks)
    sizes = dict(zip(keys, map(len, datasets), strict=True))
    encoded = 0
    if from_rank_0(not all(_stored(folder, *one)[0].all() for one in sizes.items()), ranks):
        with contextlib.ExitStack() as stack:
            mark("waiting for runs that store the same features", waits_for_ranks=True)
            if ranks.is_main:
                for key in sorted(sizes):
                    stack.enter_context(sole_storer(folder, key))
            found = {key: _stored(folder, key, sizes[key]) for key in sizes}
            loader = stack.enter_context(contextlib.closing(build_loader()))
            store = _Store(model, folder, keys, found, ranks)
            encoded = store.fill(loader, num_draws, on_first_batch, progress=progress)
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
    key = _key_of(model, dataset, weights_digest(model, "image_encoder."), model.device)
    if not model.config.efficiency.stored_features or not has_features(folder, key):
        return None
    file = read_features(folder, key, num_samples=len(dataset), check=False)
    rows = torch.from_numpy(np.array(file.rows)).view(getattr(torch, file.dtype)).float().numpy()
    rows[~file.stored] = np.nan
    rows[sorted(file.unreadable)] = np.nan
    return rows


def _stored(folder: Path, key: str, size: int) -> tuple[NDArray[np.bool_], frozenset[int]]:
    """The samples that are stored under a key, and the unreadable ones among them."""
    if not has_features(folder, key):
        return np.zeros(size, np.bool_), frozenset()
    found = read_features(folder, key, num_samples=size, check=False)
    return found.stored, found.unreadable


def _key_of(model: UniCL, dataset: PackedDataset, weights: str, device: torch.device) -> str:
    config, data = model.config, model.config.data
    view = data.crop_ratio[0] if data.part_shown == 1 else [data.crop_ratio[0], data.part_shown]
    return feature_key(
        data, dataset, encoder=config.model.image_encoder, precision=config.efficiency.precision,
        weights=weights, device_type=device.type, view=view, version=_VERSION,
        max_pixels=data.max_pixels,
    )  # fmt: skip


class _Store:
    """Encodes batches, each rank its own, into files that all ranks write to."""

    def __init__(
        self,
        model: UniCL,
        folder: Path,
        keys: Sequence[str],
        found: dict[str, tuple[NDArray[np.bool_], frozenset[int]]],
        ranks: Ranks,
    ) -> None:
        """`keys` are each data set's; `found` says on rank 0 what is stored under each."""
        self._model, self._folder, self._keys, self._ranks = model, folder, list(keys), ranks
        stored = {key: torch.from_numpy(one) for key, (one, _) in found.items()}
        unreadable = {key: sorted(one) for key, (_, one) in found.items()}
        # other ranks might see other files
        self._stored = {key: one.numpy() for key, one in tensors_from_rank_0(stored, ranks).items()}
        self._unreadable = {key: set(one) for key, one in from_rank_0(unreadable, ranks).items()}
        self._fresh: dict[str, list[int]] = {key: [] for key in found}  # stored by this rank
        self._dtype = ""

    def fill(
        self,
        loader: EpochLoader,
        num_draws: int | None,
        on_first_batch: Callable[[Batch], None],
        *,
        progress: bool,
    ) -> int:
        """Stores what a loader's first `num_draws` samples lack; returns how many were encoded."""
        size, plan, before = loader.plan.global_batch_size, loader.plan, self._count()
        steps = -(-(num_draws or sum(plan.sizes)) // size)
        while num_draws is None and min(plan.epochs(steps)) < 1:
            steps += 1
        missing, count = np.zeros(steps * size, np.bool_), 0
        sources, samples = plan.schedule(0, steps, rank=0, world_size=1)
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero(sources == number)
            missing[mine] = ~self._stored[key][samples[mine]]
            count += len(np.unique(samples[mine][missing[mine]]))
        if not count:
            return 0
        first = int(missing.argmax()) // size
        logger.info("encoding %s once, for %s", count_of(count, "image"), self._folder)
        with (
            _in_evaluation_mode(self._model),
            self._open() as writers,
            Bar(desc="encode images", total=(steps - first) * size, shown=progress) as bar,
        ):
            batches = itertools.islice(loader.batches(first), steps - first)
            for number in range(first + 1, steps + 1):
                phase = f"storing features of batch {number} of {steps}"
                mark(phase, patience=START_PATIENCE, waits_for_ranks=True)
                batch = next(batches)
                if number == first + 1:
                    on_first_batch(batch)
                self._write(batch, writers)
                bar.update(size)
                if number == steps or not number % max(1, _SEALED_AT_ONCE // size):
                    self._seal(writers)
        return self._count() - before

    def _count(self) -> int:
        return sum(int(np.count_nonzero(one)) for one in self._stored.values())

    @contextlib.contextmanager
    def _open(self) -> Iterator[dict[str, RowsWriter]]:
        """The files, made if needed, for the shape and type of this encoder's features."""
        side = self._model.config.data.image_size
        blank = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self._model.device)
        features = self._encode(blank)
        self._dtype = str(features.dtype).removeprefix("torch.")
        bits = _bits_of(features)
        with rank_0_alone(self._ranks):
            for key, stored in self._stored.items() if self._ranks.is_main else ():
                shape = {"num_samples": len(stored), "width": bits.shape[1]}
                make_rows(self._folder, key, **shape, kind=bits.dtype.str)
        with contextlib.ExitStack() as stack:
            writers = {key: RowsWriter(self._folder, key) for key in self._stored}
            for one in writers.values():
                stack.callback(one.close)
            yield writers

    def _write(self, batch: Batch, writers: dict[str, RowsWriter]) -> None:
        """Writes the rows of a batch that are not stored, and collects the unreadable samples."""
        assert batch.source_ids is not None
        assert batch.sample_ids is not None
        assert batch.scheduled_ids is not None
        sources, shown = batch.source_ids.numpy(), batch.sample_ids.numpy()
        scheduled, lacks = batch.scheduled_ids.numpy(), np.zeros(batch.batch_size, np.bool_)
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero(sources == number)
            lacks[mine] = ~self._stored[key][shown[mine]]
            bad = scheduled[mine][shown[mine] != scheduled[mine]].tolist()
            self._unreadable[key].update(bad)
            self._keep(key, bad)
        if not lacks.any():
            return
        bits = _bits_of(self._encode(batch.images))
        for number, key in enumerate(self._keys):
            mine = np.flatnonzero((sources == number) & lacks)
            writers[key].write(shown[mine], bits[mine])
            self._keep(key, shown[mine].tolist())

    def _keep(self, key: str, samples: list[int]) -> None:
        self._stored[key][samples] = True
        self._fresh[key] += samples

    def _seal(self, writers: dict[str, RowsWriter]) -> None:
        """Says on rank 0 what all ranks have stored; no rank writes these rows again."""
        for one in writers.values():
            one.flush()
        mine = {key: [self._fresh[key], sorted(self._unreadable[key])] for key in self._stored}
        for found in gather_objects(mine, self._ranks):
            for key, (fresh, unreadable) in found.items():
                self._stored[key][fresh] = True
                self._unreadable[key] |= set(unreadable)
        self._fresh = {key: [] for key in self._stored}
        with rank_0_alone(self._ranks):
            for key, stored in self._stored.items() if self._ranks.is_main else ():
                bad = self._unreadable[key]
                seal_rows(self._folder, key, dtype=self._dtype, stored=stored, unreadable=bad)

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


def _bits_of(features: Tensor) -> NDArray[Any]:
    """Features as NumPy knows them, which has no bfloat16."""
    known = features.view(torch.uint16) if features.dtype == torch.bfloat16 else features
    return known.contiguous().numpy()


def stored_text_features(
    model: UniCL, tokens: TokenArray, folder: Path, *, ranks: Ranks, progress: bool = False
) -> TextFeatures:
    """The features of texts [m l], padded with 0, encoded now if they are not stored.

    All ranks call it with the same folder, each with any texts; all get the features of all.
    `model` is on its device, its text encoder with its final weights. Texts are encoded beside
    others of their length, so nothing depends on the number of ranks.

    Raises:
        SharedRefusal: stored features are damaged.
        OSError: the folder cannot be written.
    """
    key = from_rank_0(_key_of_texts(model), ranks)
    with refused_together(ranks):
        stored = read_text_features(folder, key, check=ranks.is_main)
    lacking = np.ascontiguousarray(tokens[stored.find(tokens) < 0], np.uint32)
    parts = tensors_to_rank_0({str(ranks.rank): torch.from_numpy(lacking.view(np.int32))}, ranks)
    united = {}
    if ranks.is_main:
        each = [one.numpy().view(np.uint32) for one in parts.values()]
        united["tokens"] = torch.from_numpy(distinct_texts(*each).view(np.int32))
    wanted = tensors_from_rank_0(united, ranks)["tokens"].numpy().view(np.uint32)
    if not len(wanted):
        return stored
    logger.info("encoding %s once, for %s", count_of(len(wanted), "text"), folder)
    lengths = lengths_of(wanted)
    new = np.flatnonzero(np.diff(lengths, prepend=-1))  # where longer texts begin
    ends = [*new[1:].tolist(), len(wanted)]
    batches = [
        slice(at, min(at + _TEXTS_AT_ONCE, end))
        for start, end in zip(new.tolist(), ends, strict=True)
        for at in range(start, end, _TEXTS_AT_ONCE)
    ]
    with (
        _in_evaluation_mode(model),
        Bar(desc="encode texts", total=len(wanted), shown=progress) as bar,
    ):
        pending, begun = dict[str, Tensor](), 0
        for number, batch in enumerate(batches):
            if number % ranks.world_size == ranks.rank:
                mark(f"storing features of text {batch.start} of {len(wanted)}",
                     patience=START_PATIENCE)  # fmt: skip
                rows = wanted[batch, : max(1, int(lengths[batch.start]))]
                pending[str(number)] = _encode_texts(model, rows, ranks)
            bar.update(batch.stop - batch.start)
            if batch.stop - begun >= _SEALED_AT_ONCE or batch.stop == len(wanted):
                found = tensors_to_rank_0(pending, ranks)
                with rank_0_alone(ranks):
                    if ranks.is_main:
                        features = torch.cat([found[one] for one in sorted(found, key=int)])
                        write_text_features(folder, key, wanted[begun : batch.stop], features)
                pending, begun = {}, batch.stop
    gather_integers(0, ranks)  # once all is written
    with refused_together(ranks):
        return read_text_features(folder, key, check=False)


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


def _key_of_texts(model: UniCL) -> str:
    """A hash of all that features of texts depend on, besides their tokens."""
    given = dataclasses.asdict(model.config.model)
    facts = {name: given[name] for name in given if name.startswith("text_")}
    facts |= {
        "length": model.config.model.context_length,
        "precision": model.config.efficiency.precision,
        "weights": weights_digest(model, "text_encoder."),
        "device": model.device.type,
        "version": _VERSION,
    }
    del facts["text_projection"]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
