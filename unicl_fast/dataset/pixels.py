"""The decoded images of a raw data set: one array of rows of equal size, read by the batch.

Apart from `shards`, which knows what belongs to a sample: here is where an image lies, and how
many of them get into memory at once. They are read with `pread`, never mapped, like shards: a file
that shrinks or vanishes under a running job is then a row that is missing instead of a bus error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import HEADER_BYTES, npy_header
from unicl_fast.dataset.files import DatasetFiles
from unicl_fast.dataset.manifest import PixelsInfo

PIXELS_NAME = "pixels.npy"
PIXEL_DTYPE = np.dtype("|u1")
CHANNELS = 3

UInt8Array = npt.NDArray[np.uint8]
Fault = ValueError | FileNotFoundError


class PixelFile:
    """`pixels.npy` of one data set: uint8 [N h w 3]."""

    def __init__(self, place: str | Path, info: PixelsInfo, num_samples: int) -> None:
        """Nothing is opened before it is read; `place` names the data set in messages.

        Raises:
            ValueError: the manifest contradicts itself.
        """
        self._num_samples = num_samples
        self.shape = (info.height, info.width, CHANNELS)
        self.row_bytes = info.height * info.width * CHANNELS
        self._num_bytes = HEADER_BYTES + num_samples * self.row_bytes
        if not self.row_bytes or self._num_bytes != info.num_bytes:
            raise ValueError(
                f"the manifest of {place} contradicts itself: {num_samples} images of "
                f"{info.width} x {info.height} pixels, but {info.num_bytes} bytes of {PIXELS_NAME}"
            )
        self.pnm_header = f"P6\n{info.width} {info.height}\n255\n".encode("ascii")
        """Before the bytes of an image it makes a file that decoders read."""

    @overload
    def offset_of(self, index: int) -> int: ...

    @overload
    def offset_of(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def offset_of(self, index: Any) -> Any:
        """The first byte of image `index`, or of several, in the file."""
        return HEADER_BYTES + index * self.row_bytes

    def find_fault(self, files: DatasetFiles) -> tuple[Fault, int] | None:
        """What is wrong with the file, and how many images it costs; None if it is whole.

        Compares sizes and the header; pixels are compared when they are read.
        """
        path, total = files.where(PIXELS_NAME), self._num_samples
        num_bytes = files.sizes_of([PIXELS_NAME])[PIXELS_NAME]
        if num_bytes is None:
            return FileNotFoundError(f"{path} is missing; copy the data set again"), total
        try:
            if isinstance(num_bytes, OSError):
                raise num_bytes
            header = files.head_of(PIXELS_NAME, min(num_bytes, HEADER_BYTES))
        except OSError as error:
            return ValueError(f"{path} cannot be read: {error}"), total
        shape = (total, *self.shape)
        if header != npy_header(PIXEL_DTYPE, shape):
            return ValueError(
                f"{path} is damaged: it does not begin as an array uint8 {list(shape)} of ours "
                "does, as the manifest says; copy the data set again"
            ), total
        if num_bytes != self._num_bytes:
            whole = (num_bytes - HEADER_BYTES) // self.row_bytes
            return ValueError(
                f"{path} has {num_bytes} bytes, the manifest says {self._num_bytes}; "
                "copy the data set again"
            ), max(0, total - whole)
        return None

    def read_rows(
        self,
        file: int,
        indices: npt.NDArray[np.int64],
        out: UInt8Array,
        places: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.bool_]:
        """Reads many images in one go, without Python's lock: out[places[i]] is indices[i].

        Args:
            file: descriptor of the file.
            indices: which images, int64 [k], each in 0 to N - 1.
            out: uint8 [b h w 3], contiguous; written.
            places: int64 [k], each in 0 to b - 1.

        Returns:
            bool [k]: which of them came whole; of the others nothing is known.
        """
        # Here, because writers need no compiler.
        from unicl_fast.dataset._pixel_kernels import read_rows

        rows = out.reshape(len(out), self.row_bytes)
        whole: npt.NDArray[np.bool_] = read_rows(file, HEADER_BYTES, indices, rows, places)
        return whole


def row_checksums(images: UInt8Array, places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """XXH3-64 of some rows of an array of two or more axes; 0.2 us each of 3 kB."""
    digest = xxhash.xxh3_64_intdigest
    rows = list(images.reshape(len(images), -1))
    checksums = [digest(rows[place]) for place in places.tolist()]
    return np.array(checksums, dtype=np.uint64)
