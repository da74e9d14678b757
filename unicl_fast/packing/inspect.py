"""Describes a packed data set in numbers: `unicl-pack inspect` as a function.

Numbers come from the arrays, texts from the shards; images are only read for their perceptual
hashes, in worker processes (`near_duplicates`).
"""

import contextlib
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.reader import QUARANTINE_NAME, PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader, equal_images, image_sizes
from unicl_fast.packing.near_duplicates import (
    Hashes,
    Indices,
    count_bits,
    find_leaders,
    hash_images,
)
from unicl_fast.packing.quarantine import count_left_out
from unicl_fast.system.bar import Bar
from unicl_fast.text.tokenizer import Tokenizer

DEFAULT_DISTANCE = 4
"""In bits of 64: includes copies in another size, quality, aspect or in grey, and none of 200,000
pairs of unrelated photographs (docs/data.md)."""
MORE_THAN = 5  # A concept occurs more often than this

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_STOP_WORDS = frozenset(
    """a about above after again against all along also am among an and another any are around as at
    away back be because been before behind being below beside between both but by can could did do
    does down during each either else ever every few for from front had has have having he her here
    hers him his how i if in inside into is it its itself just like many me more most much my near
    next no nor not of off on once only onto or other others our out outside over own per she
    should so some something such than that the their them then there these they this those through
    to together too toward towards under until up upon us very was we were what when where which
    while who whose why will with within without would you your""".split()  # noqa: SIM905 - as a list it would take 160 lines
)
"""English words that name nothing visible."""
_BINS = 30
_FAR = 3  # histograms end at the 99th percentile if the largest value lies this many times as far


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The distribution of a quantity: five numbers and a histogram."""

    smallest: float
    median: float
    mean: float
    percentile_95: float
    largest: float
    edges: tuple[float, ...]
    """Edges of the bins, one more than there are bins."""
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Images that are copies, or look alike."""

    samples: tuple[int, ...]
    """The original, then its copies."""
    distances: tuple[int, ...]
    """Bits in which each hash differs from the first's; empty for exact copies."""
    labels_differ: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Copies:
    """Groups of copies."""

    num_groups: int
    num_surplus: int
    """Images beyond the first of each group."""
    num_labels_differ: int
    """Groups whose labelled images do not all have the same labels."""
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class ConceptRow:
    """A row of the paper's Table 1."""

    data: str
    num_images: int
    num_concepts: int
    images_per_concept: float
    """0 without concepts."""
    kind: str
    """The things counted as concepts, in words."""


