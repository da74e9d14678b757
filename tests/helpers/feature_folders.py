"""Folders of stored features, written as a process that stores a whole data set does."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.dataset import feature_files


def write_features(folder: Path, key: str, features: NDArray[Any]) -> None:
    """Stores the features [N width] of all samples, unless another process has."""
    with feature_files.sole_storer(folder, key), contextlib.ExitStack() as stack:
        if feature_files.has_features(folder, key):
            return
        every, dtype = np.ones(len(features), np.bool_), features.dtype
        shape = {"num_samples": len(features), "width": features.shape[1]}
        feature_files.make_rows(folder, key, **shape, kind=dtype.str)
        writer = stack.enter_context(contextlib.closing(feature_files.RowsWriter(folder, key)))
        writer.write(np.arange(len(features)), features)
        writer.flush()
        feature_files.seal_rows(folder, key, dtype=str(dtype), stored=every, unreadable=())
