"""Crop windows: RandomResizedCrop's distribution for training, and regions for evaluation.

Both follow torchvision to the rounding, since published accuracies rest on it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicl_fast.config import DataConfig
from unicl_fast.system.kernels import kernel
from unicl_fast.system.keyed_random import random_bits, random_unit

_TRIES = 10


def random_windows(
    heights: NDArray[np.integer[Any]],
    widths: NDArray[np.integer[Any]],
    counters: NDArray[np.int64],
    *,
    key: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    part_shown: float = 1.0,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Draws crop windows as torchvision's RandomResizedCrop does.

    Up to ten tries draw an area (uniform part of the image's) and an aspect ratio (uniform in
    its logarithm) and use the first window that fits; otherwise the largest central window of a
    permitted ratio is used. If the whole area is requested in one ratio, that window is used at
    once: rounding would let windows of nearly square images fit, and move by a pixel. Of its sides
    the middle `part_shown` is taken then, as evaluations do.

    Images' `heights` and `widths` are [b], and `counters` the number of each image's window in the
    stream of `key`. `scale` has the smallest and largest part of the area, `ratio` of width/height.
    Returns int32 [b 2] first row and column, and int32 [b 2] height and width.
    """
    starts, shapes = _random_windows(
        heights.astype(np.int64),
        widths.astype(np.int64),
        counters,
        np.uint64(key),
        np.array(scale, dtype=np.float64),
        np.array(ratio, dtype=np.float64),
        part_shown,
    )
    return starts, shapes


@kernel
def _random_windows(
    heights: Any, widths: Any, counters: Any, key: Any, scale: Any, ratio: Any, part_shown: float
) -> Any:
    starts = np.empty((heights.size, 2), np.int32)
    shapes = np.empty((heights.size, 2), np.int32)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    tries = 0 if scale[0] == 1 and ratio[0] == ratio[1] else _TRIES
    for i in range(heights.size):
        image_key = random_bits(key, np.uint64(counters[i]))
        height, width = heights[i], widths[i]
        for attempt in range(tries):
            draw = 4 * attempt
            part = scale[0] + (scale[1] - scale[0]) * random_unit(image_key, draw)
            area = part * height * width
            aspect = math.exp(log_low + (log_high - log_low) * random_unit(image_key, draw + 1))
            # np.rint rounds halves to even, as Python's round does in torchvision.
            w = np.int64(np.rint(math.sqrt(area * aspect)))
            h = np.int64(np.rint(math.sqrt(area / aspect)))
            if 0 < w <= width and 0 < h <= height:
                top = np.int64(random_unit(image_key, draw + 2) * (height - h + 1))
                left = np.int64(random_unit(image_key, draw + 3) * (width - w + 1))
                break
        else:
            w, h = width, height
            if width < height * ratio[0]:
                h = np.int64(np.rint(width / ratio[0]))
            elif width > height * ratio[1]:
                w = np.int64(np.rint(height * ratio[1]))
            if tries == 0:
                w = np.int64(max(1.0, np.rint(w * part_shown)))
                h = np.int64(max(1.0, np.rint(h * part_shown)))
            top = (height - h) // 2
            left = (width - w) // 2
        starts[i, 0], starts[i, 1] = top, left
        shapes[i, 0], shapes[i, 1] = h, w
    return starts, shapes


def evaluation_regions(
    heights: NDArray[np.integer[Any]], widths: NDArray[np.integer[Any]], data: DataConfig
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region of each image that evaluation resamples to a square, in its own pixels.

    For a number as `data.evaluation_resize` it is what torchvision's Resize and CenterCrop keep:
    resampling just this region gives the same pixels as resizing the whole and cutting, because the
    scale is the same and the filter may still look beyond the region's edge. For `squash` it is the
    whole image. For `longest` it begins before the image and ends after it, where `fill_borders`
    fills the square.

    Images' `heights` and `widths` are [b]. Returns float32 [b 2] starts and ends (row, column).
    """
    original = np.stack([heights, widths], axis=1).astype(np.int64)
    crop = data.image_size
    first: NDArray[Any]
    if data.evaluation_resize == "squash":
        first, resized = np.zeros_like(original), np.full_like(original, crop)
    elif data.evaluation_resize == "longest":
        first, resized = _within_square(original, crop)
    else:
        shorter = original.min(axis=1, keepdims=True)
        # truncated, after rounding to the nearest double, as in torchvision
        resized = (data.evaluation_resize * original / shorter).astype(np.int64)
        first = np.rint((resized - crop) / 2.0).astype(np.int64)
    per_pixel = original / resized
    starts = (first * per_pixel).astype(np.float32)
    ends = ((first + crop) * per_pixel).astype(np.float32)
    if data.evaluation_resize != "longest":  # not by a rounding beyond the image
        ends = np.minimum(ends, original.astype(np.float32))
    return starts, ends


def _within_square(
    original: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Minus the first row and column of each image in its square, and its size there [b 2]."""
    longer = original.max(axis=1, keepdims=True)
    resized = np.maximum(np.rint(original * size / longer), 1).astype(np.int64)
    return -((size - resized) // 2), resized


def fill_borders(squares: Any, heights: Any, widths: Any, data: DataConfig) -> None:
    """Fills what is not image in squares that show whole images (`evaluation_resize=longest`).

    `squares` uint8 [b size size 3], an array or a tensor, are changed in place; `heights` and
    `widths` [b] are those of the images.
    """
    if data.evaluation_resize != "longest":
        return
    first, resized = _within_square(np.stack([heights, widths], axis=1).astype(np.int64),
                                    data.image_size)  # fmt: skip
    level = padding_level(data)
    for square, (top, left), (height, width) in zip(
        squares, (-first).tolist(), resized.tolist(), strict=True
    ):
        for border in (square[:top], square[top + height :]):
            border[...] = level
        for border in (square[:, :left], square[:, left + width :]):
            border[...] = level


def padding_level(data: DataConfig) -> int:
    """The grey of borders, nearest to the mean colour; open_clip pads with one level."""
    return round(255 * sum(data.mean) / 3)
