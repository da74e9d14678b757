"""Folders of stored features, written as a process that stores a whole data set does."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.distributed.ranks import Ranks
from unicl_fast.training.kept_rows import storing


def write_features(folder: Path, key: str, features: NDArray[Any]) -> None:
    """Stores the features [N width] of all samples, unless another process has."""
    shape = {"width": features.shape[1], "dtype": str(features.dtype)}
    with storing(folder, {key: len(features)}, Ranks()) as store, store.writing(**shape):
        new = np.flatnonzero(~store.stored[key])
        store.write(key, new, features[new])
        store.seal()
