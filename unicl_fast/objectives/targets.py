"""TargetM, the paper's Algorithm 1: from labels and token rows to class ids.

`map_targets` assigns a batch's class ids and finds equal texts, so that each is encoded once; the
loss turns ids into positives. NumPy and Numba on the host: only `collate` needs torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from unicl_fast.system.kernels import kernel
from unicl_fast.text.token_rows import (
    Int64Array,
    TokenArray,
    UInt64Array,
    hash_rows,
    make_table,
    merge_classes,
    position_factors,
    replace_classes,
    unique_rows,
)
from unicl_fast.text.tokenizer import token_type

if TYPE_CHECKING:  # the data pipeline maps targets without torch
    from torch import Tensor

    from unicl_fast.batch import Batch, Targets, Texts

CAPTION_KEYS_START = 1 << 62
"""Class ids of captions without a class are from here to 2**63 - 1, other ids below."""
_NOTHING_MERGED = (np.empty(0, np.int64), np.empty(0, np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageLabels:
    """All labels of each image, as classes; not only the class of its text."""

    classes: Int64Array
    """int64 [c]: classes from 0 to 2**62 - 1, image by image; they may repeat."""
    starts: Int64Array
    """int64 [b + 1]: image i has classes[starts[i]:starts[i + 1]]."""

    def part(self, start: int, stop: int) -> ImageLabels:
        """The labels of images `start` to `stop - 1`, without a copy."""
        return dataclasses.replace(self, starts=self.starts[start : stop + 1])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HostTargets:
    """`batch.Texts` and `batch.Targets` as arrays; texts are in order of first occurrence."""

    tokens: TokenArray
    text_index: Int64Array
    text_class_ids: Int64Array
    text_counts: Int64Array
    text_lengths: Int64Array
    image_classes: Int64Array | None = None

    @property
    def class_ids(self) -> Int64Array:
        """int64 [b]: the class of each sample's text."""
        return self.text_class_ids[self.text_index]

    def tensors(self) -> tuple[Texts, Targets]:
        """`Batch.texts` and `Batch.targets` on the host; only token ids are copied."""
        import torch

        from unicl_fast.batch import Targets, Texts

        of_images = self.image_classes
        texts = Texts(
            tokens=torch.from_numpy(self.tokens.astype(np.int64)),
            lengths=self.text_lengths,
            index=torch.from_numpy(self.text_index),
            counts=torch.from_numpy(self.text_counts),
        )
        return texts, Targets(
            class_ids=torch.from_numpy(self.class_ids),
            text_class_ids=torch.from_numpy(self.text_class_ids),
            image_classes=None if of_images is None else torch.from_numpy(of_images),
        )


@runtime_checkable
class PromptLookup(Protocol):
    """Finds the class that has a text as a prompt, as `prompts.ClassPrompts` does."""

    def lookup(self, rows: TokenArray) -> Int64Array:
        """The class int64 [k] that has each row [k l] as a prompt, -1 if none has."""
        ...


def map_targets(
    rows: TokenArray,
    labels: Int64Array,
    prompts: PromptLookup | None = None,
    image_labels: ImageLabels | None = None,
) -> HostTargets:
    """TargetM (Algorithm 1 of the paper): gives every sample a class id, and finds distinct texts.

    The class of a text, and of all its samples:

    1. the labels of its samples;
    2. if some of its samples have no label: the class that has this text as a prompt;
    3. if that leaves several classes, they are one class in this batch, under the smallest id;
    4. if it leaves none: a key of the tokens, in [2**62, 2**63), the same on every rank and for
       any padding.

    In the loader each rank maps only its local batch, and all agree without communication: a label
    always comes with a prompt of its class as text (a caption has -1), and `ClassPrompts` has
    joined classes that share a prompt, so a text's class never depends on other samples. For other
    rows and labels it can (rules 1 and 3): then every rank maps the global batch and takes its part
    with `slice_targets`, as `collate` does.

    Args:
        rows: token ids of the texts, uint16 or uint32 [b l], padded with 0 at the end.
        labels: int64 [b], the class of each sample or -1. Label 0 is a class.
        prompts: finds captions that are prompts of classes; None if there are no prompts.
        image_labels: all labels of each image, for `image_classes`; None if only its text's class
            counts. Texts do not depend on them.

    Raises:
        ValueError: no rows, or arrays of other shapes, types or ranges.
    """
    rows, labels = _check(rows, labels)
    tokens, keys, text_index, text_counts, text_lengths, *known = _group_texts(
        rows, labels, position_factors(rows.shape[1])
    )
    text_class_ids, merged = _classes_of_texts(labels, text_index, tokens, keys, prompts, *known)
    image_classes = None
    if image_labels is not None:
        image_classes = _classes_of_images(text_class_ids[text_index], image_labels, merged)
    return HostTargets(
        tokens=tokens,
        text_index=text_index,
        text_class_ids=text_class_ids,
        text_counts=text_counts,
        text_lengths=text_lengths,
        image_classes=image_classes,
    )


