"""Words predicted from images: ridge regression from image features to tf-idf of captions.

A text finds the images whose predicted words are most similar to its own. This is the baseline of
retrieval, and a signal of search, since it errs elsewhere than a model does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float
from numpy.typing import NDArray

from unicl_fast.dataset.feature_files import has_features
from unicl_fast.distributed.ranks import Ranks
from unicl_fast.evaluation.kept_rows import kept_rows
from unicl_fast.system.atomic_files import make_folder, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.untrusted_files import read_file

_MOST_WORDS = 20_000
_VERSION = 1  # of what is kept
_PENALTY = 5.0  # as a multiple of the width of standardised features


class PredictedWords:
    """Learnt from images with captions.

    The product of an image's vector and a text's is the cosine of their words.
    """

    def __init__(
        self,
        words: Sequence[str],
        idf: Sequence[float],
        train: Sequence[Sequence[float]],
        weights: Float[np.ndarray, "v e"],
    ) -> None:
        """`train` has the mean and the deviation of each feature; e = d + 1."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(vocabulary=words)
        self._vectorizer.idf_ = np.array(idf)
        self._train, self._weights = np.array(train), weights

    @classmethod
    def learn(
        cls, features: Float[np.ndarray, "n d"], captions: Sequence[Sequence[str]]
    ) -> PredictedWords:
        """Each image has captions. Raises ValueError for captions without words."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(max_features=_MOST_WORDS)
        words = vectorizer.fit_transform(map(" ".join, captions))
        train = _mean_and_scale(features)
        x = _standardise(features, *train).astype(np.float64)
        gram = x.T @ x + _PENALTY * x.shape[1] * np.eye(x.shape[1])
        # solved here, since scikit-learn's Ridge would store the words of all images densely; x has
        # zero mean, so the intercept, the last row, is the mean
        mean = np.asarray(words.mean(axis=0))  # a matrix
        weights = np.vstack([np.linalg.solve(gram, (words.T @ x).T), mean]).T.astype(np.float32)
        names: list[str] = vectorizer.get_feature_names_out().tolist()
        return cls(names, vectorizer.idf_.tolist(), [one.tolist() for one in train], weights)

    @classmethod
    def kept(
        cls, folder: Path, features: Float[np.ndarray, "n d"], captions: Sequence[Sequence[str]]
    ) -> PredictedWords:
        """As `learn`, kept in a folder, since that needs 5 CPU seconds for 20,000 images.

        Raises ValueError if it is damaged, OSError if the folder cannot be written.
        """
        hashed = xxhash.xxh3_128(json.dumps([_VERSION, captions]).encode())
        hashed.update(np.ascontiguousarray(features).data)
        key = hashed.hexdigest()
        file = folder / f"{key}.words.json"
        learnt = None
        if not (file.is_file() and has_features(folder, key)):
            learnt = cls.learn(features, captions)
            words = learnt._vectorizer
            facts = {"words": [*words.vocabulary], "idf": words.idf_.tolist()}
            make_folder(folder)
            train = learnt._train.tolist()
            write_text_atomically(file, dump_checksummed_json(facts | {"train": train}))
        facts = parse_checksummed_json(read_file(file))

        def encode(new: Sequence[int]) -> list[tuple[NDArray[np.int64], NDArray[Any]]]:
            assert learnt is not None
            return [(np.array(new), learnt._weights[new])]

        weights = kept_rows(
            folder, key, family=key, items=np.arange(len(facts["words"]), dtype=np.uint64),
            width=features.shape[1] + 1, encode=encode, ranks=Ranks(),
        )  # fmt: skip
        return cls(**facts, weights=weights)

    def of_images(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n e"]:
        """Vectors of images, in fp32; e = d + 1."""
        x = _standardise(features, *self._train).astype(np.float64)
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


def _standardise(
    features: Float[np.ndarray, "n d"],
    mean: Float[np.ndarray, " d"],
    scale: Float[np.ndarray, " d"],
) -> Float[np.ndarray, "n d"]:
    rows: NDArray[Any] = ((features - mean) / scale).astype(np.float32)
    return rows


def _mean_and_scale(
    train: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """The mean and the deviation of each dimension, which standardise features."""
    mean = np.asarray(np.mean(train, axis=0, dtype=np.float64))
    deviation: NDArray[Any] = np.std(train, axis=0, dtype=np.float64)
    # a dimension that hardly varies in training must not blow up a test image
    return mean, np.maximum(deviation, 1e-3 * deviation.max() or 1.0)


def standardised(
    train: Float[np.ndarray, "n d"], *others: Float[np.ndarray, "m d"]
) -> list[Float[np.ndarray, "k d"]]:
    """Features with the mean and deviation of `train` taken out, in fp32."""
    mean, scale = _mean_and_scale(train)
    return [_standardise(one, mean, scale) for one in (train, *others)]
