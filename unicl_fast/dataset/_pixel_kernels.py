"""The Numba kernel under `pixel_file`: many rows of a file into an array, in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from unicl_fast.system.kernels import kernel

# Of the C library, so that a loop over rows holds no lock of Python's and can be cached.
_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@kernel
def read_rows(file: Any, start: Any, indices: Any, rows: Any, places: Any) -> Any:
    """Reads row indices[i] of a file, whose rows begin at `start`, to rows[places[i]].

    Returns bool [k], whether a row came whole; one that did not is left as the system left it.
    """
    size = rows.shape[1]
    whole = np.empty(indices.size, np.bool_)
    for i in range(indices.size):
        target = rows[places[i]]
        whole[i] = _pread(file, target.ctypes.data, size, start + indices[i] * size) == size
    return whole
