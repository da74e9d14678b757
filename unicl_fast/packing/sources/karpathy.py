"""Karpathy and Fei-Fei's splits (CVPR 2015): dataset_coco.json, dataset_flickr8k.json, ..."""

from collections import Counter
from pathlib import Path

from unicl_fast.packing.sources.cells import Cells
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.json_pieces import iter_elements, object_head
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.lists import Rows, collect_rows
from unicl_fast.packing.sources.named_images import NamedImages
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import Columns
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree


def _recognises(place: Place) -> bool:
    head = object_head(place.path) if place.is_file else ""
    return '"sentences"' in head and '"split"' in head


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads the images of a split (docs/sources.md) with their raw captions.

    They lie under their folder or directly. Raises ValueError if no image meets the conditions.
    """
    path, splits = place.path, Counter[str]()
    named = NamedImages(path, open_tree(Path(options.image_root or path.parent)))
    cells = Cells(columns=Columns(("image",), ("raw",), ()))
    try:
        source = collect_rows(
            path, _rows(path, splits), cells, options,
            lambda name: named.find(name, name.rpartition("/")[2]), spool,
        )  # fmt: skip
    except ValueError as error:
        known = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common(8))
        raise ValueError(f"{error}; its splits are {known or 'none'}") from error
    named.finish(source)
    return source


def _rows(path: Path, splits: Counter[str]) -> Rows:
    """Yields the images as rows; an image of `restval` is one of `train` too, as in papers."""
    images = (element for kind, element in iter_elements(path) if kind == "images")
    for number, fields in enumerate(images, start=1):
        if not isinstance(fields, dict):
            yield number, Problem("bad row", "not a JSON object")
            continue
        name, split = fields.get("filename"), fields.get("split")
        splits[str(split)] += 1
        if isinstance(name, str) and name and fields.get("filepath"):
            name = f"{fields['filepath']}/{name}"
        sentences = fields.get("sentences")
        sentences = sentences if isinstance(sentences, list) else []
        raw = [one.get("raw") if isinstance(one, dict) else None for one in sentences]
        splits_of = [split, "train"] if split == "restval" else [split]
        yield number, {"image": name, "raw": raw, "split": splits_of}


KIND = SourceKind(recognises=_recognises, read=_read)
