"""Texts and whole numbers of a batch: gathered, packed into one array for DALI, unpacked after it.

Each input costs DALI a bookkeeping pass over the batch, and each tensor sent to a GPU a transfer of
its own; five fields and the tokens in one block cost one. The block is [b l + 5] because DALI wants
a row a sample, but the fields lie in it one after another, so that each is contiguous again when
it is sliced out. The plan chooses which text a sample gets; `unicl_fast.objectives.targets` says
which texts are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.objectives.targets import ImageLabels, TargetSteps
from unicl_fast.system.kernels import kernel
from unicl_fast.text.prompts import ClassPrompts

from ..plan.plan import PlannedBatch

_FIELDS = 5


def gather_texts(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    context_length: int,
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Gathers token rows and training classes of a planned batch: stored captions, and prompts.

    A text longer than `context_length` is cut and keeps its end token, as the tokenizer does it.

    Returns:
        uint16 [b context_length] padded with 0, and int64 [b] classes, -1 where the text is a
        caption.
    """
    size = len(planned.global_index)
    rows = np.zeros((size, context_length), dtype=np.uint16)
    classes = np.full(size, -1, dtype=np.int64)
    for number, dataset in enumerate(datasets):
        mine = planned.source_ids == number
        chosen = np.flatnonzero(mine & (planned.captions >= 0))
        samples = dataset.samples.take(planned.sample_ids[chosen])
        positions = samples["captions_start"].astype(np.int64) + planned.captions[chosen]
        captions = dataset.captions.take(positions)
        starts = captions["tokens_start"].astype(np.int64)
        lengths = captions["tokens_length"].astype(np.int64)
        _copy_texts(np.asarray(dataset.tokens), starts, lengths, chosen, rows)
        chosen = np.flatnonzero(mine & (planned.labels >= 0))
        if len(chosen):
            labels = planned.labels[chosen]
            found = prompts.tokens[prompts.rows_of(number, labels, planned.templates[chosen])]
            # Up to the end token: 0 is padding after it, and "!" before.
            lengths = (found.shape[1] - np.argmax(found[:, ::-1] != 0, axis=1)).astype(np.int64)
            starts = np.arange(len(chosen), dtype=np.int64) * found.shape[1]
            _copy_texts(found.reshape(-1), starts, lengths, chosen, rows)
            classes[chosen] = prompts.classes_of(number, labels)
    return rows, classes


def gather_labels(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    classes_of_labels: Sequence[NDArray[np.int64]],
) -> ImageLabels:
    """Gathers all labels of each sample of a planned batch, whatever text it is shown with.

    `classes_of_labels` has the training class of each label of each data set.
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
    """Copies text i to row targets[i]; one that is too long ends in its own last token."""
    longest = rows.shape[1]
    for i in range(targets.size):
        length = min(lengths[i], longest)
        for j in range(length):
            rows[targets[i], j] = tokens[starts[i] + j]
        rows[targets[i], length - 1] = tokens[starts[i] + lengths[i] - 1]


def pack_integers(
    steps: TargetSteps, global_index: NDArray[np.int64], *, context_length: int
) -> NDArray[np.int64]:
    """Packs some batches of b samples as int64 [steps * b, context_length + 5].

    Rows of tokens are padded with 0 to `context_length`; there are never more texts than samples.
    `global_index` [b] is the same in each batch.
    """
    block = np.zeros((len(steps.text_index), context_length + _FIELDS), dtype=np.int64)
    texts = steps.num_texts, steps.tokens, steps.text_index, steps.text_class_ids, steps.text_counts
    _pack(block.reshape(-1), *texts, global_index, context_length)
    return block


@kernel
def _pack(
    block: Any, num_texts: Any, tokens: Any, text_index: Any, text_class_ids: Any,
    text_counts: Any, global_index: Any, context_length: Any,
) -> None:  # fmt: skip
    size = global_index.size
    for step in range(num_texts.size):
        first = step * size
        field = first * (context_length + _FIELDS)
        for i in range(size):
            block[field + i] = text_index[first + i]
            block[field + size + i] = text_class_ids[first + text_index[first + i]]
            block[field + 2 * size + i] = global_index[i]
        for text in range(num_texts[step]):
            block[field + 3 * size + text] = text_class_ids[first + text]
            block[field + 4 * size + text] = text_counts[first + text]
            row = field + _FIELDS * size + text * context_length
            for position in range(tokens.shape[1]):
                block[row + position] = tokens[first + text, position]


class Integers(NamedTuple):
    """The fields that `pack_integers` stored, as contiguous views of the block."""

    tokens: Tensor
    text_index: Tensor
    class_ids: Tensor
    global_index: Tensor
    text_class_ids: Tensor
    text_counts: Tensor


def unpack_integers(block: Tensor, *, num_texts: int) -> Integers:
    """Takes a block apart."""
    size, width = block.shape
    fields = block.view(-1)[: _FIELDS * size].view(_FIELDS, size)
    tokens = block.view(-1)[_FIELDS * size :].view(size, width - _FIELDS)
    return Integers(
        tokens=tokens[:num_texts],
        text_index=fields[0],
        class_ids=fields[1],
        global_index=fields[2],
        text_class_ids=fields[3, :num_texts],
        text_counts=fields[4, :num_texts],
    )
