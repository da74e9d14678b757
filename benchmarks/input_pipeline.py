"""Pictures per second of the input pipeline on the CPU, beside torchvision's.

    unicl-bench input --data PACKED [--json FILE]

Both cut, resample (antialiased), mirror and normalise the same files into float32 batches of the
same size, with the same number of threads or worker processes; ours lie in channels_last order.
First their batches are compared, then they take turns, so that a change of the machine's mood hits
both; the median of the ratios is what counts. The contender is what most people write:
ImageFolder, PIL transforms, DataLoader. Its workers are left as they are, while this process keeps
freed memory (see pipelines/host_memory.py); --tune-contender gives its workers that advantage too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from unicl_fast.benchmarks.harness import (
    BenchmarkSettings,
    Figures,
    print_figures,
    summarise,
    write_result,
)
from unicl_fast.config import CLIP_MEAN, CLIP_STD, DataConfig, Resample, RunConfig, TrainConfig
from unicl_fast.pipelines.host_memory import keep_freed_memory
from unicl_fast.pipelines.loader import TrainLoader
from unicl_fast.precision import normalise_images
from unicl_fast.prompts import ClassPrompts
from unicl_fast.shards import PackedDataset
from unicl_fast.tokenizer import Tokenizer

# Batches that both have ready when their turn comes; they are taken before the clock starts.
_WARM_UP = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """Pictures a second of the input pipeline on the CPU, beside torchvision."""

    data: Path
    """Packed data set with labels."""
    batch_size: int = 64
    """Pictures of a batch."""
    image_size: int = 224
    """Side of the squares."""
    threads: int = 2
    """Decoding threads here, worker processes there."""
    rounds: int = 7
    """Turns that each takes."""
    batches: int = 20
    """Batches of a turn."""
    resample: Resample = "fused"
    """What resizes here."""
    tune_contender: bool = False
    """Let torchvision's workers keep freed memory too, which nobody does by default."""


def run(settings: Settings) -> None:
    """Compares, measures, prints, and writes the JSON if one is wanted."""
    torch.set_num_threads(1)  # the cores are busy decoding; more threads only wait for each other
    if settings.tune_contender:
        keep_freed_memory()  # workers inherit it
    with PackedDataset(settings.data) as dataset, tempfile.TemporaryDirectory() as folder:
        write_class_folders(dataset, Path(folder))
        with (
            contextlib.closing(our_batches(dataset, settings)) as ours,
            contextlib.closing(torchvision_batches(Path(folder), settings)) as theirs,
        ):
            next(theirs)  # starts the workers
            keep_freed_memory()
            compare(ours, theirs, settings)
            figures = measure(ours, theirs, settings)
    print_figures(figures)
    packages = ("torchvision", "pillow", "numpy", "numba", "nvidia-dali-cuda120")
    write_result(settings, figures, *packages)


def write_class_folders(dataset: PackedDataset, folder: Path) -> None:
    """The same files as a class folder, byte for byte."""
    for index in range(len(dataset)):
        labels = dataset.labels_of(index)
        if not len(labels):
            raise ValueError(f"{dataset.describe(index)} has no label; ImageFolder needs one")
        home = folder / f"{int(labels[0]):06d}"
        home.mkdir(exist_ok=True)
        data = dataset.image_bytes(index)
        extension = "png" if bytes(data[:4]) == b"\x89PNG" else "jpg"
        (home / f"{index}.{extension}").write_bytes(data.tobytes())


def our_batches(dataset: PackedDataset, settings: Settings) -> Generator[Tensor, None, None]:
    """Normalised float32 [b c h w] of the training loader."""
    config = TrainConfig(
        data=DataConfig(
            image_size=settings.image_size,
            evaluation_resize=settings.image_size,
            threads=settings.threads,
            resample=settings.resample,
        ),
        run=RunConfig(global_batch_size=settings.batch_size),
    )
    manifest = dataset.manifest
    prompts = ClassPrompts([(manifest.class_names, manifest.templates)], Tokenizer())
    loader = TrainLoader(config, [dataset], None, prompts)
    try:
        for batch in loader.batches(0):
            yield normalise_images(batch.images, mean=CLIP_MEAN, std=CLIP_STD)
    finally:
        loader.close()


def torchvision_batches(folder: Path, settings: Settings) -> Generator[Tensor, None, None]:
    """The same of ImageFolder and DataLoader, without the stop between passes."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(settings.image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    pictures = ImageFolder(str(folder), transform)
    wanted = (settings.rounds + 2) * (settings.batches + _WARM_UP) * settings.batch_size
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        ConcatDataset([pictures] * (wanted // len(pictures) + 1)),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.threads,
        drop_last=True,
    )
    for images, _ in loader:
        yield images


def compare(ours: Iterator[Tensor], theirs: Iterator[Tensor], settings: Settings) -> None:
    """Refuses to time two pipelines that do not make the same thing.

    Crops are drawn differently, so the means and deviations of pictures are compared, and may
    differ by five standard errors. Equal crops give equal pixels: tests/pipelines/test_graph.py.
    """
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    moments = []
    for batches in (ours, theirs):
        taken = [next(batches) for _ in range(_WARM_UP)]
        for images in taken:
            if tuple(images.shape) != shape or images.dtype != torch.float32:
                raise RuntimeError(f"expected float32 {shape}, got {images.dtype} {images.shape}")
        pixels = torch.cat(taken).flatten(1)
        moments.append(torch.stack([pixels.mean(1), pixels.std(1)]))
    mean, theirs_mean = (moment.mean(1) for moment in moments)
    error = sum(moment.var(1) / moment.shape[1] for moment in moments) ** 0.5
    print(f"mean and deviation {mean.tolist()} and {theirs_mean.tolist()}, error {error.tolist()}")
    if ((mean - theirs_mean).abs() > 5 * error).any():
        raise RuntimeError("the two pipelines make different pictures; nothing was timed")


def measure(ours: Iterator[Tensor], theirs: Iterator[Tensor], settings: Settings) -> Figures:
    """Rates of both in turns, and the ratio of each pair of turns.

    Processor time is taken beside wall time: on a machine that others use too, it is the figure
    that can be trusted.
    """
    turns = [
        (take_turn(theirs, settings), take_turn(ours, settings)) for _ in range(settings.rounds)
    ]
    figures = {
        "unicl_fast, images/s": [ours[0] for _, ours in turns],
        "torchvision, images/s": [theirs[0] for theirs, _ in turns],
        "ratio": [ours[0] / theirs[0] for theirs, ours in turns],
        "unicl_fast, images/processor second": [ours[1] for _, ours in turns],
        "torchvision, images/processor second": [theirs[1] for theirs, _ in turns],
        "ratio by processor time": [ours[1] / theirs[1] for theirs, ours in turns],
    }
    return {name: summarise(values) for name, values in figures.items()}


class _Turns(Protocol):
    """What `take_turn` must know of a stage's settings."""

    @property
    def batches(self) -> int: ...
    @property
    def batch_size(self) -> int: ...


def take_turn(batches: Iterator[Tensor], settings: _Turns) -> tuple[float, float]:
    """Pictures per second of wall time and of processor time."""
    for _ in range(_WARM_UP):
        next(batches)
    start, processor_start = time.perf_counter(), processor_seconds()
    for _ in range(settings.batches):
        next(batches)
    pictures = settings.batches * settings.batch_size
    wall, processor = time.perf_counter() - start, processor_seconds() - processor_start
    return pictures / wall, pictures / processor


def processor_seconds() -> float:
    """Processor time of all threads of this process and of its workers so far."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
