"""The files of a batch's images in one buffer; nothing is done per image in Python (10 us each)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ppm_header(height: int, width: int) -> bytes:
    """The header of an 8-bit PPM (P6) in its simplest form."""
    return f"P6\n{width} {height}\n255\n".encode("ascii")


def ppm_bytes(heights: NDArray[np.uint16], widths: NDArray[np.uint16]) -> NDArray[np.int64]:
    """File sizes of such PPMs [b]."""
    tens = 10 ** np.arange(1, 5)
    digits = sum(np.searchsorted(tens, sides, side="right") + 1 for sides in (heights, widths))
    fixed = len(ppm_header(1, 1)) - 2
    return np.asarray(fixed + digits + 3 * heights.astype(np.int64) * widths)


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImages:
    """Files of any format; image i is content[starts[i] : starts[i] + sizes[i]]."""

    content: NDArray[np.uint8]
    """uint8 [bytes]."""
    starts: NDArray[np.int64]
    """int64 [b]."""
    sizes: NDArray[np.int64]
    """int64 [b], in bytes."""

    @classmethod
    def empty(cls, sizes: NDArray[np.int64]) -> EncodedImages:
        """Room for files of these sizes."""
        ends = np.cumsum(sizes)
        return cls(np.empty(int(sizes.sum()), np.uint8), ends - sizes, sizes)

    @classmethod
    def of(cls, files: Sequence[NDArray[np.uint8]]) -> EncodedImages:
        """Copies of uint8 [bytes] arrays."""
        images = cls.empty(np.array([len(file) for file in files], np.int64))
        np.concatenate([images.content[:0], *files], out=images.content)
        return images

    def __len__(self) -> int:
        return len(self.starts)

    def files(self, rows: slice = slice(None)) -> list[NDArray[np.uint8]]:
        """The files of some images, without copying."""
        content, starts, sizes = self.content, self.starts[rows].tolist(), self.sizes[rows].tolist()
        return [content[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def replaced(
        self, rows: NDArray[np.int64], files: Sequence[NDArray[np.uint8]]
    ) -> EncodedImages:
        """A copy with other files in `rows`."""
        others = EncodedImages.of(files)
        starts, sizes = self.starts.copy(), self.sizes.copy()
        starts[rows], sizes[rows] = len(self.content) + others.starts, others.sizes
        return EncodedImages(np.concatenate([self.content, others.content]), starts, sizes)
