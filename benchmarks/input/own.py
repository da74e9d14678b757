"""Our own loader for `unicl-bench input`, its stages, and what limits them.

contenders.py says what each is. Whole loaders yield normalised float32 [b c h w]; stages and limits
take their input from memory and yield numbers of images. Those that run at the same time in the
loader use `threads` threads, those that its feeding thread runs one after another use one.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from unicl_fast.augmentation import AUGMENTATIONS
from unicl_fast.config import CLIP_MEAN, CLIP_STD, DataConfig, RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.models.precision import normalise_images
from unicl_fast.objectives.targets import map_steps
from unicl_fast.pipelines.feed.host_batches import steps_at_once
from unicl_fast.pipelines.feed.reading import BadSamples
from unicl_fast.pipelines.feed.text_block import gather_texts, pack_integers
from unicl_fast.pipelines.graph import batches_ahead, decode_windows
from unicl_fast.pipelines.kernels.augment import augment_image
from unicl_fast.pipelines.kernels.jpeg_windows import cut_to_windows
from unicl_fast.pipelines.kernels.resample import resample_region
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.pipelines.plan.augment import draw_rows, num_stages
from unicl_fast.pipelines.plan.plan import PlannedBatch, split_steps, split_windows
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.text.prompts import ClassPrompts
from unicl_fast.text.tokenizer import Tokenizer

from .contenders import ContenderError, Task

_HELD = 1024
"""Images that are held in memory for a stage."""


def config_of(task: Task, **data: Any) -> TrainConfig:
    """The loader's config; `data` are more fields of its DataConfig."""
    size: dict[str, Any] = {"image_size": task.image_size, "evaluation_resize": task.image_size}
    return TrainConfig(
        data=DataConfig(threads=task.threads, **size, **data),
        run=RunConfig(global_batch_size=task.batch_size),
    )


def prompts_of(dataset: PackedDataset) -> ClassPrompts:
    """The prompts of a single data set, of its own class names and templates."""
    manifest = dataset.manifest
    return ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())


def open_loader(dataset: PackedDataset, config: TrainConfig) -> TrainLoader:
    """The training loader of a single data set."""
    return TrainLoader(config, [dataset], None, prompts_of(dataset))


class _Own:
    """The training loader, and the parts it is made of."""

    def __init__(self, task: Task) -> None:
        keep_freed_memory()  # as our programs do
        self.task = task
        self.config = config_of(
            task,
            crop_scale=task.scale,
            crop_ratio=task.ratio,
            flip_probability=task.flip,
            resample=task.resample,
            augment=task.augment,
        )
        self.dataset = PackedDataset(task.data)
        self.prompts = prompts_of(self.dataset)
        self.loader = TrainLoader(self.config, [self.dataset], None, self.prompts)
        self.bad = BadSamples(
            [self.dataset], self.loader.plan, None, max_pixels=self.config.data.max_pixels
        )

    def planned(self) -> list[PlannedBatch]:
        """Batches that hold at least `_HELD` images together."""
        steps = range(math.ceil(_HELD / self.task.batch_size))
        return [self.loader.plan.batch(step, rank=0, world_size=1) for step in steps]

    def read(self, planned: PlannedBatch) -> tuple[PlannedBatch, list[NDArray[np.uint8]]]:
        return self.bad.read_files(planned)

    def held(self) -> list[tuple[PlannedBatch, list[NDArray[np.uint8]]]]:
        """`planned` with the encoded images."""
        return [self.read(planned) for planned in self.planned()]


def ours(task: Task) -> Iterator[Tensor]:
    for batch in _Own(task).loader.batches(0):
        yield normalise_images(batch.images, mean=CLIP_MEAN, std=CLIP_STD)
        del batch  # held here, its buffer could not be used for the next one


def loader(task: Task) -> Iterator[int]:
    for batch in _Own(task).loader.batches(0):
        yield len(batch.images)
        del batch


def plan(task: Task) -> Iterator[int]:
    own = _Own(task)
    count = steps_at_once(task.batch_size)
    for first in itertools.count(0, count):
        long = own.loader.plan.long_batch(first, count, rank=0, world_size=1)
        for batch in split_steps(long, count, global_batch_size=task.batch_size):
            yield len(batch.global_index)


def texts(task: Task) -> Iterator[int]:
    own = _Own(task)
    length = own.config.model.context_length
    count = steps_at_once(task.batch_size)
    long = own.loader.plan.long_batch(0, count, rank=0, world_size=1)
    global_index = np.arange(task.batch_size)
    while True:
        rows, classes = gather_texts(long, [own.dataset], own.prompts, context_length=length)
        targets = map_steps(rows, classes, own.prompts, size=task.batch_size)
        yield len(pack_integers(targets, global_index, context_length=length))


