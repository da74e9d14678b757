"""The loss for objectives that compute logits themselves, if no form of `loss.py` fits."""

from torch import Tensor

from unicl_fast.objectives.loss import dense_statistics, mean_loss, positive_weights
from unicl_fast.objectives.operands import Operands
from unicl_fast.objectives.text_columns import all_reduce_over


def positive_pairs(operands: Operands) -> Tensor:
    """Weights of image-text pairs as positives, [b n]: 1 for a class in common, else 0."""
    assert operands.texts is not None
    b, n, dtype = len(operands.images), len(operands.texts.features), operands.images.dtype
    return positive_weights(operands.classes, operands.texts.class_ids, b, n, dtype).to(dtype)


def softmax_loss(logits: Tensor, pairs: Tensor, operands: Operands) -> Tensor:
    """UniCL's loss over all ranks from this rank's logits and weights of positives, both [b n]."""
    assert operands.texts is not None
    counts = operands.texts.counts.to(logits.dtype)
    rows, columns = dense_statistics(logits, pairs, counts, with_columns=True)
    all_reduce = all_reduce_over(operands.ranks)
    return mean_loss(rows, columns, operands.texts.counts, "both", all_reduce, operands.weights)
