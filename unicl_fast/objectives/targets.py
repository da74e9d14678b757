"""TargetM, the paper's Algorithm 1: from labels and token rows to class ids.

Two samples are positives of each other when their class ids are equal. `map_targets` decides the
ids of one batch and finds equal texts, so that each is encoded once. It works on the host, on NumPy
arrays; the loops are in `_target_kernels`. The loss turns ids into positives.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from unicl_fast.objectives._target_kernels import (
    CAPTION_KEYS_START as CAPTION_KEYS_START,
)
from unicl_fast.objectives._target_kernels import group_steps, group_texts
from unicl_fast.text.token_rows import (
    Int64Array,
    UInt16Array,
    merge_classes,
    position_factors,
    replace_classes,
    row_lengths,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Distinct texts and class ids of one batch; letters as in `unicl_fast.batch`."""

    tokens: UInt16Array
    """uint16 [u l], distinct rows in order of first occurrence, padded with 0."""
    text_index: Int64Array
    """int64 [b], the row of `tokens` that is the text of each sample."""
    class_ids: Int64Array
    """int64 [b]; always text_class_ids[text_index]."""
    text_class_ids: Int64Array
    """int64 [u]."""
    text_counts: Int64Array
    """int64 [u], how many samples have that text."""
    text_lengths: Int64Array
    """int64 [u], tokens of each row without padding."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TargetSteps:
    """Targets of several batches of one size, concatenated.

    Fields as of `Targets`; the texts of batch s begin at s * size, and only its first num_texts[s]
    entries are valid.
    """

    size: int
    """Samples of a batch."""
    num_texts: Int64Array
    """int64 [steps]."""
    tokens: UInt16Array
    text_index: Int64Array
    text_class_ids: Int64Array
    text_counts: Int64Array
    text_lengths: Int64Array


@runtime_checkable
class PromptLookup(Protocol):
    """Finds the class that has a text as a prompt; `prompts.ClassPrompts` is one."""

    def lookup(self, rows: UInt16Array) -> Int64Array:
        """uint16 [k l] -> int64 [k]: the class that has this row as a prompt, -1 if none has."""
        ...


def map_targets(
    rows: UInt16Array,
    labels: Int64Array,
    prompts: PromptLookup | None = None,
    unique: bool = True,
) -> Targets:
    """TargetM (Algorithm 1 of the paper): gives every sample a class id, and finds distinct texts.

    The class of a text, and of all its samples:

    1. the labels of its samples;
    2. if some of its samples have no label: the class that has this text as a prompt;
    3. if that leaves several classes, they are one class in this batch, under the smallest id;
    4. if it leaves none: a key of the tokens, in [2**62, 2**63). The same text has the same key on
       every rank and whatever its padding.

    The loader maps each rank's local batch by itself, and ranks agree without talking: it gives a
    label only together with a prompt of its class as the text (a caption comes with -1), and
    `ClassPrompts` has joined the classes that share a prompt before training, so the class of a
    text never depends on the other samples of the batch. Where rows and labels come from
    elsewhere, rules 1 and 3 may depend on them: then every rank maps the global batch and takes its
    part with `slice_targets`, as `collate` does.

    Args:
        rows: token ids of the texts, uint16 [b l], padded with 0 at the end.
        labels: int64 [b], the class of each sample or -1. Label 0 is a class.
        prompts: finds captions that are prompts of classes; None where there are no prompts.
        unique: False leaves equal texts apart (u = b, counts of 1) with the same class ids: the
            plain twin, for tests and comparisons.

    Returns:
        The targets; `tokens` is new memory unless `unique` is False.

    Raises:
        ValueError: no rows, or arrays of other shapes, types or ranges.
    """
    rows, labels = _check(rows, labels)
    tokens, keys, text_index, text_counts, text_lengths, *known = group_texts(
        rows, labels, position_factors(rows.shape[1])
    )
    text_class_ids = _classes_of_texts(labels, text_index, tokens, keys, prompts, *known)
    class_ids = text_class_ids[text_index]
    if unique:
        return Targets(
            tokens=tokens,
            text_index=text_index,
            class_ids=class_ids,
            text_class_ids=text_class_ids,
            text_counts=text_counts,
            text_lengths=text_lengths,
        )
    return Targets(
        tokens=rows,
        text_index=np.arange(len(rows)),
        class_ids=class_ids,
        text_class_ids=class_ids.copy(),
        text_counts=np.ones(len(rows), dtype=np.int64),
        text_lengths=row_lengths(rows),
    )


def map_steps(
    rows: UInt16Array, labels: Int64Array, prompts: PromptLookup | None, *, size: int
) -> TargetSteps:
    """`map_targets` of consecutive batches of `size` samples, in one call for small batches.

    Args:
        rows: as of `map_targets`, of all batches.
        labels: as of `map_targets`.
        prompts: as of `map_targets`.
        size: samples of each batch.
    """
    if size == len(rows):
        targets = map_targets(rows, labels, prompts)
        return TargetSteps(
            size=size,
            num_texts=np.array([len(targets.tokens)]),
            tokens=targets.tokens,
            text_index=targets.text_index,
            text_class_ids=targets.text_class_ids,
            text_counts=targets.text_counts,
            text_lengths=targets.text_lengths,
        )
    rows, labels = _check(rows, labels)
    tokens, index, counts, lengths, classes, num_texts, is_plain = group_steps(
        rows, labels, position_factors(rows.shape[1]), size
    )
    for step in np.flatnonzero(~is_plain).tolist():
        mine = slice(step * size, (step + 1) * size)
        targets = map_targets(rows[mine], labels[mine], prompts)
        classes[mine.start : mine.start + num_texts[step]] = targets.text_class_ids
    return TargetSteps(
        size=size,
        num_texts=num_texts,
        tokens=tokens,
        text_index=index,
        text_class_ids=classes,
        text_counts=counts,
        text_lengths=lengths,
    )


def slice_targets(targets: Targets, start: int, stop: int) -> Targets:
    """The targets of samples `start` to `stop - 1`, with only their texts and their counts.

    Texts are again in order of first occurrence; class ids are those of the whole batch.
    """
    if not 0 <= start < stop <= len(targets.text_index):
        raise ValueError(
            f"a slice of {len(targets.text_index)} samples must be in range and not empty, "
            f"not {start} to {stop}"
        )
    texts, first, inverse, counts = np.unique(
        targets.text_index[start:stop], return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    texts = texts[order]
    return Targets(
        tokens=targets.tokens[texts],
        text_index=position[inverse],
        class_ids=targets.class_ids[start:stop],
        text_class_ids=targets.text_class_ids[texts],
        text_counts=counts[order],
        text_lengths=targets.text_lengths[texts],
    )


def _classes_of_texts(
    labels: Int64Array,
    text_index: Int64Array,
    tokens: UInt16Array,
    keys: Int64Array,
    prompts: PromptLookup | None,
    classes: Int64Array,
    unlabelled: np.ndarray[tuple[int], np.dtype[np.bool_]],
    num_conflicts: int,
    num_unlabelled: int,
) -> Int64Array:
    """int64 [u]: the rules of `map_targets` for each text; the last four are `group_texts`'."""
    if not num_unlabelled and not num_conflicts:
        return classes
    same = []  # blocks of pairs of classes that turn out to be one
    if num_conflicts:
        of_text = classes[text_index]
        differs = (labels >= 0) & (labels != of_text)
        same.append(np.stack([labels[differs], of_text[differs]], axis=1))
    if prompts is not None and num_unlabelled:
        texts = np.flatnonzero(unlabelled)
        found = prompts.lookup(tokens[texts])
        texts, found = texts[found >= 0], found[found >= 0]
        differs = (classes[texts] >= 0) & (classes[texts] != found)
        same.append(np.stack([found[differs], classes[texts][differs]], axis=1))
        classes[texts] = found
    pairs = np.concatenate(same) if same else np.empty((0, 2), dtype=np.int64)
    if len(pairs):
        classes = replace_classes(classes, *merge_classes(pairs))
    return np.where(classes >= 0, classes, keys)


def _check(rows: UInt16Array, labels: Int64Array) -> tuple[UInt16Array, Int64Array]:
    """Checks both arrays and returns them in the kernels' layout (a copy only where needed)."""
    if rows.ndim != 2 or rows.dtype != np.uint16:
        raise ValueError(f"rows must be uint16 [b, l], not {rows.dtype} {list(rows.shape)}")
    if len(rows) == 0:
        raise ValueError("a batch needs at least one sample; rows is empty")
    if labels.shape != rows.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be int64 [{len(rows)}], one for each row, "
            f"not {labels.dtype} {list(labels.shape)}"
        )
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    low, high = labels.min(), labels.max()
    if low < -1 or high >= CAPTION_KEYS_START:
        raise ValueError(
            f"labels must be classes from 0 to 2**62 - 1, or -1 for none, not {low} to {high}"
        )
    return np.ascontiguousarray(rows), labels
