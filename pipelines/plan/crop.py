"""Crop windows: RandomResizedCrop's distribution for training, the centre for evaluation.

Windows are computed on the host from the images' sizes, so that the decoder is told what to
decode and a plan can be replayed. Both follow torchvision to the rounding, since published
accuracies rest on it. Nothing here touches pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Draws crop windows as torchvision's RandomResizedCrop does.

    Up to ten tries draw an area (uniform part of the image's) and an aspect ratio (uniform in
    its logarithm) and take the first window that fits; otherwise the largest central window of a
    permitted ratio is taken. Where the whole area is asked for, in one ratio, that is taken at
    once: rounding would let windows of nearly square images fit, and move by a pixel.

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
    )
    return starts, shapes


@kernel
def _random_windows(
    heights: Any, widths: Any, counters: Any, key: Any, scale: Any, ratio: Any
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
            top = (height - h) // 2
            left = (width - w) // 2
        starts[i, 0], starts[i, 1] = top, left
        shapes[i, 0], shapes[i, 1] = h, w
    return starts, shapes


def central_windows(
    heights: NDArray[np.integer[Any]],
    widths: NDArray[np.integer[Any]],
    *,
    resize: int,
    crop: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The region that torchvision's Resize(resize) and CenterCrop(crop) keep, in original pixels.

    Resampling just this region to crop x crop gives the same pixels as resizing the whole and
    cutting, because the scale is the same and the filter may still look beyond the region's edge.

    Images' `heights` and `widths` are [b]; `resize` is the length of the shorter side after
    resizing, at least `crop`, the side of the crop. Returns float32 [b 2] region start and end
    (row, column) in pixels of the original.
    """
    original = np.stack([heights, widths], axis=1).astype(np.int64)
    shorter = original.min(axis=1, keepdims=True)
    # int() of a quotient of floats: torchvision truncates, after rounding to the nearest double.
    resized = (resize * original / shorter).astype(np.int64)
    first = np.rint((resized - crop) / 2.0)
    per_pixel = original / resized
    return (
        (first * per_pixel).astype(np.float32),
        ((first + crop) * per_pixel).astype(np.float32),
    )
