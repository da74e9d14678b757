"""Packs a few samples without a program, for tests of what reads them."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from PIL import Image

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.images.check import check_image
from unicl_fast.images.limits import ImageFormat
from unicl_fast.text.class_lists import SIMPLE_TEMPLATES
from unicl_fast.text.hierarchies import Hierarchy
from unicl_fast.text.tokenizer import Tokenizer

TEMPLATES = (*SIMPLE_TEMPLATES, "a drawing of a {}.", "the {}.")

FACTS: dict[str, Any] = {
    "tokenizer": "clip-bpe",
    "vocabulary_hash": "0123",
    "context_length": 77,
    "class_names": ["cat", "dog"],
    "templates": ["a photo of a {}"],
    "source": ["here"],
    "seed": 3,
    "tool_version": "0.1.0",
}
"""What a writer is given at the end."""


def saved(image: Image.Image, **options: Any) -> bytes:
    """The file that Pillow makes of an image."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def sample_of(image: bytes, number: int, **changes: Any) -> PackedSample:
    """A sample with captions, labels or both, whose image need be none."""
    fields: dict[str, Any] = {
        "extension": "jpg",
        "height": 16,
        "width": 20 + number,
        "xxh3": xxhash.xxh3_64_intdigest(image),
        "captions": [f"caption {which} of {number}" for which in range(number % 3)],
        "tokens": [
            np.array([49406, number, which, 49407], np.uint16) for which in range(number % 3)
        ],
        "labels": [number % 2] if number % 3 != 1 else [],
        "source": "photos",
        "name": f"{number}.jpg",
    }
    return PackedSample(image=image, **(fields | changes))


def write_set(
    out: Path,
    samples: Iterable[PackedSample],
    *,
    shard_bytes: int = 10**9,
    images: Literal["encoded", "raw"] = "encoded",
    **facts: Any,
) -> Manifest:
    """Writes samples as they are, and a row of what was left out."""
    with DatasetWriter(out, shard_bytes=shard_bytes, images=images) as writer:
        for one in samples:
            writer.add(one)
        writer.quarantine(source="photos", name="x\udcff.jpg", kind="damaged", message="a, b")
        return writer.finish(**(FACTS | facts))


def write_raw_set(out: Path, images: np.ndarray) -> Path:
    """Images [n h w 3] as they are, in several shards; returns `out`."""
    size = {"extension": "raw", "height": images.shape[1], "width": images.shape[2]}
    samples = [sample_of(one.tobytes(), number, **size) for number, one in enumerate(images)]
    write_set(out, samples, shard_bytes=4000, images="raw")
    return out


def read_pixels(
    dataset: PackedDataset, indices: Sequence[int], out: np.ndarray, places: Sequence[int]
) -> np.ndarray:
    """Reads raw images to some places in `out` [b h w 3]; which of them are as packed [k]."""
    which, size = np.array(indices, np.int64), out[0].size
    sizes = dataset.image_sizes(which, headers=False)
    starts = size * np.array(places, np.int64)
    return dataset.read_images(which, out.reshape(-1), starts, sizes, headers=False)


@dataclass(frozen=True)
class Sample:
    """An image's file contents and its texts."""

    image: bytes
    captions: Sequence[str] = ()
    labels: Sequence[int] = ()


def pack(
    out: Path,
    samples: Sequence[Sample],
    *,
    class_names: Sequence[str],
    tokenizer: Tokenizer,
    hierarchy: Hierarchy | None = None,
    format: ImageFormat = "keep",
) -> PackedDataset:
    images: Any = "raw" if format == "raw" else "encoded"
    with DatasetWriter(out, shard_bytes=1_000_000, images=images) as writer:
        for sample in samples:
            image = check_image(sample.image, format=format)
            writer.add(
                PackedSample(
                    image=image.data,
                    extension=image.extension,
                    height=image.height,
                    width=image.width,
                    xxh3=xxhash.xxh3_64_intdigest(image.data),
                    captions=sample.captions,
                    tokens=tokenizer.encode(list(sample.captions)),
                    labels=sample.labels,
                )
            )
        writer.finish(
            tokenizer=tokenizer.name,
            vocabulary_hash=tokenizer.vocabulary_hash,
            context_length=tokenizer.context_length,
            class_names=class_names,
            templates=TEMPLATES if class_names else (),
            source=["tests"],
            seed=0,
            tool_version="0",
            hierarchy=hierarchy,
        )
    return PackedDataset(out)
