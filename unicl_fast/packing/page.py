"""An inspection as one HTML page: fills page.html with numbers, plots and images."""

import base64
import contextlib
import io
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from unicl_fast.dataset.manifest import describe_columns
from unicl_fast.dataset.reader import PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import SampleReader
from unicl_fast.packing.inspect import Inspection, Spread
from unicl_fast.system.pages import fill_page
from unicl_fast.system.wording import count_of

_SHEET, _GROUPS_SHOWN, _IMAGES_OF_A_GROUP = 48, 12, 6
_SIDE = 200
_QUALITY = 80
_MOST_CLASSES = 40
_ENDS_OF_CLASSES = 15  # largest and smallest classes shown if there are more than `_MOST_CLASSES`

ShownImage = dict[str, Any]
"""A sample to show; `page.html` names the fields. Its texts are untrusted."""


def _shown_images(dataset: PackedDataset, indices: Iterable[int]) -> list[ShownImage]:
    """Reads samples for the page."""
    shown: list[ShownImage] = []
    with contextlib.closing(SampleReader(dataset)) as reader:
        for index in indices:
            row, text = dataset.samples[index], reader.read_description(index)
            height, width = int(row["height"]), int(row["width"])
            names = dataset.manifest.class_names
            shown.append(
                {
                    "key": sample_key(index),
                    "uri": _thumbnail(dataset.image_bytes(index, verify=True).data),
                    "height": height,
                    "width": width,
                    "is_tiny": max(height, width) <= 100,  # shown with sharp pixels
                    "class_names": [names[label] for label in dataset.labels_of(index)],
                    "captions": text.captions,
                    "source": text.source,
                    "name": text.name,
                }
            )
    return shown


def _thumbnail(data: memoryview) -> str:
    """The image scaled down, as a data URI; small ones stay lossless."""
    with Image.open(io.BytesIO(data)) as image:
        small = max(image.size) <= _SIDE // 2
        image.draft(None, (_SIDE, _SIDE))
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        kind = "png" if small else "jpeg"
        image.save(file, format=kind, quality=_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def make_page(inspection: Inspection, folder: Path) -> str:
    """The page of the data set in `folder` as text; raises ValueError for a damaged sample.

    It has a contact sheet, and groups of exact and near copies with their first few images.
    """
    with PackedDataset(folder, verify=False) as dataset:  # just verified
        sheet = _shown_images(dataset, range(min(_SHEET, len(dataset))))
        exact, near = (
            [
                {
                    "group": group,
                    "images": _shown_images(dataset, group.samples[:_IMAGES_OF_A_GROUP]),
                }
                for group in (copies.groups[:_GROUPS_SHOWN] if copies else ())
            ]
            for copies in (inspection.exact_copies, inspection.near_copies)
        )
    near_copies = inspection.near_copies
    manifest = inspection.manifest
    tiles = [
        (manifest.num_samples, "images"),
        (manifest.num_captions, "captions"),
        (manifest.num_labels, f"labels of {count_of(len(inspection.class_counts), 'class')}"),
        *([(both, "with labels and captions")] if (both := inspection.num_with_both) else ()),
        (inspection.exact_copies.num_surplus, "exact copies"),
        *([(near_copies.num_surplus, "look like another")] if near_copies is not None else ()),
        (manifest.num_quarantined, "left out when packed"),
    ]
    return fill_page(
        Path(__file__).with_name("page.html"),
        data=inspection,
        manifest=manifest,
        name=Path(inspection.folder).resolve().name,  # works for a URL too
        tiles=tiles,
        sheet=sheet,
        classes=_classes(inspection) if inspection.class_counts else None,
        plots=[_histogram(name, spread) for name, spread in inspection.spreads.items()],
        exact=exact,
        near=near,
    )


def _number(value: float) -> str:
    """A number in words: at most two decimals, two digits below 0.1."""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.2f}"


def _classes(inspection: Inspection) -> dict[str, Any]:
    """The sizes of all classes for bars, or of the largest and smallest of many."""
    ordered = sorted(inspection.class_counts, key=lambda entry: (-entry[1], entry[0]))
    present = [entry for entry in ordered if entry[1]]
    largest, smallest = ordered[0][1], ordered[-1][1]
    several = {count: number for count, number in inspection.labels_per_image.items() if count > 1}
    is_long = len(ordered) > _MOST_CLASSES
    return {
        "largest": max(1, largest),
        "range": f"{smallest:,} to {count_of(largest, 'image')}"
        if smallest < largest
        else count_of(largest, "image"),
        "columns": describe_columns(inspection.manifest.label_columns),
        "num_empty": len(ordered) - len(present),
        "several": f"{sum(several.values()):,} images have several labels, up to {max(several):,}"
        if several
        else "",
        "first": present[:_ENDS_OF_CLASSES] if is_long else ordered,
        "last": present[-_ENDS_OF_CLASSES:] if is_long else [],
    }


def _histogram(name: str, spread: Spread) -> dict[str, Any]:
    """A histogram's title and columns: how many images or captions lie in each bin."""
    of = "caption" if name == "caption tokens" else "image"
    title = name.capitalize()
    if spread.smallest == spread.largest:
        return {"title": title, "words": f"all {_number(spread.smallest)}", "columns": []}
    first, second, *_, before_last, last = (*spread.edges[:2], *spread.edges)
    if last - before_last > second - first + 1e-6:
        end = f"{_number(before_last)} and more"
    else:
        end = _number(last - 1 if second - first == 1 else last)
    return {
        "title": title,
        "words": f"{_number(spread.smallest)} to {_number(spread.largest)}, median "
        f"{_number(spread.median)}, 95 % up to {_number(spread.percentile_95)}",
        "top": count_of(max(spread.counts), of),
        "ends": (_number(first), end),
        "columns": [
            (count, f"{_number(low)} to {_number(high)}: {count:,}")
            for (low, high), count in zip(pairwise(spread.edges), spread.counts, strict=True)
        ],
    }
