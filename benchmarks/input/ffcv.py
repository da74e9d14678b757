"""FFCV among the peers of `unicl-bench input`: its own files are written first, once.

Settings are those of FFCV's ImageNet scripts where they apply to a CPU: at most 500 pixels, JPEG
quality 90, the operating system's cache, random order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.datasets import ImageFolder

from unicl_fast.config import CLIP_MEAN, CLIP_STD

from .contenders import Task

_MAX_PIXELS = 500
_QUALITY = 90
_EPOCH = 500_000
"""Images of one of its epochs; between two of them its threads start anew."""


def write_jpg(task: Task) -> None:
    """The data set as JPEGs in FFCV's format."""
    _write(task, "jpg")


def write_raw(task: Task) -> None:
    """The data set as pixels in FFCV's format."""
    _write(task, "raw")


def jpg_batches(task: Task) -> Iterator[Tensor]:
    return _batches(task, "jpg")


def raw_batches(task: Task) -> Iterator[Tensor]:
    return _batches(task, "raw")


def _path(task: Task, mode: str) -> Path:
    return task.scratch / f"{mode}.beton"


def _write(task: Task, mode: str) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    folder = ImageFolder(str(task.class_folder))
    image = RGBImageField(write_mode=mode, max_resolution=_MAX_PIXELS, jpeg_quality=_QUALITY)
    writer = DatasetWriter(
        str(_path(task, mode)), {"image": image, "label": IntField()}, num_workers=1
    )
    writer.from_indexed_dataset(folder)


def _batches(task: Task, mode: str) -> Iterator[Tensor]:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    size = (task.image_size, task.image_size)
    image: list[Any] = [
        RandomResizedCropRGBImageDecoder(size, scale=task.scale, ratio=task.ratio),
        RandomHorizontalFlip(task.flip),
        NormalizeImage(255 * np.array(CLIP_MEAN), 255 * np.array(CLIP_STD), np.float32),
        ToTensor(),
        ToTorchImage(convert_back_int16=False),
    ]
    count = sum(1 for _ in task.class_folder.glob("*/*"))
    loader = Loader(
        str(_path(task, mode)),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.tile(np.arange(count), max(1, _EPOCH // count)),
        pipelines={"image": image, "label": None},
    )
    while True:
        for (images,) in loader:
            yield images
