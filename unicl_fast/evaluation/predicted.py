"""Words predicted from images: ridge regression from image features to tf-idf of captions.

A text finds the images whose predicted words are most similar to its own. This is the baseline of
retrieval, and a signal of search, since it errs elsewhere than a model does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.distributed.ranks import Ranks
from unicl_fast.models.unicl import LEAST_DEVIATION
from unicl_fast.training.kept_rows import kept_rows

_MOST_WORDS = 20_000
_VERSION = 2  # of what is kept
_PENALTY = 5.0  # as a multiple of the width of standardised features


class PredictedWords:
    """Learnt from images with captions.

    The product of an image's vector and a text's is the cosine of their words.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "n d"],
        captions: Sequence[Sequence[str]],
        folder: Path | None = None,
    ) -> None:
        """Each image has captions; a `folder` keeps what is learnt.

        Raises ValueError for captions without words, or if what is kept is damaged.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(max_features=_MOST_WORDS)
        words = self._vectorizer.fit_transform(map(" ".join, captions))
        self._train = _mean_and_scale(features)
        if folder is None:
            self._weights = self._learn(features, words)
            return
        hashed = xxhash.xxh3_128(json.dumps([_VERSION, captions]).encode())
        hashed.update(np.ascontiguousarray(features).data)
        # 20,000 images of 1,280 features take 5 CPU seconds, and all above half a second
        self._weights = kept_rows(
            folder, key := hashed.hexdigest(), family=key, width=features.shape[1] + 1,
            items=np.arange(words.shape[1], dtype=np.uint64), ranks=Ranks(),
            encode=lambda new: [(np.array(new), self._learn(features, words)[new])],
        )  # fmt: skip

    def _learn(self, features: Float[np.ndarray, "n d"], words: Any) -> Float[np.ndarray, "v e"]:
        x = self._standardised(features)
        gram = x.T @ x + _PENALTY * x.shape[1] * np.eye(x.shape[1])
        # solved here, since scikit-learn's Ridge would store the words of all images densely; x has
        # zero mean, so the intercept, the last row, is the mean
        mean = np.asarray(words.mean(axis=0))  # a matrix
        weights = np.vstack([np.linalg.solve(gram, (words.T @ x).T), mean]).T
        return np.ascontiguousarray(weights, np.float32)

    def of_images(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n e"]:
        """Vectors of images, in fp32; e = d + 1."""
        x = self._standardised(features)
        x = np.column_stack([x, np.ones(len(x))])
        norms = np.sqrt(((x @ (self._weights.T @ self._weights)) * x).sum(axis=1, keepdims=True))
        found: NDArray[Any] = (x / norms).astype(np.float32)
        return found

    def of_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "m e"]:
        """Vectors of texts, in fp32; 0 for a text without known words."""
        found = self._vectorizer.transform(texts) @ self._weights
        return np.asarray(found, np.float32)

    def digest(self) -> str:
        """A hash of what was learnt, as 16 hex digits."""
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self._weights).data)

    def _standardised(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
        mean, scale = self._train
        # rounded as `standardised` has them
        rows: NDArray[Any] = ((features - mean) / scale).astype(np.float32).astype(np.float64)
        return rows


def _mean_and_scale(
    train: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The mean and the deviation of each dimension, which standardise features."""
    mean = np.asarray(np.mean(train, axis=0, dtype=np.float64))
    deviation: NDArray[Any] = np.std(train, axis=0, dtype=np.float64)
    return mean, np.maximum(deviation, LEAST_DEVIATION * deviation.max() or 1.0)


def standardised(
    train: Float[np.ndarray, "n d"], *others: Float[np.ndarray, "m d"]
) -> list[Float[np.ndarray, "k d"]]:
    """Features with the mean and deviation of `train` taken out, in fp32."""
    mean, scale = _mean_and_scale(train)
    return [((one - mean) / scale).astype(np.float32) for one in (train, *others)]
