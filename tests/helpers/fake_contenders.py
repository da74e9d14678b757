"""Contestants for tests of `unicl-bench input`: quick to start, and some of them wrong.

They need only NumPy and Pillow. Their crops are whole images squashed to a square, whatever the
task's distribution: on squares every contestant makes the same.
"""

import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from benchmarks.input.contenders import Task
from unicl_fast.config import CLIP_MEAN, CLIP_STD


def honest(task: Task) -> Iterator[np.ndarray]:
    """Makes the images that all are to make."""
    return _batches(task, Image.Resampling.BILINEAR)


def nearest(task: Task) -> Iterator[np.ndarray]:
    """Resizes without a filter: the same mean and nearly the same deviation."""
    return _batches(task, Image.Resampling.NEAREST)


def _batches(task: Task, resampling: Image.Resampling) -> Iterator[np.ndarray]:
    size = (task.image_size, task.image_size)
    images = []
    for path in sorted(task.class_folder.glob("*/*")):
        with Image.open(path) as image:
            resized = image.convert("RGB").resize(size, resampling)
        images.append((np.asarray(resized) / 255 - CLIP_MEAN) / CLIP_STD)
    stacked = np.stack(images).astype(np.float32).transpose(0, 3, 1, 2)
    for step in itertools.count():
        time.sleep(0.002)
        yield stacked[(step * task.batch_size + np.arange(task.batch_size)) % len(stacked)]


def flipped(task: Task) -> Iterator[np.ndarray]:
    """Flips images that are not to be flipped."""
    for batch in honest(task):
        yield batch[..., ::-1]


def bytes_instead(task: Task) -> Iterator[np.ndarray]:
    """Leaves the normalising to others."""
    for batch in honest(task):
        yield batch.astype(np.uint8)


def darker_crops(task: Task) -> Iterator[np.ndarray]:
    """Is right where the crop is given, and wrong where it is drawn."""
    for batch in honest(task):
        yield batch if task.scale == (1.0, 1.0) else batch - np.float32(0.5)


def not_installed(task: Task) -> Iterator[np.ndarray]:
    import a_package_that_nobody_has  # noqa: F401

    yield from honest(task)


def dies(task: Task) -> Iterator[np.ndarray]:
    """Ends its process without a message, in its first turn."""
    for step, batch in enumerate(honest(task)):
        if step == 70:
            os._exit(9)
        yield batch
