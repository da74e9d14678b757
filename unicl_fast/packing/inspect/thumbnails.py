"""Small images of samples with their texts, for pages that people look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from unicl_fast.dataset.reader import PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import SampleReader

_SIDE = 200
_QUALITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownImage:
    """A sample to look at. Its texts come from anywhere and are not escaped."""

    index: int
    key: str
    uri: str
    """The image as a JPEG or PNG inside a `data:` address."""
    height: int
    width: int
    """In pixels, of the sample; the image here is at most 200 on a side."""
    class_names: tuple[str, ...]
    captions: tuple[str, ...]
    source: str
    name: str


def shown_images(dataset: PackedDataset, indices: Iterable[int]) -> list[ShownImage]:
    """Reads samples for a page.

    Raises:
        ValueError: one is damaged.
    """
    reader = SampleReader(dataset)
    shown = []
    try:
        for index in indices:
            row, text = dataset.samples[index], reader.read_description(index)
            names = dataset.manifest.class_names
            shown.append(
                ShownImage(
                    index=index,
                    key=sample_key(index),
                    uri=_thumbnail(dataset.image_bytes(index, verify=True).data),
                    height=int(row["height"]),
                    width=int(row["width"]),
                    class_names=tuple(names[label] for label in dataset.labels_of(index)),
                    captions=text.captions,
                    source=text.source,
                    name=text.name,
                )
            )
    finally:
        reader.close()
    return shown


def _thumbnail(data: memoryview) -> str:
    """The image scaled down; small ones keep their pixels, and stay free of JPEG's traces."""
    with Image.open(io.BytesIO(data)) as image:
        small = max(image.size) <= _SIDE // 2
        image.draft(None, (_SIDE, _SIDE))
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        kind = "png" if small else "jpeg"
        image.save(file, format=kind, quality=_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
