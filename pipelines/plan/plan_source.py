"""What the plan must know of a data set, and which data sets it refuses.

Apart from plan.py, which says what is fed when: here a run is told before it starts that one of its
data sets could not be shown, and what to do about it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.arrays import blocks_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlanSource:
    """What the plan must know of one data set."""

    name: str
    """For messages."""
    samples: NDArray[Any]
    """Structured [N] with height, width, captions_count, labels_start, labels_count."""
    labels: NDArray[np.int32]
    """Flat; a sample's labels are a range of it."""
    num_templates: int
    """Prompt templates of its classes; 0 if it has no class names."""
    class_ids: NDArray[np.int64]
    """Training class of each label [num_classes]."""


def check_source(source: PlanSource, *, text: Literal["any", "captions", "labels"]) -> None:
    """Refuses a source with a sample that could not be shown."""
    if not len(source.samples):
        raise ValueError(f"{source.name} has no samples")
    num_mute, unprompted = 0, False
    for rows in blocks_of(source.samples):
        no_captions = rows["captions_count"] == 0
        has_labels = rows["labels_count"] > 0
        unprompted |= bool((has_labels & (no_captions | (text != "captions"))).any())
        num_mute += int(np.count_nonzero(no_captions & ~has_labels))
    if not source.num_templates and unprompted:
        raise ValueError(
            f"{source.name} has labels but no class names and templates to make texts of; pack it "
            "again with class names, or set data.text=captions if all its images have captions"
        )
    if num_mute:
        raise ValueError(
            f"{num_mute} of the {len(source.samples)} samples of {source.name} have neither a "
            "caption nor a label; leave them out when packing for training"
        )
    num_classes = len(source.class_ids)
    if source.num_templates and len(source.labels):
        extremes = [(int(part.min()), int(part.max())) for part in blocks_of(source.labels)]
        low, high = min(low for low, _ in extremes), max(high for _, high in extremes)
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"{source.name} has class names for labels 0 to {num_classes - 1}, but labels from "
                f"{low} to {high}; pack it again with a name for each label"
            )


def check_sizes(
    sources: Sequence[PlanSource], shares: tuple[int, ...], *, global_batch_size: int
) -> None:
    total = sum(shares)
    for source, share in zip(sources, shares, strict=True):
        if len(source.samples) * total < global_batch_size * share:
            raise ValueError(
                f"{source.name} has {len(source.samples)} samples, fewer than its share of one "
                f"global batch, {global_batch_size * share / total:.1f} of {global_batch_size}: "
                "a batch would hold a sample twice. Give it a smaller share, or make "
                "run.global_batch_size smaller"
            )
