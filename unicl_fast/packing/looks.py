"""Looks: the facts about an image by which `near_duplicates` finds its copies."""

import io

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

_DRAFT = 128
"""JPEGs are decoded at the smallest eighth of their size with this many pixels a side, four times
as many as the hash uses."""
_SIDE, _THUMBNAIL_SIDE = 32, 16
_ANGLES = np.pi * np.outer(np.arange(8), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
_COSINES = np.rint(2**20 * np.cos(_ANGLES)).astype(np.int64)
"""The lowest 8 frequencies of the discrete cosine transform, as integers: floating-point products
differ between machines, and a build must resume on another with the same hashes."""
_MIRROR = (-1) ** np.arange(8)
LOOK = np.dtype(
    [("file", "<u8"), ("pixels", "<u8"), ("hash", "<u8"), ("mirrored", "<u8"),
     ("thumbnail", "u1", (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))]
)  # fmt: skip
"""Checksums of an image's file and pixels, hashes of it and its mirror image, a small grey one."""


def _bits(low: npt.NDArray[np.int64]) -> int:
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def look_at(data: bytes) -> bytes:
    """A `LOOK` of a packed image, which is 8-bit and opaque; its hash has ImageHash's bits.

    JPEGs with equal data are equal in their reduced pixels too.
    """
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        image.draft("RGB", (_DRAFT, _DRAFT))
        pixels = image.convert("RGB")
    checksum = xxhash.xxh3_64(repr(size).encode())
    checksum.update(pixels.tobytes())
    small = pixels.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    low = _COSINES @ np.asarray(small, np.int64) @ _COSINES.T
    thumbnail = small.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    values = (
        xxhash.xxh3_64_intdigest(data),
        checksum.intdigest(),
        _bits(low),
        _bits(low * _MIRROR),
        np.asarray(thumbnail),
    )
    return np.array(values, LOOK).tobytes()
