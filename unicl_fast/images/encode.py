"""Encodes pixels as files by Pillow: JPEG (libjpeg-turbo), WebP (libwebp) and PNG.

The same pixels give the same bytes, with no time, no profile and no text in them, and in the
simplest form of each format, which every decoder reads alike. Which image is encoded, and at which
quality, `check` decides.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image

from unicl_fast.images.decode import ImageError, Pixels

_SMALLEST_CUT = 128
"""Pixels of the shorter side from which on restart markers are written."""
_STRETCHES_A_ROW = 8
_SHORTEST_STRETCH = 32
"""Pixels between markers. A marker costs bytes and the prediction of colour: 2 to 3 % of a
photograph in 4:2:0, 4 % in 4:4:4; stretches of half as many pixels cost twice that."""
MAX_WEBP_SIDE = 16_383
"""WebP keeps a side in 14 bits."""
WEBP_METHOD = 4
"""libwebp's effort, 0 to 6; 4 is its default."""
PNG_COMPRESSION = 3
"""zlib's level. Photographs of 256 pixels take 12.5 ms; at 6, the default, 27 ms and 3 % less."""


def encode_jpeg(pixels: Pixels, *, quality: int, subsampling: str) -> bytes:
    """A baseline JPEG of pixels [h w 1] or [h w 3]; `subsampling` of chroma is 444, 422 or 420.

    Raises:
        ImageError: libjpeg does not take it.
    """
    height, width, channels = pixels.shape
    halved = channels == 3 and subsampling != "444"
    interval = restart_interval(height, width, block_width=16 if halved else 8)
    return _saved(
        pixels,
        format="JPEG",
        quality=quality,
        subsampling=":".join(subsampling),
        **({"restart_marker_blocks": interval} if interval else {}),
    )


def restart_interval(height: int, width: int, *, block_width: int) -> int:
    """Blocks between restart markers; 0 sets none.

    The loader cuts a file down to a window's part at them (`pipelines/kernels/jpeg_windows.py`), so
    each row must begin with one: the interval divides the blocks of a row. It is the divisor that
    comes nearest to eight stretches a row without being short, which for a prime number of blocks
    is one stretch. In a small image markers would cost more than they save.

    Args:
        height: in pixels.
        width: in pixels.
        block_width: pixels that are coded together: 16 where chroma is halved, else 8.
    """
    if min(height, width) < _SMALLEST_CUT:
        return 0
    columns = -(-width // block_width)
    wished = columns / _STRETCHES_A_ROW
    fitting = (
        interval
        for interval in range(1, columns + 1)
        if columns % interval == 0 and interval * block_width >= _SHORTEST_STRETCH
    )
    return min(fitting, key=lambda interval: abs(math.log(interval / wished)))


def encode_webp(pixels: Pixels, *, quality: int) -> bytes:
    """A lossy WebP in the simple format; the format has no grey, so all have three channels.

    Raises:
        ImageError: it is too large for the format.
    """
    height, width, _ = pixels.shape
    if max(height, width) > MAX_WEBP_SIDE:
        raise ImageError(
            "unsupported",
            f"{width} x {height} pixels; WebP holds at most {MAX_WEBP_SIDE:,} a side: --resize "
            "makes images smaller, and --format jpeg or png takes larger ones",
        )
    return _saved(pixels, format="WEBP", quality=quality, method=WEBP_METHOD)


def encode_png(pixels: Pixels) -> bytes:
    """A PNG with 8 bits, grey or RGB, that loses nothing."""
    return _saved(pixels, format="PNG", compress_level=PNG_COMPRESSION)


def image_of(pixels: Pixels) -> Image.Image:
    """Pillow's view of pixels, which knows grey ones without a channel axis."""
    return Image.fromarray(
        np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    )


def _saved(pixels: Pixels, *, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    try:
        image_of(pixels).save(file, format=format, **options)
    except (ValueError, OSError) as error:
        raise ImageError("unsupported", f"Pillow cannot encode it: {error}") from error
    return file.getvalue()
