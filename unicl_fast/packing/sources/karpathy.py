"""Karpathy's splits: dataset_coco.json, dataset_flickr8k.json and dataset_flickr30k.json.

Karpathy and Fei-Fei, CVPR 2015. They name the images and the five captions of each on which papers
report retrieval: 1,000 or 5,000 test images.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from unicl_fast.packing.sources.items import Item, Source, refused, require_text
from unicl_fast.packing.sources.json_pieces import iter_elements
from unicl_fast.packing.sources.rows import LEFT_OUT, Columns, ListOptions, add_texts, meets
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.trees import Tree, find_image, open_tree

_COLUMNS = Columns("", ("raw",), ())
_SNIFFED = 1 << 16


def is_karpathy(path: Path) -> bool:
    """Whether a .json is such a file: its images have `sentences`."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.read(_SNIFFED)
    return start.lstrip()[:1] == "{" and '"sentences"' in start and '"split"' in start


def read_karpathy(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads the images of a split with their captions as they were written.

    `--where split=test` chooses; `split=train` also takes COCO's `restval`, as papers do. Without
    `image_root` the images are looked for next to the file. They lie in it under their `filepath`
    (COCO's val2014), or directly.

    Raises:
        ValueError: not such a file, a condition that it cannot meet, or no image that meets it.
    """
    if options.scores():
        raise ValueError(f"{path} has no scores, which --min-score asks for: leave it out")
    conditions = options.conditions()
    tree = open_tree(Path(options.image_root) if options.image_root else path.parent)
    items = spool.new_items()
    splits: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    for kind, image in iter_elements(path):
        if kind != "images":
            continue
        fields = image if isinstance(image, dict) else {}
        splits[str(fields.get("split"))] += 1
        row = {**fields, "split": _splits_of(fields)}
        if not meets(row, conditions):
            passed_over[LEFT_OUT] += 1
            continue
        items.append(_item_of(fields, tree, number=splits.total()))
    if not items:
        known = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common(8))
        asked = ", ".join(options.where)
        raise ValueError(f"{path} has no image with {asked}; its splits are {known or 'none'}")
    return Source(name=path.name, items=items, labels_are_names=True, passed_over=passed_over)


def _splits_of(fields: dict[str, Any]) -> list[Any]:
    split = fields.get("split")
    return [split, "train"] if split == "restval" else [split]


def _item_of(fields: dict[str, Any], tree: Tree, *, number: int) -> Item:
    name, folder = fields.get("filename"), fields.get("filepath", "")
    where = f"image {number}"
    if not isinstance(name, str) or not name or not isinstance(folder, str):
        return refused(where, "bad row", f"{where}: `filename` must be a text, not {name!r:.80}")
    item = find_image(tree, f"{folder}/{name}" if folder else name)
    if item.entry is None and folder:
        beside = find_image(tree, name)
        item = beside if beside.entry is not None else item
    sentences = fields.get("sentences")
    sentences = sentences if isinstance(sentences, list) else []
    raw = [one.get("raw") if isinstance(one, dict) else None for one in sentences]
    add_texts(item, {"raw": raw}, _COLUMNS, where)
    require_text(item)
    return item
