"""The whole numbers of a batch as one array, so that they travel through DALI as one tensor.

Each input costs DALI a bookkeeping pass over the batch, and each tensor sent to a GPU a transfer of
its own; five fields and the tokens in one block cost one. The block is [b l + 5] because DALI wants
a row a sample, but the fields lie in it one after another, so that each is contiguous again when
it is cut out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.objectives.targets import TargetSteps
from unicl_fast.system.kernels import kernel

_FIELDS = 5


def pack_integers(
    steps: TargetSteps, global_index: NDArray[np.int64], *, context_length: int
) -> NDArray[np.int64]:
    """Targets and slots of some batches of b samples as int64 [steps * b, context_length + 5].

    Rows of tokens are padded with 0 to `context_length`; there are never more texts than samples.

    Args:
        steps: targets of the batches.
        global_index: of one batch, int64 [b]; all have the same.
        context_length: at least the length of the rows of tokens.
    """
    block = np.zeros((len(steps.text_index), context_length + _FIELDS), dtype=np.int64)
    _pack(
        block.reshape(-1),
        steps.num_texts,
        steps.tokens,
        steps.text_index,
        steps.text_class_ids,
        steps.text_counts,
        global_index,
        context_length,
    )
    return block


@kernel
def _pack(
    block: Any,
    num_texts: Any,
    tokens: Any,
    text_index: Any,
    text_class_ids: Any,
    text_counts: Any,
    global_index: Any,
    context_length: Any,
) -> None:
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


def unpack_integers(block: Tensor, *, num_texts: int) -> dict[str, Tensor]:
    """The fields of `Batch` that `pack_integers` stored, as contiguous views of the block."""
    size, width = block.shape
    fields = block.view(-1)[: _FIELDS * size].view(_FIELDS, size)
    tokens = block.view(-1)[_FIELDS * size :].view(size, width - _FIELDS)
    return {
        "text_index": fields[0],
        "class_ids": fields[1],
        "global_index": fields[2],
        "text_class_ids": fields[3, :num_texts],
        "text_counts": fields[4, :num_texts],
        "tokens": tokens[:num_texts],
    }
