"""Packs a few samples without a program, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import DatasetWriter, PackedSample
from unicl_fast.images.check import check_image
from unicl_fast.text.class_lists import SIMPLE_TEMPLATES
from unicl_fast.text.hierarchies import Hierarchy
from unicl_fast.text.tokenizer import Tokenizer

TEMPLATES = (*SIMPLE_TEMPLATES, "a drawing of a {}.", "the {}.")


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
    raw: bool = False,
) -> PackedDataset:
    with DatasetWriter(out, shard_bytes=1_000_000, images="raw" if raw else "encoded") as writer:
        for sample in samples:
            image = check_image(sample.image, format="raw" if raw else "keep")
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