def map_steps(
    rows: TokenArray,
    labels: Int64Array,
    prompts: PromptLookup | None,
    *,
    size: int,
    image_labels: ImageLabels | None = None,
) -> list[HostTargets]:
    """`map_targets` of consecutive batches of `size` samples."""
    steps = []
    for start in range(0, len(rows), size):
        own = slice(start, start + size)
        mine = None if image_labels is None else image_labels.part(start, start + size)
        steps.append(map_targets(rows[own], labels[own], prompts, mine))
    return steps


def slice_targets(targets: HostTargets, start: int, stop: int) -> HostTargets:
    """Targets of samples `start` to `stop - 1`, with only their texts, in order, and counts."""
    if not 0 <= start < stop <= len(targets.text_index):
        raise ValueError(
            f"a slice of {len(targets.text_index)} samples must be in range and not empty, "
            f"not {start} to {stop}"
        )
    texts, first, inverse, counts = np.unique(
        targets.text_index[start:stop], return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    position = np.argsort(order)
    texts = texts[order]
    image_classes = targets.image_classes
    if image_classes is not None:
        first_entry, end_entry = np.searchsorted(image_classes[0], [start, stop])
        image_classes = image_classes[:, first_entry:end_entry] - np.array([[start], [0]])
    return HostTargets(
        tokens=targets.tokens[texts],
        text_index=position[inverse],
        text_class_ids=targets.text_class_ids[texts],
        text_counts=counts[order],
        text_lengths=targets.text_lengths[texts],
        image_classes=image_classes,
    )


def collate(
    images: Tensor,
    tokens: Tensor,
    labels: Tensor,
    *,
    prompts: PromptLookup | None = None,
    image_labels: Sequence[Sequence[int]] | None = None,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """Makes one rank's `Batch` from a global batch in memory, for loaders other than DALI's.

    Args:
        images: uint8 [n h w c], RGB, of the global batch.
        tokens: [n l] token rows padded with 0, as from `Tokenizer`.
        labels: int64 [n]; -1 for a caption without a class.
        prompts: as in `map_targets`.
        image_labels: all labels of each of the n images, for `objective.positives`.
        step: optimizer step of the batch.
        rank: whose local batch to make.
        world_size: number of ranks; divides n.
    """
    import torch

    from unicl_fast.batch import Batch

    n = len(images)
    if not n == len(tokens) == len(labels) or n % world_size:
        raise ValueError(
            f"expected as many images as tokens and labels, and a multiple of {world_size} ranks, "
            f"got {n}, {len(tokens)} and {len(labels)}"
        )
    lists = None
    if image_labels is not None:
        counts = [len(of_image) for of_image in image_labels]
        lists = ImageLabels(
            classes=np.array([one for of_image in image_labels for one in of_image], np.int64),
            starts=np.cumsum([0, *counts], dtype=np.int64),
        )
    start, stop = rank * n // world_size, (rank + 1) * n // world_size
    rows = tokens.numpy().astype(token_type(int(tokens.max()) + 1))
    whole = map_targets(rows, labels.numpy(), prompts, lists)
    texts, targets = slice_targets(whole, start, stop).tensors()
    return Batch(
        step=step,
        images=images[start:stop],
        texts=texts,
        targets=targets,
        global_index=torch.arange(start, stop),
    )


def _classes_of_texts(
    labels: Int64Array,
    text_index: Int64Array,
    tokens: TokenArray,
    keys: Int64Array,
    prompts: PromptLookup | None,
    classes: Int64Array,
    unlabelled: npt.NDArray[np.bool_],
    num_conflicts: int,
    num_unlabelled: int,
) -> tuple[Int64Array, tuple[Int64Array, Int64Array]]:
    """The rules of `map_targets`: the class of each text, int64 [u], and the merged classes."""
    merged = _NOTHING_MERGED
    if not num_unlabelled and not num_conflicts:
        return classes, merged
    pairs = [np.empty((0, 2), dtype=np.int64)]  # of classes to be merged
    if num_conflicts:
        of_text = classes[text_index]
        differs = (labels >= 0) & (labels != of_text)
        pairs.append(np.stack([labels[differs], of_text[differs]], axis=1))
    if prompts is not None and num_unlabelled:
        texts = np.flatnonzero(unlabelled)
        found = prompts.lookup(tokens[texts])
        texts, found = texts[found >= 0], found[found >= 0]
        differs = (classes[texts] >= 0) & (classes[texts] != found)
        pairs.append(np.stack([found[differs], classes[texts][differs]], axis=1))
        classes[texts] = found
    if sum(map(len, pairs)):
        merged = merge_classes(np.concatenate(pairs))
        classes = replace_classes(classes, *merged)
    return np.where(classes >= 0, classes, keys), merged


def _classes_of_images(
    class_ids: Int64Array,
    labels: ImageLabels,
    merged: tuple[Int64Array, Int64Array] = _NOTHING_MERGED,
) -> Int64Array:
    """int64 [2 e]: sample and class of every class of each image, its text's class first.

    `class_ids` int64 [b] are the texts' classes, `merged` the batch's `merge_classes`.
    """
    if len(labels.starts) != len(class_ids) + 1:
        raise ValueError(
            f"image_labels are of {len(labels.starts) - 1} images, the batch has {len(class_ids)}"
        )
    classes = replace_classes(labels.classes, *merged)
    entries: Int64Array = _distinct_classes(class_ids, classes, labels.starts)
    return entries


def _check(rows: TokenArray, labels: Int64Array) -> tuple[TokenArray, Int64Array]:
    """Checks both arrays and returns them in the kernels' layout (copied only if needed)."""
    if rows.ndim != 2 or rows.dtype not in (np.uint16, np.uint32):
        raise ValueError(
            f"rows must be uint16 or uint32 [b, l], not {rows.dtype} {list(rows.shape)}"
        )
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


# The loops.


@kernel
def _label_texts(
    labels: Int64Array, text_index: Int64Array, num_texts: int
) -> tuple[Int64Array, npt.NDArray[np.bool_], int]:
    """Finds the label of each distinct text among its samples.

    Returns:
        text_labels: int64 [u], the first label among a text's samples, -1 if they have none.
        unlabelled: bool [u], whether some sample of the text has no label.
        num_conflicts: samples whose label differs from their text's first one.
    """
    text_labels = np.full(num_texts, -1, np.int64)
    unlabelled = np.zeros(num_texts, np.bool_)
    num_conflicts = 0
    for sample in range(labels.shape[0]):
        # without branches, which would be unpredictable
        text, label = text_index[sample], labels[sample]
        known = text_labels[text]
        unlabelled[text] |= label < 0
        text_labels[text] = known if known >= 0 else label
        num_conflicts += int((label >= 0) & (known >= 0) & (known != label))
    return text_labels, unlabelled, num_conflicts


@kernel
def _group_texts(rows: TokenArray, labels: Int64Array, factors: UInt64Array) -> tuple[Any, ...]:
    """Finds the distinct texts of a batch, and their labels; rows are C-contiguous.

    One call, since for small batches a call takes longer than its work.

    Returns:
        tokens: [u, l], the distinct rows in order of first occurrence.
        keys: int64 [u], their class ids if no label or prompt gives one.
        index: int64 [b], the text of each row.
        counts: int64 [u].
        lengths: int64 [u], in tokens without padding.
        text_labels, unlabelled, num_conflicts: as from `_label_texts`.
        num_unlabelled: texts with a sample without label.
    """
    hashes = hash_rows(rows, factors)
    first, index, counts, tokens, lengths = unique_rows(rows, hashes, make_table(rows.shape[0]))
    text_labels, unlabelled, num_conflicts = _label_texts(labels, index, first.size)
    keys = np.empty(first.size, np.int64)
    for text in range(first.size):
        keys[text] = np.int64((hashes[first[text]] >> np.uint64(2)) | np.uint64(CAPTION_KEYS_START))
    known = text_labels, unlabelled, num_conflicts, unlabelled.sum()
    return tokens, keys, index, counts, lengths, *known


@kernel
def _distinct_classes(class_ids: Int64Array, classes: Int64Array, starts: Int64Array) -> Int64Array:
    """Sample and class of each entry [2 e]; an image's repeated classes are one entry."""
    entries = np.empty((2, class_ids.size + starts[-1] - starts[0]), np.int64)
    end = 0
    for sample in range(class_ids.size):
        first = end
        entries[0, end], entries[1, end] = sample, class_ids[sample]
        end += 1
        for position in range(starts[sample], starts[sample + 1]):
            entry = first
            while entry < end and entries[1, entry] != classes[position]:
                entry += 1
            entries[0, end], entries[1, end] = sample, classes[position]
            end += int(entry == end)
    return entries[:, :end]