_OF_MANIFEST = (
    *("num_samples", "num_captions", "num_tokens", "num_labels", "num_bytes", "num_quarantined"),
    *("source", "seed", "tool_version", "label_columns"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The full description of a data set."""

    folder: Path | str
    """The folder, or the URL of which it is a copy."""
    num_samples: int
    num_captions: int
    num_tokens: int
    num_labels: int
    num_shards: int
    num_bytes: int
    """Bytes of the shards, and of decoded images."""
    is_raw: bool
    """Whether images are kept as pixels."""
    num_quarantined: int
    quarantined: dict[str, int]
    """By kind."""
    source: tuple[str, ...]
    seed: int
    tool_version: str
    num_with_labels: int
    num_with_captions: int
    num_with_both: int
    class_counts: tuple[tuple[str, int], ...]
    """Name and number of images of each class, in label order."""
    label_columns: dict[str, tuple[int, ...]]
    """Numbers of the classes of each label column, if there are several."""
    labels_per_image: dict[int, int]
    """How many images have one label, two, and so on."""
    captions_per_image: Spread | None
    caption_tokens: Spread | None
    """Lengths without start and end token."""
    num_cut_captions: int
    """Captions as long as the context allows, most of which were cut."""
    num_distinct_captions: int
    """Captions with distinct tokens."""
    repeated_captions: tuple[tuple[str, int], ...]
    """The most frequent captions that occur more than once."""
    frequent_concepts: tuple[tuple[str, int], ...]
    heights: Spread
    widths: Spread
    aspects: Spread
    """Width divided by height."""
    image_bytes: Spread
    weights: Spread | None
    """None if samples have no weights."""
    exact_copies: Copies
    near_distance: int
    near_copies: Copies | None
    """Near copies that are not exact ones; None without a search."""
    concepts: tuple[ConceptRow, ...]
    seconds: float


def inspect_dataset(
    folder: str | os.PathLike[str],
    *,
    near: bool = True,
    near_distance: int = DEFAULT_DISTANCE,
    workers: int = 0,
    progress: bool = True,
) -> Inspection:
    """Describes a data set; `tools.pack.inspect.Inspect` explains the arguments.

    With `near` it spawns worker processes.

    Raises:
        FileNotFoundError: not a data set.
        ValueError: it is damaged.
    """
    started = time.perf_counter()
    with PackedDataset(folder) as dataset:
        rows, manifest = dataset.samples, dataset.manifest
        # a bad list is refused now, before all images are read
        quarantined = count_left_out(
            dataset.folder / QUARANTINE_NAME, num_rows=manifest.num_quarantined
        )
        has_labels, has_captions = rows["labels_count"] > 0, rows["captions_count"] > 0
        per_image = lengths = None
        found: list[tuple[str, int]] = []
        if len(dataset.captions):
            texts = _captions(dataset, progress=progress)
            found = count_concepts(texts)
            per_image = _spread(rows["captions_count"][has_captions])
            lengths = _spread(dataset.captions["tokens_length"].astype(int) - 2)
        counts = np.bincount(dataset.labels, minlength=len(manifest.class_names)).tolist()
        class_counts = tuple(zip(manifest.class_names, counts, strict=True))
        labels_per_image = Counter(rows["labels_count"][has_labels].tolist())
        exact = np.arange(len(dataset))  # for each image, the first one with the same bytes
        for group in equal_images(dataset):
            exact[group] = group[0]
        near_copies = None
        if near:
            hashes = hash_images(dataset, workers=workers, progress=progress)
            near_copies = _near_copies(dataset, hashes, exact, near_distance)
        return Inspection(
            folder=dataset.folder,
            **{name: getattr(manifest, name) for name in _OF_MANIFEST},
            num_shards=len(manifest.shards),
            is_raw=manifest.pixels is not None,
            quarantined=quarantined,
            num_with_labels=int(has_labels.sum()),
            num_with_captions=int(has_captions.sum()),
            num_with_both=int((has_labels & has_captions).sum()),
            class_counts=class_counts,
            labels_per_image=dict(sorted(labels_per_image.items())),
            captions_per_image=per_image,
            caption_tokens=lengths,
            frequent_concepts=tuple(found[:30]),
            heights=_spread(rows["height"]),
            widths=_spread(rows["width"]),
            aspects=_spread(rows["width"] / rows["height"], unit=0.05),
            image_bytes=_spread(image_sizes(dataset)),
            weights=None if dataset.weights is None else _spread(dataset.weights.astype(float)),
            exact_copies=_copies(dataset, exact),
            near_distance=near_distance,
            near_copies=near_copies,
            concepts=_table_1(
                class_counts, len(found), int(has_labels.sum()), int(has_captions.sum())
            ),
            **_look_at_captions(dataset),
            seconds=time.perf_counter() - started,
        )


def _captions(dataset: PackedDataset, *, progress: bool) -> Iterator[str]:
    """All captions, read from the shards."""
    with_captions = np.flatnonzero(dataset.samples["captions_count"])
    with contextlib.closing(SampleReader(dataset)) as reader:
        for index in Bar(with_captions, desc="reading captions", unit=" images", shown=progress):
            yield from reader.read_description(int(index)).captions


def count_concepts(texts: Iterable[str]) -> list[tuple[str, int]]:
    """The words that occur more than 5 times, with their counts, most frequent first."""
    words = (word for text in texts for word in _WORD.findall(text.lower()))
    counts = Counter(word for word in words if word not in _STOP_WORDS)
    frequent = [(word, count) for word, count in counts.items() if count > MORE_THAN]
    return sorted(frequent, key=lambda entry: (-entry[1], entry[0]))


def _table_1(
    class_counts: Sequence[tuple[str, int]],
    num_words: int,
    num_labelled: int,
    num_captioned: int,
) -> tuple[ConceptRow, ...]:
    """Rows as in the paper for labelled images, and for captioned ones, whose words are counted."""
    rows: list[tuple[str, int, int, str]] = []
    if num_labelled:
        used = sum(count > 0 for _, count in class_counts)
        named = f", of {len(class_counts):,} named" if used < len(class_counts) else ""
        rows.append(("image-label", num_labelled, used, f"categories with images{named}"))
    if num_captioned:
        kind = f"distinct words, without stop words, that occur more than {MORE_THAN} times"
        rows.append(("image-text", num_captioned, num_words, kind))
    return tuple(
        ConceptRow(data, images, concepts, images / concepts if concepts else 0.0, kind)
        for data, images, concepts, kind in rows
    )


def _spread(values: npt.NDArray[Any], *, unit: float = 1.0) -> Spread:
    """Five numbers, and a histogram with at most about 30 round bins, at least `unit` wide.

    A few very large values, which would squeeze all others into one bin, share a wider last bin.
    """
    low, high = float(values.min()), float(values.max())
    reach, most = high, float(np.percentile(values, 99))
    if (high - low) / unit > _BINS and high - low > _FAR * (most - low):
        reach = most
    step = unit
    while (reach - low) / step > _BINS:
        exponent = math.floor(math.log10(step) + 1e-9)
        mantissa = round(step / 10**exponent)
        step = {1: 2, 2: 5, 5: 10}[mantissa] * 10.0**exponent
    first = math.floor(low / step + 1e-9)
    num_bins = math.floor(reach / step + 1e-9) - first + 1
    edges = np.round((first + np.arange(num_bins + 1)) * step, 6)
    if high > edges[-1]:
        edges = np.append(edges, high)
    counts, _ = np.histogram(values, edges)
    return Spread(
        smallest=low, median=float(np.median(values)), mean=float(values.mean()),
        percentile_95=float(np.percentile(values, 95)), largest=high,
        edges=tuple(edges.tolist()), counts=tuple(counts.tolist()),
    )  # fmt: skip


def _copies(dataset: PackedDataset, leaders: Indices, hashes: Hashes | None = None) -> Copies:
    groups: dict[int, list[int]] = {}
    for follower in np.flatnonzero(leaders != np.arange(len(leaders))).tolist():
        groups.setdefault(int(leaders[follower]), []).append(follower)
    found = []
    for leader, followers in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        samples = (leader, *followers)
        labels = {tuple(sorted(dataset.labels_of(index).tolist())) for index in samples} - {()}
        distances: tuple[int, ...] = ()
        if hashes is not None:
            distances = tuple(count_bits(hashes[list(samples)] ^ hashes[leader]).tolist())
        found.append(Group(samples=samples, distances=distances, labels_differ=len(labels) > 1))
    return Copies(
        num_groups=len(found),
        num_surplus=sum(len(group.samples) - 1 for group in found),
        num_labels_differ=sum(group.labels_differ for group in found),
        groups=tuple(found),
    )


def _near_copies(
    dataset: PackedDataset, hashes: Hashes, exact: Indices, max_distance: int
) -> Copies:
    """Groups of images that look alike, without exact copies."""
    kept = np.flatnonzero(exact == np.arange(len(exact)))
    leaders = np.arange(len(hashes))
    leaders[kept] = kept[find_leaders(hashes[kept], max_distance)]
    return _copies(dataset, leaders, hashes)


def _look_at_captions(dataset: PackedDataset) -> dict[str, Any]:
    """How many captions are cut, distinct, and repeated, by their tokens."""
    manifest, captions = dataset.manifest, dataset.captions
    places = zip(captions["tokens_start"].tolist(), captions["tokens_length"].tolist(), strict=True)
    occurrences = Counter(dataset.tokens[start : start + size].tobytes() for start, size in places)
    tokenizer = Tokenizer(manifest.context_length)
    return {
        "num_cut_captions": int((captions["tokens_length"] == manifest.context_length).sum()),
        "num_distinct_captions": len(occurrences),
        "repeated_captions": tuple(
            (tokenizer.decode(np.frombuffer(tokens, np.uint16)), count)
            for tokens, count in occurrences.most_common(10)
            if count > 1
        ),
    }
