"""A loss from logits that an objective has made itself, where the forms of `loss.py` do not fit."""

from __future__ import annotations

from torch import Tensor

from unicl_fast.objectives.loss import dense_statistics, mean_loss, positive_weights
from unicl_fast.objectives.operands import Operands
from unicl_fast.objectives.text_columns import all_reduce_over


def positive_pairs(operands: Operands) -> Tensor:
    """The weight of each pair of an image and a text as positives: [b n] of the features' type.

    It is 1 in one class and 0 otherwise; (Y Y^T)_ik where images or texts have several classes.
    """
    assert operands.texts is not None
    b, n, dtype = len(operands.images), len(operands.texts.features), operands.images.dtype
    return positive_weights(operands.classes, operands.texts.class_ids, b, n, dtype).to(dtype)


def softmax_loss(logits: Tensor, pairs: Tensor, operands: Operands) -> Tensor:
    """UniCL's loss of this rank's logits [b n], completed over ranks: equal on all of them.

    Each column is a text of any rank; `operands.texts.counts` says how many samples have it, 0 for
    padding. `pairs` are the weights of positives [b n].
    """
    assert operands.texts is not None
    rows, columns = dense_statistics(
        logits, pairs, operands.texts.counts.to(logits.dtype), exclude_self=False, with_columns=True
    )
    return mean_loss(rows, columns, operands.texts.counts, "both", all_reduce_over(operands.ranks))
