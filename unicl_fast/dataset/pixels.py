"""Reads many images of `pixels.npy` in one call that holds no lock of Python's.

They are read with `pread`, never mapped, like shards: a file that shrinks or vanishes under a
running job is then a missing row instead of a bus error. Importing this module loads Numba, so
only the readers that decode by the batch do it; `PixelLayout` in arrays.py needs no compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from numba import types

from unicl_fast.system.kernels import kernel

# The C library's function, which a compiled loop can call.
_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)


@kernel
def read_rows(file: Any, offsets: Any, rows: Any, positions: Any) -> Any:
    """Reads the bytes from offsets[i] on into rows[positions[i]], a whole row of uint8 each.

    Returns:
        bool [k], whether a row came whole; the content of one that did not is undefined.
    """
    size = rows.shape[1]
    whole = np.empty(offsets.size, np.bool_)
    for i in range(offsets.size):
        target = rows[positions[i]]
        whole[i] = _pread(file, target.ctypes.data, size, offsets[i]) == size
    return whole


def row_checksums(
    images: npt.NDArray[np.uint8], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """XXH3-64 of some rows of an array of two or more axes; 0.2 us each of 3 kB."""
    digest = xxhash.xxh3_64_intdigest
    rows = list(images.reshape(len(images), -1))
    return np.array([digest(rows[i]) for i in positions.tolist()], dtype=np.uint64)
