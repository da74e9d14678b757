"""What a step is made of, before anything is read: a pure function of (data, seed, step).

For every slot of a global batch the plan says which sample of which source is fed, with which
text, cut out where, flipped or not, and what else is done to it. Nothing is drawn from a generator,
so resuming is knowing the step, and each rank computes just its own slots of the same global batch
whatever the number of ranks. Order, shares, crop windows and augmentation are formulas of order.py,
crop.py and augment_plan.py. Reading bytes, filling in tokens and decoding are left to the loader.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.augmentation import Augmentation
from unicl_fast.config import DataConfig
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import fold_key, random_below, random_bits, random_unit

from .augment import draw_rows, num_stages, row_width
from .crop import random_windows
from .order import (
    Int64Array,
    assign_sources,
    draws_before,
    integer_shares,
    permute,
    permute_in_windows,
)
from .plan_source import PlanSource as PlanSource
from .plan_source import check_sizes, check_source


class _Purpose(enum.IntEnum):
    """Keeps the random streams apart. The numbers are part of what a seed means: never reuse."""

    ORDER = 1
    TEXT_KIND = 2
    CAPTION = 3
    LABEL = 4
    TEMPLATE = 5
    CROP = 6
    FLIP = 7
    SUBSTITUTE = 8
    SECOND_VIEW = 9
    AUGMENT = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatch:
    """One rank's slots of one global batch; every array has one row a slot, [b]."""

    step: int
    global_index: Int64Array
    """Places in the global batch."""
    source_ids: NDArray[np.int32]
    sample_ids: Int64Array
    window_starts: NDArray[np.int32]
    """[b 2] first row and column of the crop."""
    window_shapes: NDArray[np.int32]
    """[b 2] height and width of the crop."""
    flips: NDArray[np.int32]
    """1 where the crop is mirrored."""
    captions: Int64Array
    """Which of the sample's captions is its text; -1 where the text is a prompt."""
    labels: Int64Array
    """The label whose prompt is the text; -1 where the text is a caption: an image shown with a
    caption is an image-text pair, and its labels, if any, are set aside for this visit."""
    templates: Int64Array
    """Which template fills the prompt; -1 where the text is a caption."""
    second_cuts: NDArray[np.int32]
    """[b 5] start, shape and flip of each image's second view; [b 0] where there is one view."""
    augment_rows: NDArray[np.float32]
    """[b v k] what is done to each view beyond that, columns as in `augment_plan.Column`; k is 0
    where no source augments."""

    @property
    def num_views(self) -> int:
        return self.augment_rows.shape[1]

    def cuts(self, view: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Window starts [b 2], shapes [b 2] and flips [b] of a view."""
        if not view:
            return self.window_starts, self.window_shapes, self.flips
        return self.second_cuts[:, :2], self.second_cuts[:, 2:4], self.second_cuts[:, 4]


SAMPLE_FIELDS = tuple(
    field.name for field in dataclasses.fields(PlannedBatch) if field.name != "step"
)
"""What a batch has of each slot."""


def split_steps(long: PlannedBatch, count: int, *, global_batch_size: int) -> list[PlannedBatch]:
    """The batches of a long one, as `TrainPlan.batch` gives them; views."""
    size = len(long.global_index) // count
    global_index = long.global_index[:size] % global_batch_size
    names = [name for name in SAMPLE_FIELDS if name != "global_index"]
    arrays = [getattr(long, name) for name in names]
    # to go through an array costs less than to take slices of it
    parts = zip(*(values.reshape(count, size, *values.shape[1:]) for values in arrays), strict=True)
    return [
        PlannedBatch(
            step=long.step + part,
            global_index=global_index,
            **dict(zip(names, values, strict=True)),
        )
        for part, values in enumerate(parts)
    ]


def samples_of_draws(
    draws: Int64Array, *, source: int, size: int, seed: int, window: int = 0
) -> Int64Array:
    """Visit q of a source is place q mod N of its pass q div N, each pass shuffled anew.

    `window` as `data.shuffle_window`.
    """
    passes, places = np.divmod(draws, size)
    found = [int(passes[0])] if len(passes) and (passes == passes[0]).all() else np.unique(passes)
    ids = np.empty_like(places)
    for one_pass in found:
        chosen = passes == one_pass if len(found) > 1 else slice(None)
        key = fold_key(seed, _Purpose.ORDER, source, int(one_pass))
        ids[chosen] = permute_in_windows(places[chosen], size=size, window=window or size, key=key)
    return ids


class TrainPlan:
    """Answers what is fed at any step. Holds no state beyond its arguments."""

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        data: DataConfig,
        global_batch_size: int,
        seed: int,
        shares: Sequence[float] | None = None,
        augmentations: Sequence[Augmentation] | None = None,
    ) -> None:
        """Checks that every visit will have something to show.

        Args:
            sources: the data sets.
            data: which text, which crops, how many flips.
            global_batch_size: slots of one step over all ranks.
            seed: decides everything that is drawn.
            shares: each source's part of every batch, in any unit; None takes the numbers of
                samples, so that all sources finish a pass together.
            augmentations: each source's, all with the same number of views; None is none.

        Raises:
            ValueError: an empty source, one smaller than its share of a batch, a sample without
                usable text, or labels that no class name belongs to.
        """
        for source in sources:
            check_source(source, text=data.text)
        if shares is None:
            shares = [len(source.samples) for source in sources]
        if len(shares) != len(sources):
            raise ValueError(f"{len(shares)} shares were given for {len(sources)} data sets")
        self.shares = integer_shares(shares)
        self.global_batch_size = global_batch_size
        check_sizes(sources, self.shares, global_batch_size=global_batch_size)
        self._sources = list(sources)
        self._data = data
        self._augmentations = list(augmentations or [Augmentation()] * len(sources))
        self.num_views = self._augmentations[0].views
        self.seed = seed
        self.shuffle_window = data.shuffle_window

    def batch(self, step: int, *, rank: int, world_size: int) -> PlannedBatch:
        """The slots that `rank` of `world_size` ranks gets of global batch `step`."""
        return self.long_batch(step, 1, rank=rank, world_size=world_size)

    def long_batch(self, step: int, count: int, *, rank: int, world_size: int) -> PlannedBatch:
        """The batches of `count` steps from `step` on, one behind the other; see `split_steps`.

        Planning a step takes some 30 calls, whatever its size; for small batches it pays to make
        them once for many steps. Slots are counted on from step to step.
        """
        global_index = self._slots(count, rank=rank, world_size=world_size)
        return self._fill_in(step, global_index, *self._scheduled(step, global_index))

    def schedule(
        self, step: int, count: int, *, rank: int, world_size: int
    ) -> tuple[NDArray[np.int32], Int64Array]:
        """Source and sample of each place of a `long_batch`, and nothing else: for who looks ahead.

        Takes a tenth of a microsecond a place.
        """
        return self._scheduled(step, self._slots(count, rank=rank, world_size=world_size))

    def _slots(self, count: int, *, rank: int, world_size: int) -> Int64Array:
        """Places of `count` steps, counted on from step to step."""
        size, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise ValueError(
                f"a global batch of {self.global_batch_size} cannot be shared by {world_size} "
                "ranks; make run.global_batch_size a multiple of the number of ranks"
            )
        global_index = np.arange(rank * size, (rank + 1) * size, dtype=np.int64)
        firsts = self.global_batch_size * np.arange(count, dtype=np.int64)
        return (firsts[:, None] + global_index).reshape(-1)

    def passes(self, num_steps: int) -> list[float]:
        """How often each source has been gone through after so many steps."""
        draws = draws_before(num_steps * self.global_batch_size, self.shares)
        sizes = [len(source.samples) for source in self._sources]
        return [count / size for count, size in zip(draws, sizes, strict=True)]

    def substitute(self, step: int, global_index: Int64Array, *, attempt: int) -> PlannedBatch:
        """What is fed in some places of a global batch whose planned sample cannot be.

        Another sample of the same source, with text, window, flip and augmentation of its own: as
        `batch`, a function of (data, seed, step, slot, attempt) and nothing else. The attempts of
        one place go through all other samples of its source, in an order of that place's own,
        before any comes again; a source of one sample has only that one. A substitute may stand in
        the batch, or the pass, a second time.

        Args:
            step: of the batch.
            global_index: places in the global batch [b].
            attempt: counted from 1; the next one is for places whose substitute is bad too.
        """
        source_ids, sample_ids = self._scheduled(step, global_index)
        for i, (slot, number) in enumerate(
            zip(global_index.tolist(), source_ids.tolist(), strict=True)
        ):
            size = len(self._sources[number].samples)
            num_others = max(1, size - 1)
            visit = step * self.global_batch_size + slot
            key = self._key(_Purpose.SUBSTITUTE, _Purpose.ORDER, number, visit)
            place = np.array([(attempt - 1) % num_others], dtype=np.int64)
            distance = 1 + int(permute(place, size=num_others, key=key)[0])
            sample_ids[i] = (sample_ids[i] + distance) % size
        return self._fill_in(
            step, global_index, source_ids, sample_ids, streams=(_Purpose.SUBSTITUTE, attempt)
        )

    def _scheduled(
        self, step: int, global_index: Int64Array
    ) -> tuple[NDArray[np.int32], Int64Array]:
        """Source and sample of each place of a global batch."""
        draws = step * self.global_batch_size + global_index
        source_ids, source_draws = assign_sources(draws, self.shares)
        sample_ids = np.empty(len(global_index), dtype=np.int64)
        for number in range(len(self._sources)):
            mine = self._places_of(number, source_ids)
            sample_ids[mine] = self._samples_of_draws(number, source_draws[mine])
        return source_ids, sample_ids

    def _fill_in(
        self,
        step: int,
        global_index: Int64Array,
        source_ids: NDArray[np.int32],
        sample_ids: Int64Array,
        *,
        streams: tuple[int, ...] = (),
    ) -> PlannedBatch:
        """Text, windows, flips and augmentation; `streams` tells a substitute's numbers apart."""
        size = len(global_index)
        draws = step * self.global_batch_size + global_index
        sizes = np.empty((2, size), dtype=np.int64)
        texts = np.empty((3, size), dtype=np.int64)
        for number, source in enumerate(self._sources):
            mine = self._places_of(number, source_ids)
            rows = source.samples.take(sample_ids[mine])  # of whole rows 18 times as fast as []
            sizes[0, mine], sizes[1, mine] = rows["height"], rows["width"]
            texts[:, mine] = self._choose_texts(source, rows, draws[mine], streams=streams)
        captions, labels, templates = texts

        cuts = [
            self._cut(sizes, source_ids, draws, streams=view_streams)
            for view_streams in self._view_streams(streams)
        ]
        (window_starts, window_shapes, flips), *second = cuts
        return PlannedBatch(
            step=step,
            global_index=global_index,
            source_ids=source_ids,
            sample_ids=sample_ids,
            window_starts=window_starts,
            window_shapes=window_shapes,
            flips=flips,
            captions=captions,
            labels=labels,
            templates=templates,
            second_cuts=_joined(second, size),
            augment_rows=self._augment(source_ids, draws, streams=streams),
        )

    def _view_streams(self, streams: tuple[int, ...]) -> list[tuple[int, ...]]:
        """What tells the numbers of each view apart."""
        return [streams, (*streams, _Purpose.SECOND_VIEW)][: self.num_views]

    def _cut(
        self,
        sizes: Int64Array,
        source_ids: NDArray[np.int32],
        draws: Int64Array,
        *,
        streams: tuple[int, ...],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Window starts [b 2], window shapes [b 2] and flips [b] of one view.

        Args:
            sizes: heights and widths of the images [2 b].
            source_ids: of the images [b].
            draws: of the images [b].
            streams: tells a substitute's numbers, and those of views, apart.
        """
        crop, flip = self._key(*streams, _Purpose.CROP), self._key(*streams, _Purpose.FLIP)
        starts = np.empty((len(draws), 2), dtype=np.int32)
        shapes = np.empty_like(starts)
        flips = np.empty(len(draws), dtype=np.int32)
        for number, augmentation in enumerate(self._augmentations):
            mine = self._places_of(number, source_ids)
            starts[mine], shapes[mine] = random_windows(
                sizes[0, mine],
                sizes[1, mine],
                draws[mine],
                key=crop,
                scale=augmentation.crop_scale or self._data.crop_scale,
                ratio=self._data.crop_ratio,
            )
            chance = augmentation.flip
            if chance is None:
                chance = self._data.flip_probability
            flips[mine] = _draw_flips(np.uint64(flip), draws[mine], chance)
        return starts, shapes, flips

    def _augment(
        self, source_ids: NDArray[np.int32], draws: Int64Array, *, streams: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """What is done to each view of each image, [b v k]."""
        width, stages = row_width(self._augmentations), num_stages(self._augmentations)
        drawn = np.zeros((len(draws), self.num_views, width), dtype=np.float32)
        if not width:
            return drawn
        for view, view_streams in enumerate(self._view_streams(streams)):
            key = self._key(*view_streams, _Purpose.AUGMENT)
            for number, augmentation in enumerate(self._augmentations):
                mine = self._places_of(number, source_ids)
                drawn[mine, view] = draw_rows(
                    augmentation,
                    draws[mine],
                    key=key,
                    image_size=self._data.image_size,
                    stages=stages,
                )
        return drawn

    def _key(self, *parts: int) -> int:
        """The key of a stream, named by purposes and what tells streams of one purpose apart."""
        return fold_key(self.seed, *parts)

    def _places_of(self, number: int, source_ids: NDArray[np.int32]) -> Any:
        """Index of a source's places [b]; all of them, without a copy, if it is the only one."""
        return slice(None) if len(self._sources) == 1 else np.flatnonzero(source_ids == number)

    def _samples_of_draws(self, number: int, draws: Int64Array) -> Int64Array:
        size = len(self._sources[number].samples)
        return samples_of_draws(
            draws, source=number, size=size, seed=self.seed, window=self.shuffle_window
        )

    def _choose_texts(
        self,
        source: PlanSource,
        rows: NDArray[Any],
        draws: Int64Array,
        *,
        streams: tuple[int, ...],
    ) -> NDArray[np.int64]:
        """Caption, label and template of each visit, [3 b]; see `PlannedBatch`."""
        labels_count = rows["labels_count"] if source.num_templates else 0 * rows["labels_count"]
        purposes = (_Purpose.TEXT_KIND, _Purpose.CAPTION, _Purpose.LABEL)
        captions, label_places = _draw_texts(
            np.array([self._key(*streams, purpose) for purpose in purposes], dtype=np.uint64),
            draws,
            rows["captions_count"].astype(np.int64),
            labels_count.astype(np.int64),
            _CAPTION_CHANCE[self._data.text],
        )
        prompted = label_places >= 0
        labels = np.full(len(rows), -1, dtype=np.int64)
        places = rows["labels_start"][prompted].astype(np.int64) + label_places[prompted]
        labels[prompted] = source.labels[places]
        templates = np.full(len(rows), -1, dtype=np.int64)
        if self._data.templates == "per_class":
            # The class as counter, the step in the key: all ranks draw the same for a class, and
            # so do substitutes.
            key = self._key(_Purpose.TEMPLATE)
            steps = draws[prompted] // self.global_batch_size
            classes = source.class_ids[labels[prompted]]
            drawn = _draw_by_step(np.uint64(key), steps, classes, source.num_templates)
        else:
            key = self._key(*streams, _Purpose.TEMPLATE)
            drawn = _draw_below(np.uint64(key), draws[prompted], source.num_templates)
        templates[prompted] = drawn
        return np.stack([captions, labels, templates])


# How often a sample that has both kinds of text shows a caption.
_CAPTION_CHANCE = {"any": 0.5, "captions": 1.0, "labels": 0.0}


def _joined(cuts: Sequence[tuple[NDArray[np.int32], ...]], size: int) -> NDArray[np.int32]:
    """Starts, shapes and flips of a view side by side, [b 5]; [b 0] if there is none."""
    columns = [part.reshape(size, -1) for cut in cuts for part in cut]
    return np.concatenate([np.empty((size, 0), dtype=np.int32), *columns], axis=1)


@kernel
def _draw_texts(
    keys: Any, draws: Any, captions_count: Any, labels_count: Any, caption_chance: Any
) -> Any:
    """For each visit a caption's number or a label's, and -1 for the other."""
    captions = np.full(draws.size, -1, np.int64)
    labels = np.full(draws.size, -1, np.int64)
    for i in range(draws.size):
        wants_caption = random_unit(keys[0], draws[i]) < caption_chance
        if captions_count[i] > 0 and (wants_caption or labels_count[i] == 0):
            captions[i] = random_below(keys[1], draws[i], captions_count[i])
        else:
            labels[i] = random_below(keys[2], draws[i], labels_count[i])
    return captions, labels


@kernel
def _draw_flips(key: Any, draws: Any, probability: Any) -> Any:
    flips = np.empty(draws.size, np.int32)
    for i in range(draws.size):
        flips[i] = random_unit(key, draws[i]) < probability
    return flips


@kernel
def _draw_below(key: Any, counters: Any, bound: Any) -> Any:
    drawn = np.empty(counters.size, np.int64)
    for i in range(counters.size):
        drawn[i] = random_below(key, counters[i], bound)
    return drawn


@kernel
def _draw_by_step(key: Any, steps: Any, counters: Any, bound: Any) -> Any:
    """`_draw_below` with the key that `fold_key` makes of `key` and each one's step."""
    drawn = np.empty(counters.size, np.int64)
    for i in range(counters.size):
        drawn[i] = random_below(random_bits(key, steps[i]), counters[i], bound)
    return drawn
