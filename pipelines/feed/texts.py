"""Token rows for the texts that a plan chose: stored captions, and prompts of classes.

Everything is on disk or in the prompt table already; this only gathers rows. Which text a sample
gets is the plan's choice, what equal rows mean is `unicl_fast.objectives.targets`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.kernels import kernel
from unicl_fast.text.prompts import ClassPrompts

from ..plan.plan import PlannedBatch


def gather_texts(
    planned: PlannedBatch,
    datasets: Sequence[PackedDataset],
    prompts: ClassPrompts,
    *,
    context_length: int,
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Token rows and training classes of a planned batch.

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
        places = samples["captions_start"].astype(np.int64) + planned.captions[chosen]
        captions = dataset.captions.take(places)
        _copy_texts(
            np.asarray(dataset.tokens),
            captions["tokens_start"].astype(np.int64),
            captions["tokens_length"].astype(np.int64),
            chosen,
            rows,
        )
        chosen = np.flatnonzero(mine & (planned.labels >= 0))
        if len(chosen):
            labels = planned.labels[chosen]
            found = prompts.tokens[prompts.rows_of(number, labels, planned.templates[chosen])]
            _copy_texts(
                found.reshape(-1),
                np.arange(len(chosen), dtype=np.int64) * found.shape[1],
                _lengths(found),
                chosen,
                rows,
            )
            classes[chosen] = prompts.classes_of(number, labels)
    return rows, classes


def _lengths(rows: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Tokens of each padded row, up to its end token; 0 is padding behind it, and "!" before."""
    return rows.shape[1] - np.argmax(rows[:, ::-1] != 0, axis=1)


@kernel
def _copy_texts(tokens: Any, starts: Any, lengths: Any, places: Any, rows: Any) -> None:
    """Copies text i to row places[i]; one that is too long ends in its own last token."""
    longest = rows.shape[1]
    for i in range(places.size):
        length = min(lengths[i], longest)
        for j in range(length):
            rows[places[i], j] = tokens[starts[i] + j]
        rows[places[i], length - 1] = tokens[starts[i] + lengths[i] - 1]
