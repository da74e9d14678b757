"""The plan of a run: the samples of each step, as a pure function of (data, seed, step).

For every sample of a global batch the plan says its source (data set), text, crop, flip and
augmentation. Nothing is drawn from a generator, so resuming is knowing the step, and a rank
computes only its local batch. order.py, crop.py and augment.py have the formulas.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.augmentation import Augmentation
from unicl_fast.config import DataConfig
from unicl_fast.dataset.arrays import blocks_of
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.weights import WeightedDraws, Weights, are_equal
from unicl_fast.stages import Span, span_at
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import fold_key, random_below, random_unit, random_units
from unicl_fast.text.prompts import ClassPrompts

from .augment import draw_rows, num_stages, row_width
from .crop import random_windows
from .order import (
    Int64Array,
    assign_sources,
    draws_before,
    integer_weights,
    permute,
    permute_in_shuffle_windows,
    shuffle_groups_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanSource:
    """The part of a data set that the plan needs."""

    name: str
    """Its name in messages."""
    samples: NDArray[Any]
    """Structured [N] with height, width, captions_count, labels_start, labels_count."""
    labels: NDArray[np.int32]
    """Flat; a sample's labels are a range of it."""
    num_templates: int
    """Prompt templates of its classes; 0 if it has no class names."""
    chains: tuple[Int64Array, Int64Array] | None = None
    """Starts [num_classes + 1] and labels: label k's chain, from the top down to itself, is
    labels[starts[k]:starts[k + 1]], for `data.prompts=levels`. None if the text of a label is its
    own prompt."""
    weights: Weights | None = None
    """How often each sample is drawn, relative to others [N]; None: once an epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """A rank's local batch of one step; every array has one row a sample, [b]."""

    step: int
    global_index: Int64Array
    """Index of each sample in the global batch."""
    source_ids: NDArray[np.int32]
    sample_ids: Int64Array
    windows: NDArray[np.int32]
    """[b 5] the crop window: first row and column, height, width, and 1 where it is flipped."""
    captions: Int64Array
    """Number of the caption that is the sample's text; -1 if the text is a prompt."""
    labels: Int64Array
    """The label whose prompt is the text: one of the sample's, or one above it (`data.prompts`). -1
    if the text is a caption: an image shown with a caption is an image-text pair, whose labels are
    ignored in this draw unless the objective uses all of them."""
    templates: Int64Array
    """Number of the prompt's template; -1 if the text is a caption."""
    augment_rows: NDArray[np.float32]
    """[b k] augmentation beyond the window, columns as in `augment.Column`; k is 0 without any."""


def source_of(
    dataset: PackedDataset, prompts: ClassPrompts, data: DataConfig, number: int
) -> PlanSource:
    """The plan's part of the data set with this number among those of `prompts`."""
    hierarchy = dataset.manifest.hierarchy if data.prompts == "levels" else None
    chains = None
    if hierarchy is not None:
        of_labels = hierarchy.chains()
        starts = np.cumsum([0, *map(len, of_labels)], dtype=np.int64)
        chains = starts, np.array([one for chain in of_labels for one in chain], dtype=np.int64)
    return PlanSource(
        name=dataset.location,
        samples=dataset.samples,
        labels=dataset.labels,
        num_templates=int(prompts.num_templates[number]),
        chains=chains,
        weights=dataset.weights if data.sample_weights == "draws" else None,
    )


