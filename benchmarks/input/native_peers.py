"""Peers of `unicl-bench input` with decoders of their own: plain DALI, SPDL, a thread pool.

All yield normalised float32 [b c h w] with crops by torchvision's law.
"""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from unicl_fast.config import CLIP_MEAN, CLIP_STD
from unicl_fast.dataset.reader import PackedDataset

from .contenders import Task

_MEAN = 255 * np.float32(CLIP_MEAN)
_STD = 255 * np.float32(CLIP_STD)
_AHEAD = 3
"""Batches in work beside the one that is out."""


def dali_batches(task: Task) -> Iterator[Tensor]:
    """The graph of DALI's own examples on a webdataset."""
    from nvidia.dali import fn, pipeline_def, types

    shards = sorted(task.data.glob("shard-*.tar"))

    @pipeline_def
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg;png;webp"],
            random_shuffle=True,
        )
        images = fn.decoders.image_random_crop(
            encoded, random_area=list(task.scale), random_aspect_ratio=list(task.ratio)
        )
        images = fn.resize(
            images,
            size=[task.image_size, task.image_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=_MEAN.tolist(),
            std=_STD.tolist(),
            mirror=fn.random.coin_flip(probability=task.flip),
        )

    pipeline = graph(batch_size=task.batch_size, num_threads=task.threads, device_id=None, seed=1)
    while True:
        (images,) = pipeline.run()
        yield from_dlpack(images.as_tensor())
        del images


def spdl_batches(task: Task) -> Iterator[Tensor]:
    """SPDL's threads, each having FFmpeg decode, crop, scale and mirror one image at a time."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    paths = sorted(str(path) for path in task.class_folder.glob("*/*"))
    draw = random.Random(1)
    size = task.image_size

    def source() -> Iterator[str]:
        while True:
            yield from draw.sample(paths, len(paths))

    def decode(path: str) -> Any:
        packets = spdl.io.demux_image(path)
        top, left, height, width = random_crop(
            draw, packets.codec.height, packets.codec.width, task
        )
        filters = [
            f"crop={width}:{height}:{left}:{top}:exact=1",
            f"scale={size}:{size}:flags=bilinear",
            *(["hflip"] if draw.random() < task.flip else []),
            "format=pix_fmts=rgb24",
        ]
        return spdl.io.decode_packets(packets, filter_desc=",".join(filters))

    mean, std = torch.from_numpy(_MEAN), torch.from_numpy(_STD)

    def finish(frames: list[Any]) -> Tensor:
        images = spdl.io.to_torch(spdl.io.convert_frames(frames))
        return ((images - mean) / std).permute(0, 3, 1, 2)

    pipeline = (
        PipelineBuilder()
        .add_source(source())
        .pipe(decode, concurrency=task.threads)
        .aggregate(task.batch_size, drop_last=True)
        .pipe(finish)
        .add_sink(_AHEAD)
        .build(num_threads=task.threads + 1)
    )
    with pipeline.auto_stop():
        yield from pipeline


def pool_batches(task: Task) -> Iterator[Tensor]:
    """What a good engineer writes in an hour: threads, fast libraries, no fresh memory."""
    import cv2

    cv2.setNumThreads(1)
    size = task.image_size
    shape = (task.batch_size, size, size, 3)
    free = collections.deque(np.empty(shape, np.float32) for _ in range(_AHEAD + 2))
    per_level, shift = 1 / _STD, -_MEAN / _STD

    def make(out: NDArray[np.float32], index: int, seed: int) -> None:
        draw = random.Random(seed)
        image = decode_whole(dataset.image_bytes(index))
        top, left, height, width = random_crop(draw, *image.shape[:2], task)
        crop = image[top : top + height, left : left + width]
        # the area filter is OpenCV's only one with antialias, and only shrinks
        shrinks = height >= size and width >= size
        square = cv2.resize(
            crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        if draw.random() < task.flip:
            square = square[:, ::-1]
        np.multiply(square, per_level, out=out)
        out += shift

    with PackedDataset(task.data) as dataset, ThreadPoolExecutor(task.threads) as pool:
        order = _endless_order(len(dataset))
        in_work: collections.deque[tuple[NDArray[np.float32], list[Future[None]]]]
        in_work = collections.deque()

        def start() -> None:
            batch = free.popleft()
            samples = [next(order) for _ in range(task.batch_size)]
            in_work.append(
                (batch, [pool.submit(make, batch[i], *s) for i, s in enumerate(samples)])
            )

        for _ in range(_AHEAD):
            start()
        while True:
            batch, futures = in_work.popleft()
            for future in futures:
                future.result()
            start()
            yield torch.from_numpy(batch).permute(0, 3, 1, 2)
            free.append(batch)


def _endless_order(count: int) -> Iterator[tuple[int, int]]:
    """Samples, shuffled anew in each pass, and a seed for each visit."""
    draw = random.Random(1)
    while True:
        for index in draw.sample(range(count), count):
            yield index, draw.getrandbits(32)


def decode_whole(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB by the fastest decoder there is in Python."""
    import simplejpeg

    if bytes(encoded[:2]) == b"\xff\xd8":
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded)
        return decoded
    import cv2

    return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[:, :, ::-1])


def random_crop(
    draw: random.Random, height: int, width: int, task: Task
) -> tuple[int, int, int, int]:
    """Top, left, height and width by the law of torchvision's RandomResizedCrop."""
    low, high = math.log(task.ratio[0]), math.log(task.ratio[1])
    for _ in range(10):
        area = height * width * draw.uniform(*task.scale)
        aspect = math.exp(draw.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    w = min(width, round(height * task.ratio[1]))
    h = min(height, round(width / task.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w
