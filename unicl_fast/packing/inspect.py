"""Describes a packed data set in numbers: `unicl-pack inspect` as a function.

Numbers come from the arrays, texts from the shards; images are only read for their perceptual
hashes, in worker processes (`near_duplicates`).
"""

import itertools
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import QUARANTINE_NAME, Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import equal_images, image_sizes
from unicl_fast.images.limits import DEFAULT_DISTANCE
from unicl_fast.packing.near_duplicates import (
    Hashes,
    Indices,
    count_bits,
    find_leaders,
    hash_images,
)
from unicl_fast.packing.quarantine import count_left_out
from unicl_fast.text.tokenizer import Tokenizer

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The full description of a data set."""

    folder: Path | str
    """The folder, or the URL of which it is a copy."""
    manifest: Manifest
    quarantined: dict[str, int]
    """By kind."""
    num_with_both: int
    """Images with labels and captions."""
    class_counts: tuple[tuple[str, int], ...]
    """Name and number of images of each class, in label order."""
    labels_per_image: dict[int, int]
    """How many images have one label, two, and so on."""
    spreads: dict[str, Spread]
    """By name: width, height, width/height, bytes, caption tokens (without start and end token),
    captions/image and weight, if the data set has them."""
    num_cut_captions: int
    """Captions as long as the context allows, most of which were cut."""
    num_distinct_captions: int
    """Captions with distinct tokens."""
    repeated_captions: tuple[tuple[str, int], ...]
    """The most frequent captions that occur more than once."""
    exact_copies: Copies
    near_distance: int
    near_copies: Copies | None
    """Near copies that are not exact ones; None without a search."""
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
        quantities: dict[str, npt.NDArray[Any]] = {}
        if len(dataset.captions):
            quantities["caption tokens"] = dataset.captions["tokens_length"].astype(int) - 2
            quantities["captions/image"] = rows["captions_count"][has_captions]
        quantities |= {name: rows[name] for name in ("width", "height")}
        quantities["width/height"] = rows["width"] / rows["height"]
        quantities["bytes"] = image_sizes(dataset)
        if dataset.weights is not None:
            quantities["weight"] = dataset.weights.astype(float)
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
            manifest=manifest,
            quarantined=quarantined,
            num_with_both=int((has_labels & has_captions).sum()),
            class_counts=class_counts,
            labels_per_image=dict(sorted(labels_per_image.items())),
            spreads={name: _spread(values) for name, values in quantities.items()},
            exact_copies=_copies(dataset, exact),
            near_distance=near_distance,
            near_copies=near_copies,
            **_look_at_captions(dataset),
            seconds=time.perf_counter() - started,
        )


def _spread(values: npt.NDArray[Any]) -> Spread:
    """Five numbers, and a histogram with at most about 30 round bins, at least one wide.

    Quotients and weights, which are fractions, have bins of at least 0.05. A few very large values,
    which would squeeze all others into one bin, share a wider last bin.
    """
    unit = 0.05 if values.dtype.kind == "f" else 1
    low, high = float(values.min()), float(values.max())
    reach, most = high, float(np.percentile(values, 99))
    if (high - low) / unit > _BINS and high - low > _FAR * (most - low):
        reach = most
    steps = (unit * part * 10**power for power in itertools.count() for part in (1, 2, 5))
    step = next(one for one in steps if reach - low <= _BINS * one)
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
