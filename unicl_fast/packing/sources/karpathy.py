"""Karpathy and Fei-Fei's splits (CVPR 2015): dataset_coco.json, dataset_flickr8k.json, ..."""

from collections import Counter
from pathlib import Path
from typing import Any

from unicl_fast.packing.sources.items import Item, refused, require_text
from unicl_fast.packing.sources.json_pieces import iter_elements, object_head
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.named_images import NamedImages
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import LEFT_OUT, Columns, add_texts, meets
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree

_COLUMNS = Columns((), ("raw",), ())


def _recognises(place: Place) -> bool:
    head = object_head(place.path) if place.is_file else ""
    return '"sentences"' in head and '"split"' in head


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads the images of a split (docs/sources.md) with their raw captions.

    Raises ValueError if it is another kind of file, or no image meets the conditions.
    """
    path = place.path
    if options.scores():
        raise ValueError(f"{path} has no scores: leave --min-score out")
    conditions = options.conditions()
    named = NamedImages(path, open_tree(Path(options.image_root or path.parent)))
    source = Source(name=path.name, items=spool.new_items(), labels_are_names=True)
    splits: Counter[str] = Counter()
    for kind, image in iter_elements(path):
        if kind != "images":
            continue
        fields = image if isinstance(image, dict) else {}
        split = fields.get("split")
        splits[str(split)] += 1
        also = ["train"] if split == "restval" else []
        if not meets(fields | {"split": [split, *also]}, conditions):
            source.passed_over[LEFT_OUT] += 1
            continue
        source.items.append(_item_of(fields, named, number=splits.total()))
    if not source.items:
        known = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common(8))
        asked = ", ".join(options.where)
        raise ValueError(f"{path} has no image with {asked}; its splits are {known or 'none'}")
    named.finish(source)
    return source


def _item_of(fields: dict[str, Any], named: NamedImages, *, number: int) -> Item:
    name, folder = fields.get("filename"), fields.get("filepath", "")
    where = f"image {number}"
    if not isinstance(name, str) or not name or not isinstance(folder, str):
        return refused(where, "bad row", f"{where}: `filename` must be a text, not {name!r:.80}")
    item = named.find(*([f"{folder}/{name}"] if folder else []), name)
    sentences = fields.get("sentences")
    sentences = sentences if isinstance(sentences, list) else []
    raw = [one.get("raw") if isinstance(one, dict) else None for one in sentences]
    add_texts(item, {"raw": raw}, _COLUMNS, where)
    require_text(item)
    return item


KIND = SourceKind(recognises=_recognises, read=_read)