def read(task: Task) -> Iterator[int]:
    own = _Own(task)
    for planned in itertools.cycle(own.planned()):
        yield len(own.read(planned)[1])


def decode(task: Task, *, cut: bool = False) -> Iterator[int]:
    """The decoder of graph.py alone, on whole files, or cut to windows as the loader does it."""
    own = _Own(task)
    held = []
    for planned, encoded in own.held():
        starts, shapes, _ = split_windows(planned.windows[:, 0])
        cut_files = cut_to_windows(encoded, starts, shapes) if cut else (encoded, starts)
        held.append((*cut_files, shapes))
    batches = itertools.cycle(held)
    pipeline = Pipeline(
        batch_size=task.batch_size,
        num_threads=task.threads,
        device_id=None,
        prefetch_queue_depth=batches_ahead(own.config.data, task.batch_size),
    )
    with pipeline:
        encoded, starts, shapes = fn.external_source(
            lambda: next(batches),
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1, 1, 1],
        )
        where: Any = {"data": own.config.data, "device": torch.device("cpu")}
        pipeline.set_outputs(decode_windows(encoded, starts, shapes, form="files", **where))
    while True:
        (images,) = pipeline.run()
        yield len(images)
        del images


decode_cut = functools.partial(decode, cut=True)


def turbojpeg(task: Task) -> Iterator[int]:
    from .peers import decode_whole

    images = [(image,) for _, encoded in _Own(task).held() for image in encoded]
    if any(bytes(image[:2]) != b"\xff\xd8" for (image,) in images):
        raise ContenderError("the images are not JPEGs")
    yield from _in_threads(task, decode_whole, images)


def resample(task: Task) -> Iterator[int]:
    from .peers import decode_whole

    crops = []
    for fed, encoded in _Own(task).held():
        starts, shapes, flips = split_windows(fed.windows[:, 0])
        corners = zip(starts.tolist(), shapes.tolist(), flips, strict=True)
        for image, ((top, left), (height, width), flip) in zip(encoded, corners, strict=True):
            whole = decode_whole(image)
            crop = whole[top : top + height, left : left + width].copy()
            crops.append((crop, bool(flip)))
    size = task.image_size

    def work(crop: NDArray[np.uint8], flip: bool) -> None:
        square = np.empty((size, size, 3), np.uint8)
        height, width = map(float, crop.shape[:2])
        resample_region(square, crop, 0.0, height, 0.0, width, flip, False)

    yield from _in_threads(task, work, crops)


def augment(task: Task) -> Iterator[int]:
    """The augmentation of the preset `unicl` on squares, in threads as DALI runs it."""
    chosen = AUGMENTATIONS["unicl"]
    size, stages = task.image_size, num_stages([chosen])
    rows = draw_rows(chosen, np.arange(_HELD), key=0, image_size=size, stages=stages)
    # smooth, as images are; histogram and blur cost nearly the same on all images
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    across, down = np.meshgrid(ramp, ramp)
    square = np.stack([down, across, across + down], axis=2)
    fill = (255 * np.array(CLIP_MEAN)).astype(np.uint8)

    def work(row: NDArray[np.float32]) -> None:
        augment_image(square.copy(), row, fill)

    yield from _in_threads(task, work, [(row,) for row in rows])


def normalise(task: Task) -> Iterator[int]:
    keep_freed_memory()
    shape = (task.batch_size, task.image_size, task.image_size, 3)
    batches = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(4)]
    for images in itertools.cycle(batches):
        yield len(normalise_images(images, mean=CLIP_MEAN, std=CLIP_STD))


def write(task: Task) -> Iterator[int]:
    batch = torch.empty(task.batch_size, 3, task.image_size, task.image_size)
    for value in itertools.count():
        yield len(batch.fill_(value % 7))


def _in_threads(task: Task, work: Any, arguments: list[Any]) -> Iterator[int]:
    """Runs `work` over all arguments again and again; each thread takes a piece of a batch."""
    size = max(1, task.batch_size // task.threads)
    pieces = [arguments[i : i + size] for i in range(0, len(arguments), size)]

    def run(piece: list[Any]) -> int:
        for each in piece:
            work(*each)
        return len(piece)

    with ThreadPoolExecutor(task.threads) as pool:
        running: collections.deque[Future[int]] = collections.deque()
        for piece in itertools.cycle(pieces):
            running.append(pool.submit(run, piece))
            if len(running) > 2 * task.threads:
                yield running.popleft().result()