def split_windows(
    windows: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Starts [b 2], shapes [b 2] and flips [b] of windows [b 5], each contiguous."""
    starts, shapes, flips = windows[:, :2], windows[:, 2:4], windows[:, 4]
    return np.ascontiguousarray(starts), np.ascontiguousarray(shapes), np.ascontiguousarray(flips)


SAMPLE_FIELDS = tuple(
    field.name for field in dataclasses.fields(PlannedBatch) if field.name != "step"
)
"""The fields that have a row for each sample."""


def split_steps(long: PlannedBatch, count: int, *, global_batch_size: int) -> list[PlannedBatch]:
    """Splits a `TrainPlan.long_batch` into the batches of its steps, views of its arrays."""
    size = len(long.global_index) // count
    global_index = long.global_index[:size] % global_batch_size
    names = [name for name in SAMPLE_FIELDS if name != "global_index"]
    arrays = [getattr(long, name) for name in names]
    # Iterating over an array with an axis of steps is cheaper than slicing it for each step.
    parts = zip(*(values.reshape(count, size, *values.shape[1:]) for values in arrays), strict=True)
    return [
        PlannedBatch(
            step=long.step + part,
            global_index=global_index,
            **dict(zip(names, values, strict=True)),
        )
        for part, values in enumerate(parts)
    ]


class _Purpose(enum.IntEnum):
    """Separates the random streams. The numbers are part of a seed's meaning: never reuse one."""

    ORDER = 1
    TEXT_KIND = 2
    CAPTION = 3
    LABEL = 4
    TEMPLATE = 5
    CROP = 6
    FLIP = 7
    SUBSTITUTE = 8
    AUGMENT = 10  # 9 was a second view's


def schedule_draws(
    draws: Int64Array,
    *,
    sizes: Sequence[int],
    seed: int,
    weights: tuple[int, ...],
    global_batch_size: int,
    shuffle_window: int = 0,
    shuffle_groups: int = 1,
    weighted: Mapping[int, WeightedDraws] = {},
) -> tuple[NDArray[np.int32], Int64Array]:
    """Source and sample of each draw [b] of a run.

    Draw q of a source of N samples is row q mod N of its epoch q div N, each shuffled anew; a
    `shuffle_window` of 0 shuffles the whole epoch. The row is the sample's number, unless samples
    are drawn by weight (`weighted`).
    """
    source_ids, source_draws = assign_sources(draws, weights)
    sample_ids = np.empty(len(draws), dtype=np.int64)
    for source, size in enumerate(sizes):
        mine = _rows_of(source, source_ids, sizes)
        groups = None
        if shuffle_window:
            groups = shuffle_groups_of(
                shuffle_groups, global_batch_size=global_batch_size, weights=weights, source=source
            )
        epochs, positions = np.divmod(source_draws[mine], size)
        is_one = len(epochs) and (epochs == epochs[0]).all()
        found = [int(epochs[0])] if is_one else np.unique(epochs).tolist()
        ids, own = np.empty_like(positions), draws[mine]
        for epoch in found:
            chosen = epochs == epoch if len(found) > 1 else slice(None)
            ids[chosen] = permute_in_shuffle_windows(
                positions[chosen],
                size=size,
                window=shuffle_window or size,
                key=fold_key(seed, _Purpose.ORDER, source, epoch),
                groups=groups,
                epoch=epoch,
                draws=own[chosen],
            )
            if source in weighted:
                ids[chosen] = weighted[source].samples_of(ids[chosen], epoch)
        sample_ids[mine] = ids
    return source_ids, sample_ids


def _rows_of(number: int, source_ids: NDArray[np.int32], sizes: Sequence[int]) -> Any:
    """An index of a source's rows [b]; if it is the only source, all of them without a copy."""
    return slice(None) if len(sizes) == 1 else np.flatnonzero(source_ids == number)


class TrainPlan:
    """Plans the batch of any step. Holds no state beyond its arguments."""

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        data: DataConfig,
        global_batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        augmentations: Sequence[Augmentation] | None = None,
        spans: tuple[Span, ...] = (),
        stage: int = -1,
    ) -> None:
        """Checks that every draw will find a sample with a text.

        `weights` are each source's part of every batch, in any unit; None uses the numbers of
        samples, so that all sources finish an epoch together. `augmentations` are each source's.
        `spans` are those of a run in stages, of which `stage` is planned here. Raises ValueError
        for an empty source, one smaller than its part of a batch, or a sample without text.
        """
        for source in sources:
            _check_source(source)
        self.sizes = [len(source.samples) for source in sources]
        """Samples of each source."""
        if weights is None:
            weights = self.sizes
        if len(weights) != len(sources):
            raise ValueError(f"{len(weights)} weights were given for {len(sources)} data sets")
        self.weights = integer_weights(weights)
        self.global_batch_size = global_batch_size
        names = [source.name for source in sources]
        _check_sizes(names, self.sizes, self.weights, global_batch_size=global_batch_size)
        self._sources = list(sources)
        self._data = data
        self._augmentations = list(augmentations or [Augmentation()] * len(sources))
        self.seed = seed
        self.weighted = {
            number: WeightedDraws(one.weights, seed=seed, source=number)
            for number, one in enumerate(sources)
            if one.weights is not None and not are_equal([one.weights])
        }
        """The sources that are drawn by weight; samples of the others come once an epoch."""
        self.shuffle_window = data.shuffle_window
        self.shuffle_groups = data.shuffle_groups
        whole = Span(number=0, first_step=0, end_step=0, first_draw=0,
                     global_batch_size=global_batch_size)  # fmt: skip
        self._spans = spans or (whole,)
        self._own = self._spans[stage]
        chains = [source.chains[0] for source in sources if source.chains is not None]
        self._num_levels = max(
            (int(np.diff(starts).max(initial=1)) for starts in chains), default=1
        )

    def batch(self, step: int, *, rank: int, world_size: int) -> PlannedBatch:
        """The local batch that `rank` of `world_size` ranks gets at `step`."""
        return self.long_batch(step, 1, rank=rank, world_size=world_size)

    def long_batch(self, step: int, count: int, *, rank: int, world_size: int) -> PlannedBatch:
        """The batches of `count` steps from `step` on, concatenated; see `split_steps`."""
        global_index = self._global_index(count, rank=rank, world_size=world_size)
        return self._fill_in(step, global_index, *self._scheduled(step, global_index))

    def schedule(
        self, step: int, count: int, *, rank: int, world_size: int
    ) -> tuple[NDArray[np.int32], Int64Array]:
        """Sources and samples of a `long_batch` and nothing else, to look ahead."""
        return self._scheduled(step, self._global_index(count, rank=rank, world_size=world_size))

    def _global_index(self, count: int, *, rank: int, world_size: int) -> Int64Array:
        """Global indices of a rank in `count` steps, counted on from step to step."""
        size, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be shared by {world_size} "
                "ranks; make run.global_batch_size a multiple of the number of ranks"
            )
        local = np.arange(rank * size, (rank + 1) * size, dtype=np.int64)
        firsts = self.global_batch_size * np.arange(count, dtype=np.int64)
        return (firsts[:, None] + local).reshape(-1)

    def _draws_before(self, step: int) -> int:
        # batches beyond the end of a stage are planned too, as if the stage continued
        span = self._own if step >= self._own.first_step else span_at(self._spans, step)
        return span.draws_before(step)

    def epochs(self, num_steps: int) -> list[float]:
        """How many epochs of each source the first `num_steps` steps show."""
        draws = draws_before(self._draws_before(num_steps), self.weights)
        return [count / size for count, size in zip(draws, self.sizes, strict=True)]

    def substitute(self, step: int, global_index: Int64Array, *, attempt: int) -> PlannedBatch:
        """Plans substitutes for planned samples that turned out to be bad.

        A substitute is another sample of the same source, with its own text, window, flip and
        augmentation, as a function of (data, seed, step, global index, attempt). Successive
        attempts (from 1) at a `global_index` [b] try every other sample of its source, in an order
        drawn for it, before any is repeated. A substitute can appear twice in a batch or an epoch.
        """
        source_ids, sample_ids = self._scheduled(step, global_index)
        draws = self._draws_before(step) + global_index
        for i, (draw, number) in enumerate(zip(draws.tolist(), source_ids.tolist(), strict=True)):
            size = len(self._sources[number].samples)
            num_substitutes = max(1, size - 1)
            key = self._key(_Purpose.SUBSTITUTE, _Purpose.ORDER, number, draw)
            position = np.array([(attempt - 1) % num_substitutes], dtype=np.int64)
            distance = 1 + int(permute(position, size=num_substitutes, key=key)[0])
            sample_ids[i] = (sample_ids[i] + distance) % size
        return self._fill_in(
            step, global_index, source_ids, sample_ids, streams=(_Purpose.SUBSTITUTE, attempt)
        )

    def _scheduled(
        self, step: int, global_index: Int64Array
    ) -> tuple[NDArray[np.int32], Int64Array]:
        """Source and sample at each global index."""
        return schedule_draws(
            self._draws_before(step) + global_index, sizes=self.sizes, seed=self.seed,
            weights=self.weights, global_batch_size=self.global_batch_size,
            shuffle_window=self.shuffle_window, shuffle_groups=self.shuffle_groups,
            weighted=self.weighted,
        )  # fmt: skip

    def _fill_in(
        self,
        step: int,
        global_index: Int64Array,
        source_ids: NDArray[np.int32],
        sample_ids: Int64Array,
        *,
        streams: tuple[int, ...] = (),
    ) -> PlannedBatch:
        """Adds texts, windows and augmentation; `streams` are a substitute's own random streams."""
        draws = self._draws_before(step) + global_index
        sizes = np.empty((2, len(draws)), dtype=np.int64)
        texts = np.empty((3, len(draws)), dtype=np.int64)
        for number, source in enumerate(self._sources):
            mine = _rows_of(number, source_ids, self.sizes)
            rows = source.samples.take(sample_ids[mine])  # 18 times as fast as [] for whole rows
            sizes[0, mine], sizes[1, mine] = rows["height"], rows["width"]
            texts[:, mine] = self._draw_texts(step, source, rows, draws[mine], streams=streams)
        windows, augment_rows = self._draw_crops(sizes, source_ids, draws, streams=streams)
        return PlannedBatch(
            step=step,
            global_index=global_index,
            source_ids=source_ids,
            sample_ids=sample_ids,
            windows=windows,
            captions=texts[0],
            labels=texts[1],
            templates=texts[2],
            augment_rows=augment_rows,
        )

    def _draw_crops(
        self,
        sizes: Int64Array,
        source_ids: NDArray[np.int32],
        draws: Int64Array,
        *,
        streams: tuple[int, ...],
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Windows and augmentation rows; `sizes` are heights and widths [2 b]."""
        data, width = self._data, row_width(self._augmentations)
        crop, flip, augment = (
            self._key(*streams, purpose)
            for purpose in (_Purpose.CROP, _Purpose.FLIP, _Purpose.AUGMENT)
        )
        windows = np.empty((len(draws), 5), dtype=np.int32)
        augment_rows = np.zeros((len(draws), width), dtype=np.float32)
        for number, augmentation in enumerate(self._augmentations):
            mine = _rows_of(number, source_ids, self.sizes)
            counters = draws[mine]
            windows[mine, :2], windows[mine, 2:4] = random_windows(
                sizes[0, mine],
                sizes[1, mine],
                counters,
                key=crop,
                scale=augmentation.crop_scale or data.crop_scale,
                ratio=data.crop_ratio,
                part_shown=data.part_shown,
            )
            chance = data.flip_probability if augmentation.flip is None else augmentation.flip
            windows[mine, 4] = random_units(np.uint64(flip), counters) < chance
            if width:
                augment_rows[mine] = draw_rows(
                    augmentation,
                    counters,
                    key=augment,
                    image_size=data.image_size,
                    stages=num_stages(self._augmentations),
                )
        return windows, augment_rows

    def _draw_texts(
        self,
        step: int,
        source: PlanSource,
        rows: NDArray[Any],
        draws: Int64Array,
        *,
        streams: tuple[int, ...],
    ) -> NDArray[np.int64]:
        """Caption, label and template of each draw, [3 b]; see `PlannedBatch`."""
        purposes = (_Purpose.TEXT_KIND, _Purpose.CAPTION, _Purpose.LABEL)
        captions, chosen_labels = _draw_captions_or_labels(
            np.array([self._key(*streams, purpose) for purpose in purposes], dtype=np.uint64),
            draws,
            rows["captions_count"].astype(np.int64),
            rows["labels_count"].astype(np.int64),
            _CAPTION_CHANCE[self._data.text],
        )
        prompted = chosen_labels >= 0
        labels = np.full(len(rows), -1, dtype=np.int64)
        positions = rows["labels_start"][prompted].astype(np.int64) + chosen_labels[prompted]
        labels[prompted] = source.labels[positions]
        if source.chains is not None:
            # one level a batch, in turns; a class that ends above it stands for itself
            starts, chains = source.chains
            begins, ends = starts[labels[prompted]], starts[labels[prompted] + 1]
            later = (draws[prompted] - self._draws_before(step)) // self.global_batch_size
            levels = (step + later) % self._num_levels
            labels[prompted] = chains[begins + np.minimum(levels, ends - begins - 1)]
        templates = np.full(len(rows), -1, dtype=np.int64)
        key = self._key(*streams, _Purpose.TEMPLATE)
        drawn = random_units(np.uint64(key), draws[prompted]) * source.num_templates
        templates[prompted] = drawn.astype(np.int64)
        return np.stack([captions, labels, templates])

    def _key(self, *parts: int) -> int:
        """The key of a stream, from purposes and numbers that tell streams of one purpose apart."""
        return fold_key(self.seed, *parts)


# How often a sample that has both kinds of text shows a caption.
_CAPTION_CHANCE = {"any": 0.5, "captions": 1.0, "labels": 0.0}


@kernel
def _draw_captions_or_labels(
    keys: Any, draws: Any, captions_count: Any, labels_count: Any, caption_chance: Any
) -> Any:
    """For each draw a caption's number or a label's, and -1 for the other."""
    captions = np.full(draws.size, -1, np.int64)
    labels = np.full(draws.size, -1, np.int64)
    for i in range(draws.size):
        wants_caption = random_unit(keys[0], draws[i]) < caption_chance
        if captions_count[i] > 0 and (wants_caption or labels_count[i] == 0):
            captions[i] = random_below(keys[1], draws[i], captions_count[i])
        else:
            labels[i] = random_below(keys[2], draws[i], labels_count[i])
    return captions, labels


def _check_source(source: PlanSource) -> None:
    """Refuses a source that has a sample without text; `reader` checks that labels have prompts."""
    if not len(source.samples):
        raise ValueError(f"{source.name} has no samples")
    without_text = sum(
        int(np.count_nonzero((rows["captions_count"] == 0) & (rows["labels_count"] == 0)))
        for rows in blocks_of(source.samples)
    )
    if without_text:
        raise ValueError(
            f"{without_text} of the {len(source.samples)} samples of {source.name} have "
            "neither a caption nor a label; leave them out when packing for training"
        )


def _check_sizes(
    names: Sequence[str], sizes: Sequence[int], weights: tuple[int, ...], *, global_batch_size: int
) -> None:
    """Refuses a source whose epoch has fewer samples than its part of one batch."""
    total = sum(weights)
    for name, size, weight in zip(names, sizes, weights, strict=True):
        if size * total < global_batch_size * weight:
            raise ValueError(
                f"{name} has {size} samples in an epoch, fewer than its part of one "
                f"global batch, {global_batch_size * weight / total:.1f} of {global_batch_size}: "
                "a batch would hold a sample twice. Give it a smaller weight, or make "
                "run.global_batch_size smaller"
            )
