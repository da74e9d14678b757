"""The loss written out with loops and NumPy, in fp64."""

import numpy as np


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def unified_contrastive_loss(
    images: np.ndarray, texts: np.ndarray, classes: np.ndarray, scale: float
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
