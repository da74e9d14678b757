"""Token rows and labels of planned batches, gathered from packed data and from class prompts."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.arrays import blocks_of
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.objectives.targets import ImageLabels
from unicl_fast.system.kernels import kernel
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.token_rows import TokenArray, distinct_texts, lengths_of

from .plan.plan import PlannedBatch


def gather_texts(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    context_length: int,
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Gathers the token rows and training classes of a planned batch: stored captions and prompts.

    A text longer than `context_length` is cut but keeps its end token, as in the tokenizer.

    Returns:
        Rows [b context_length] padded with 0, with the prompts' dtype, and int64 [b] classes: -1 if
        the text is a caption.
    """
    size = len(planned.global_index)
    rows = np.zeros((size, context_length), dtype=prompts.tokens.dtype)
    classes = np.full(size, -1, dtype=np.int64)
    for number, dataset in enumerate(datasets):
        mine = planned.source_ids == number
        chosen = np.flatnonzero(mine & (planned.captions >= 0))
        samples = dataset.samples.take(planned.sample_ids[chosen])
        positions = samples["captions_start"].astype(np.int64) + planned.captions[chosen]
        _copy_captions(dataset, positions, chosen, rows)
        chosen = np.flatnonzero(mine & (planned.labels >= 0))
        if len(chosen):
            labels = planned.labels[chosen]
            found = prompts.tokens[prompts.rows_of(number, labels, planned.templates[chosen])]
            starts = np.arange(len(chosen), dtype=np.int64) * found.shape[1]
            # up to the end token: 0 is padding after it, and "!" before
            _copy_texts(found.reshape(-1), starts, lengths_of(found), chosen, rows)
            classes[chosen] = prompts.classes_of(number, labels)
    return rows, classes


def gather_every_text(
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    text: str,
    context_length: int,
    rank: int,
    world_size: int,
) -> TokenArray:
    """The distinct texts [m l] that any step can have, as `gather_texts` gives them.

    `text` is `data.text`. Each rank gets a part; together they have all.
    """
    found = [np.zeros((0, context_length), prompts.tokens.dtype)]
    for dataset in datasets if text != "labels" else ():
        for samples in itertools.islice(blocks_of(dataset.samples), rank, None, world_size):
            counts = samples["captions_count"].astype(np.int64)
            firsts = np.repeat(samples["captions_start"].astype(np.int64), counts)
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            rows = np.zeros((len(within), context_length), prompts.tokens.dtype)
            _copy_captions(dataset, firsts + within, np.arange(len(rows)), rows)
            found.append(distinct_texts(rows))
    if len(own := prompts.tokens[rank::world_size]):
        rows = np.zeros((len(own), context_length), own.dtype)
        starts = np.arange(len(own), dtype=np.int64) * own.shape[1]
        _copy_texts(np.ascontiguousarray(own).reshape(-1), starts, lengths_of(own),
                    np.arange(len(own)), rows)  # fmt: skip
        found.append(rows)
    return distinct_texts(*found)


def gather_labels(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    classes_of_labels: Sequence[NDArray[np.int64]],
) -> ImageLabels:
    """Gathers all labels of each sample of a planned batch, even if it is shown with a caption.

    `classes_of_labels` maps each data set's labels to training classes.
    """
    firsts, counts = np.zeros((2, len(planned.global_index)), dtype=np.int64)
    of_dataset = [np.flatnonzero(planned.source_ids == number) for number in range(len(datasets))]
    for mine, dataset in zip(of_dataset, datasets, strict=True):
        samples = dataset.samples.take(planned.sample_ids[mine])
        firsts[mine], counts[mine] = samples["labels_start"], samples["labels_count"]
    starts = np.concatenate([[0], np.cumsum(counts)])
    found = np.empty(starts[-1], dtype=np.int64)
    for mine, dataset, classes in zip(of_dataset, datasets, classes_of_labels, strict=True):
        _copy_classes(np.asarray(dataset.labels), firsts, counts, mine, classes, starts, found)
    return ImageLabels(classes=found, starts=starts)


def _copy_captions(
    dataset: PackedDataset,
    captions: NDArray[np.int64],
    targets: NDArray[np.int64],
    rows: NDArray[Any],
) -> None:
    found = dataset.captions.take(captions)
    starts, lengths = (found[name].astype(np.int64) for name in ("tokens_start", "tokens_length"))
    _copy_texts(np.asarray(dataset.tokens), starts, lengths, targets, rows)


@kernel
def _copy_classes(
    labels: Any, firsts: Any, counts: Any, samples: Any, classes: Any, starts: Any, found: Any
) -> None:
    """Writes the classes of labels[firsts[i]:][:counts[i]] for each i of `samples`."""
    for i in samples:
        for j in range(counts[i]):
            found[starts[i] + j] = classes[labels[firsts[i] + j]]


@kernel
def _copy_texts(tokens: Any, starts: Any, lengths: Any, targets: Any, rows: Any) -> None:
    """Copies text i to row targets[i]; if it is cut, its last token is kept."""
    longest = rows.shape[1]
    for i in range(targets.size):
        length = min(lengths[i], longest)
        for j in range(length):
            rows[targets[i], j] = tokens[starts[i] + j]
        rows[targets[i], length - 1] = tokens[starts[i] + lengths[i] - 1]
