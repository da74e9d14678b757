"""Numba kernels under `targets`: the distinct texts of a batch, and their samples' labels.

Rows are uint16 [b, l], C-contiguous, padded with 0 at the end; callers check that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unicl_fast.system.kernels import kernel
from unicl_fast.text.token_rows import (
    Int64Array,
    UInt16Array,
    UInt64Array,
    hash_rows,
    make_table,
    unique_rows,
)

CAPTION_KEYS_START = 1 << 62
"""Class ids of captions without a class lie from here to 2**63 - 1, those of classes below."""


@kernel
def label_texts(
    labels: Int64Array, text_index: Int64Array, num_texts: int
) -> tuple[Int64Array, npt.NDArray[np.bool_], int]:
    """Finds what the samples of each distinct text say about its class.

    Returns:
        text_labels: int64 [u], the first label among a text's samples, -1 if they have none.
        unlabelled: bool [u], whether some sample of the text has no label.
        num_conflicts: samples whose label is not the first one of their text.
    """
    text_labels = np.full(num_texts, -1, np.int64)
    unlabelled = np.zeros(num_texts, np.bool_)
    num_conflicts = 0
    for sample in range(labels.shape[0]):
        # without branches, which a processor could only guess
        text, label = text_index[sample], labels[sample]
        known = text_labels[text]
        unlabelled[text] |= label < 0
        text_labels[text] = known if known >= 0 else label
        num_conflicts += int((label >= 0) & (known >= 0) & (known != label))
    return text_labels, unlabelled, num_conflicts


@kernel
def group_texts(rows: UInt16Array, labels: Int64Array, factors: UInt64Array) -> tuple[Any, ...]:
    """Finds the distinct texts of a batch and what is known of each, in one call.

    For small batches, where a call takes longer than what it does.

    Returns:
        tokens: uint16 [u, l], the distinct rows in order of first occurrence.
        keys: int64 [u], their class ids where no label and no prompt gives one.
        index: int64 [b], the text of each row.
        counts: int64 [u].
        lengths: int64 [u], as of `row_lengths`.
        text_labels, unlabelled, num_conflicts: as of `label_texts`.
        num_unlabelled: texts of which some sample has no label.
    """
    hashes = hash_rows(rows, factors)
    first, index, counts, tokens, lengths = unique_rows(rows, hashes, make_table(rows.shape[0]))
    text_labels, unlabelled, num_conflicts = label_texts(labels, index, first.size)
    keys = np.empty(first.size, np.int64)
    for text in range(first.size):
        keys[text] = np.int64((hashes[first[text]] >> np.uint64(2)) | np.uint64(CAPTION_KEYS_START))
    return (
        tokens,
        keys,
        index,
        counts,
        lengths,
        text_labels,
        unlabelled,
        num_conflicts,
        unlabelled.sum(),
    )


@kernel
def group_steps(rows: UInt16Array, labels: Int64Array, factors: UInt64Array, size: int) -> Any:
    """`group_texts` of consecutive batches of `size` rows.

    The entries of a batch's texts begin where its rows begin, and are 0 after its last text.

    Returns:
        tokens uint16 [b, l], index, counts, lengths and text_labels int64 [b]; of each batch
        num_texts int64, and bool is_plain: all its texts have a label, each one only.
    """
    steps = rows.shape[0] // size
    tokens = np.zeros(rows.shape, np.uint16)
    index = np.empty(rows.shape[0], np.int64)
    counts, lengths, text_labels = (
        np.zeros(rows.shape[0], np.int64),
        np.zeros(rows.shape[0], np.int64),
        np.zeros(rows.shape[0], np.int64),
    )
    num_texts = np.empty(steps, np.int64)
    is_plain = np.empty(steps, np.bool_)
    for step in range(steps):
        start, end = step * size, (step + 1) * size
        found = group_texts(rows[start:end], labels[start:end], factors)
        texts = found[0].shape[0]
        tokens[start : start + texts] = found[0]
        index[start:end] = found[2]
        counts[start : start + texts] = found[3]
        lengths[start : start + texts] = found[4]
        text_labels[start : start + texts] = found[5]
        num_texts[step] = texts
        is_plain[step] = found[7] == 0 and found[8] == 0
    return tokens, index, counts, lengths, text_labels, num_texts, is_plain
