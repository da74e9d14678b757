"""COCO's JSON files: captions, instances, or both; one image's annotations are one sample."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from unicl_fast.packing.sources.entries import Entry, Problem
from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.json_pieces import iter_elements, object_head
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.named_images import NamedImages
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import Columns, add_texts
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree

_COLUMNS = Columns((), ("caption",), ("category",))

Id = int | str
_Items = dict[Entry | str, Item]


def _read_together(places: Sequence[Place], options: ListOptions, spool: Spool) -> Source:
    """Reads COCO's captions and instances files as one source (docs/sources.md)."""
    name = "+".join(place.name for place in places)
    options.refuse_filters(name)
    items: _Items = {}
    broken: list[Item] = []
    source = Source(name=name, items=spool.new_items(), labels_are_names=True)
    open_once = functools.cache(open_tree)  # a zip can have a long directory
    for path in (place.path for place in places):
        found = _read_file(path)
        tree = open_once(Path(options.image_root) if options.image_root else _image_folder(path))
        named = NamedImages(path, tree)
        for number, file_name in found.images:
            _add_image(number, file_name, found, named, items, broken)
        named.finish(source)
        if unlisted := sum(texts.count for texts in found.texts.values() if not texts.listed):
            source.passed_over["annotations of images that are not listed"] += unlisted
        if found.num_unreadable:
            source.passed_over["annotations that cannot be read"] += found.num_unreadable
    source.items.extend([*items.values(), *broken])
    return source


@dataclass(slots=True)
class _Texts:
    """The annotations of one image in one file."""

    captions: list[Any] = field(default_factory=list)
    categories: dict[Id, None] = field(default_factory=dict)
    count: int = 0
    listed: bool = False
    """Whether the file has listed the image, which it must do only once."""


@dataclass(slots=True)
class _File:
    """The parts used of one JSON file."""

    images: list[tuple[Any, Any]] = field(default_factory=list)
    """(id, file_name), unchecked."""
    categories: dict[Id, str] = field(default_factory=dict)
    texts: dict[Id, _Texts] = field(default_factory=dict)
    num_unreadable: int = 0


def _read_file(path: Path) -> _File:
    found = _File()
    kinds = set()
    for kind, element in iter_elements(path):
        if kind not in ("images", "annotations", "categories"):
            continue
        kinds.add(kind)
        fields = element if isinstance(element, dict) else {}
        if kind == "images":
            found.images.append((fields.get("id"), fields.get("file_name")))
        elif kind == "annotations" or not isinstance(element, dict):
            _note(fields, found)
        elif _is_id(fields.get("id")) and isinstance(fields.get("name"), str):
            found.categories[fields["id"]] = fields["name"]
    if not {"images", "annotations"} <= kinds:
        raise ValueError(
            f"{path} is no COCO file of captions or instances, which has `images` and "
            f"`annotations`; of these it has: {', '.join(sorted(kinds)) or 'none'}. Other lists "
            "are JSONL files, or one array of objects with `image` and `caption` or `label`"
        )
    return found


def _note(annotation: dict[str, Any], found: _File) -> None:
    image, category = annotation.get("image_id"), annotation.get("category_id")
    has_caption = "caption" in annotation
    if not _is_id(image) or not (has_caption or _is_id(category)):
        found.num_unreadable += 1
        return
    texts = found.texts.setdefault(image, _Texts())
    texts.count += 1
    if has_caption:
        texts.captions.append(annotation["caption"])
    if _is_id(category):
        texts.categories[category] = None


def _is_id(value: Any) -> TypeGuard[Id]:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _add_image(
    number: Any, name: Any, found: _File, named: NamedImages, items: _Items, broken: list[Item]
) -> None:
    """Makes an image's item, or adds to the item that another file has made."""
    if not _is_id(number) or not isinstance(name, str) or not name:
        message = "an entry of `images` without a usable `id` and `file_name`"
        broken.append(refused(f"image {number!s:.40}", "bad row", message))
        return
    where = f"image id {number}"
    item = named.find(name)
    item = items.setdefault(item.entry or name, item)
    texts = found.texts.setdefault(number, _Texts())
    if texts.listed:
        item.problem = Problem("ambiguous", f"{where} is listed twice")
        return
    texts.listed = True
    unknown = [category for category in texts.categories if category not in found.categories]
    if unknown:
        message = f"{where}: category {unknown[0]} is not among the file's categories"
        item.problem = Problem("bad row", message)
        return
    labels = [found.categories[category] for category in texts.categories]
    add_texts(item, {"caption": texts.captions, "category": labels}, _COLUMNS, where)


def _image_folder(path: Path) -> Path:
    """For annotations/captions_val2017.json: val2017, else images, here or above; else here."""
    part = path.stem.rpartition("_")[2]
    for name in dict.fromkeys((part, "images")):
        for folder in (path.parent, path.parent.parent):
            if (folder / name).is_dir():
                return folder / name
            if (folder / f"{name}.zip").is_file():
                return folder / f"{name}.zip" / name
    return path.parent


KIND = SourceKind(
    recognises=lambda place: place.is_file and bool(object_head(place.path)),
    read=lambda place, options, spool: _read_together([place], options, spool),
    read_together=_read_together,
)
