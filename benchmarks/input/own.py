"""Our own loader for `unicl-bench input`, and what limits it.

Whole loaders yield normalised float32 [b c h w]; limits take their input from memory and yield
numbers of images. Decoding uses `threads` threads, reading and writing one, as in the loader.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from unicl_fast.config import CLIP_MEAN, CLIP_STD, DataConfig, RunConfig, TrainConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.images.encoded_images import EncodedImages
from unicl_fast.models.precision import normalise_images
from unicl_fast.pipelines.graph import decode_windows
from unicl_fast.pipelines.kernels.jpeg_windows import cut_to_windows
from unicl_fast.pipelines.plan.plan import PlannedBatch, split_windows
from unicl_fast.pipelines.read.samples import SampleReader
from unicl_fast.pipelines.train_loader import TrainLoader
from unicl_fast.system.machine import keep_freed_memory
from unicl_fast.training.data import build_prompts

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


def open_loader(dataset: PackedDataset, config: TrainConfig) -> TrainLoader:
    """The training loader of a single data set."""
    return TrainLoader(config, [dataset], None, build_prompts([dataset], config))


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
        self.loader = open_loader(self.dataset, self.config)
        self.reader = SampleReader(
            [self.dataset], self.loader.steps.bad, max_pixels=self.config.data.max_pixels
        )

    def planned(self) -> list[PlannedBatch]:
        """Batches that hold at least `_HELD` images together."""
        steps = range(math.ceil(_HELD / self.task.batch_size))
        return [self.loader.plan.batch(step, rank=0, world_size=1) for step in steps]

    def held(self) -> list[tuple[PlannedBatch, EncodedImages]]:
        """`planned` with the encoded images."""
        read = (self.reader.read_files([planned]) for planned in self.planned())
        return [(actual, images) for (actual,), images in read]


def ours(task: Task) -> Iterator[Tensor]:
    for batch in _Own(task).loader.batches(0):
        yield normalise_images(batch.images, mean=CLIP_MEAN, std=CLIP_STD)
        del batch  # held here, its buffer could not be used for the next one


def read(task: Task) -> Iterator[int]:
    own = _Own(task)
    for planned in itertools.cycle(own.planned()):
        yield len(own.reader.read_files([planned])[1])


def decode(task: Task, *, cut: bool = False) -> Iterator[int]:
    """Only the decoder of graph.py, on whole files, or cut to windows as the loader does it."""
    own = _Own(task)
    held = []
    for planned, encoded in own.held():
        starts, shapes, _ = split_windows(planned.windows)
        files = cut_to_windows(encoded, starts, shapes) if cut else (encoded.files(), starts)
        held.append((*files, shapes))
    batches = itertools.cycle(held)
    pipeline = Pipeline(
        batch_size=task.batch_size,
        num_threads=task.threads,
        device_id=None,
        prefetch_queue_depth=own.loader.pace.ahead,
    )
    with pipeline:
        encoded, starts, shapes = fn.external_source(
            lambda: next(batches),
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1, 1, 1],
        )
        cpu = torch.device("cpu")
        pipeline.set_outputs(decode_windows(encoded, starts, shapes, form="files", device=cpu))
    while True:
        (images,) = pipeline.run()
        yield len(images)
        del images


decode_cut = functools.partial(decode, cut=True)


def turbojpeg(task: Task) -> Iterator[int]:
    from .peers import decode_whole

    images = [image for _, encoded in _Own(task).held() for image in encoded.files()]
    if any(bytes(image[:2]) != b"\xff\xd8" for image in images):
        raise ContenderError("the images are not JPEGs")
    size = max(1, task.batch_size // task.threads)
    pieces = [images[start : start + size] for start in range(0, len(images), size)]
    with ThreadPoolExecutor(task.threads) as pool:
        while True:
            for decoded in pool.map(lambda piece: list(map(decode_whole, piece)), pieces):
                yield len(decoded)


def write(task: Task) -> Iterator[int]:
    batch = torch.empty(task.batch_size, 3, task.image_size, task.image_size)
    for value in itertools.count():
        yield len(batch.fill_(value % 7))
