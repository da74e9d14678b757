"""The whole numbers of a batch as one array, so that they travel through DALI as one tensor.

Each input costs DALI a bookkeeping pass over the batch, and each tensor sent to a GPU a transfer of
its own; five fields and the tokens in one block cost one. The block is [b l + 5] because DALI wants
a row a sample, but the fields lie in it one after another, so that each is contiguous again when
it is cut out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.targets import Targets

_FIELDS = 5


def pack_integers(
    targets: Targets, slots: NDArray[np.int64], *, context_length: int
) -> NDArray[np.int64]:
    """Targets and slots of b samples as one int64 [b context_length + 5].

    Rows of tokens are padded with 0 to `context_length`; there are never more texts than samples.
    """
    size = len(slots)
    block = np.zeros((size, context_length + _FIELDS), dtype=np.int64)
    fields = block.reshape(-1)[: _FIELDS * size].reshape(_FIELDS, size)
    tokens = block.reshape(-1)[_FIELDS * size :].reshape(size, context_length)
    num_texts = len(targets.tokens)
    fields[0] = targets.text_index
    fields[1] = targets.class_ids
    fields[2] = slots
    fields[3, :num_texts] = targets.text_class_ids
    fields[4, :num_texts] = targets.text_counts
    tokens[:num_texts, : targets.tokens.shape[1]] = targets.tokens
    return block


def unpack_integers(block: Tensor, *, num_texts: int) -> dict[str, Tensor]:
    """The fields of `Batch` that `pack_integers` stored, as contiguous views of the block."""
    size, width = block.shape
    fields = block.view(-1)[: _FIELDS * size].view(_FIELDS, size)
    tokens = block.view(-1)[_FIELDS * size :].view(size, width - _FIELDS)
    return {
        "text_index": fields[0],
        "class_ids": fields[1],
        "slots": fields[2],
        "text_class_ids": fields[3, :num_texts],
        "text_counts": fields[4, :num_texts],
        "tokens": tokens[:num_texts],
    }
