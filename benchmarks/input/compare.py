"""Whether the contenders of `unicl-bench input` make the same thing; what does not is not timed.

Two questions. **Pixels**: square images, of which every crop law with scale and ratio 1 takes the
whole, are resized by each and compared with what Pillow makes of the same file. **The law of the
crops**: over images with random crops, means and deviations of a contender and of ours may
differ by five standard errors.

Without torch, for the reason in input_worker.py.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample

from .contenders import Task

_SQUARES = 48
_EXTENSIONS = {b"\x89PNG": "png", b"RIFF": "webp"}
_BATCH = 16
_STANDARD_ERRORS = 5
_THUMBNAIL = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """How far a contender's images are from Pillow's, in levels of 255."""

    mean: float
    high: float
    """99 of 100 values are nearer."""


def write_class_folder(dataset: PackedDataset, folder: Path) -> None:
    """The same files, byte for byte, in one folder a class; those without a label in one more."""
    for index in range(len(dataset)):
        labels = dataset.labels_of(index)
        home = folder / (f"{int(labels[0]):06d}" if len(labels) else "unlabelled")
        home.mkdir(exist_ok=True, parents=True)
        data = bytes(dataset.image_bytes(index))
        extension = _EXTENSIONS.get(data[:4], "jpg")
        (home / f"{index}.{extension}").write_bytes(data)


def comparison_task(dataset: PackedDataset, task: Task) -> tuple[Task, np.ndarray]:
    """A task whose answer is known: squares shown whole, unmirrored.

    Writes the squares, cut out of the middle of the data set's first images, into
    `task.scratch`: as JPEGs, or raw as the data set is.

    Returns:
        The task, and Pillow's images: float32 [n h w 3] in levels of 255.
    """
    scratch = task.scratch / "squares"
    scratch.mkdir(parents=True)
    size = (task.image_size, task.image_size)
    is_raw = dataset.image_shape is not None
    truth = []
    with DatasetWriter(scratch / "packed", images="raw" if is_raw else "encoded") as writer:
        for index in range(min(_SQUARES, len(dataset))):
            square = _square(bytes(dataset.image_bytes(index)))
            data = square.tobytes()
            if not is_raw:
                data = _jpeg(square)
                with Image.open(io.BytesIO(data)) as image:
                    square = image.convert("RGB")
            resized = square.resize(size, Image.Resampling.BILINEAR)
            truth.append(np.asarray(resized, dtype=np.float32))
            writer.add(
                PackedSample(
                    image=data,
                    extension="raw" if is_raw else "jpg",
                    height=square.height,
                    width=square.width,
                    xxh3=xxhash.xxh3_64_intdigest(data),
                    labels=[0],
                )
            )
        manifest = dataset.manifest
        writer.finish(
            tokenizer=manifest.tokenizer,
            vocabulary_hash=manifest.vocabulary_hash,
            context_length=manifest.context_length,
            class_names=["square"],
            templates=["a {}."],
            source=["squares"],
            seed=0,
            tool_version=manifest.tool_version,
        )
    with PackedDataset(scratch / "packed") as squares:
        write_class_folder(squares, scratch / "classes")
    return (
        dataclasses.replace(
            task,
            data=scratch / "packed",
            scratch=scratch,
            batch_size=min(_BATCH, len(truth)),
            scale=(1.0, 1.0),
            ratio=(1.0, 1.0),
            flip=0.0,
        ),
        np.stack(truth),
    )


def _square(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as image:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.convert("RGB").crop((left, top, left + side, top + side))


def _jpeg(square: Image.Image) -> bytes:
    buffer = io.BytesIO()
    square.save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def gap_to(truth: np.ndarray, images: np.ndarray) -> Gap:
    """Compares each image with the one of `truth` that it looks most like.

    Raises:
        ValueError: fewer than half of what is to be shown was shown.
    """
    found = [int(np.argmin(_distances(truth, image))) for image in images]
    if len(set(found)) < len(truth) / 2:
        raise ValueError(f"only {len(set(found))} of {len(truth)} images were shown")
    differences = np.stack(
        [np.abs(image - truth[i]) for image, i in zip(images, found, strict=True)]
    )
    return Gap(float(differences.mean()), float(np.quantile(differences, 0.99)))


def _distances(truth: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.asarray(((_thumbnail(truth) - _thumbnail(image[None])) ** 2).sum(axis=(1, 2, 3)))


def _thumbnail(images: np.ndarray) -> np.ndarray:
    """Means over a grid of `_THUMBNAIL` squares a side, what is left over at the end dropped."""
    count, size = len(images), images.shape[1]
    cells = min(_THUMBNAIL, size)
    cell = size // cells
    cut = images[:, : cells * cell, : cells * cell]
    return np.asarray(cut.reshape(count, cells, cell, cells, cell, 3).mean(axis=(2, 4)))


def differs_in_law(moments: np.ndarray, ours: np.ndarray) -> str:
    """Says how means or deviations of images [n 2] differ by more than chance; "" if not."""
    error = np.sqrt(sum(each.var(0) / len(each) for each in (moments, ours)))
    theirs_mean, ours_mean = moments.mean(0), ours.mean(0)
    for i, name in enumerate(("mean", "deviation")):
        if abs(theirs_mean[i] - ours_mean[i]) > _STANDARD_ERRORS * error[i]:
            return (
                f"the images' {name} is {theirs_mean[i]:.2f}, ours is {ours_mean[i]:.2f} "
                f"(standard error {error[i]:.2f})"
            )
    return ""
