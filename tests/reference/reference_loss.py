"""The losses written out with loops and NumPy, in fp64."""

import numpy as np


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def unified_contrastive_loss(
    images: np.ndarray,
    texts: np.ndarray,
    classes: np.ndarray,
    scale: float,
) -> tuple[float, float]:
    """L_i2t and L_t2i of n images and n texts, one text for each image."""
    n = len(images)
    logits = scale * images.astype(np.float64) @ texts.astype(np.float64).T

    def one_direction(logits: np.ndarray) -> float:
        total = 0.0
        for i in range(n):
            positives = [j for j in range(n) if classes[j] == classes[i]]
            total += -np.mean(_log_softmax(logits[i])[positives])
        return total / n

    return one_direction(logits), one_direction(logits.T)


def sigmoid_contrastive_loss(
    images: np.ndarray,
    texts: np.ndarray,
    weights: np.ndarray,
    counts: np.ndarray,
    scale: float,
    bias: float,
) -> float:
    """SigLIP: cross-entropy of each pair's sigmoid against its weight [b u], counted, by image."""
    total = 0.0
    for i, image in enumerate(images.astype(np.float64)):
        for k, text in enumerate(texts.astype(np.float64)):
            logit = scale * image @ text + bias
            log_yes, log_no = -np.logaddexp(0, -logit), -np.logaddexp(0, logit)
            total -= counts[k] * (weights[i, k] * log_yes + (1 - weights[i, k]) * log_no)
    return total / len(images)
