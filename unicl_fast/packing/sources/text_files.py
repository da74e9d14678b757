"""A folder of images with texts beside them: x.txt has the caption of x.jpg."""

import os

from unicl_fast.packing.sources.entries import EntryError, Found, Problem
from unicl_fast.packing.sources.image_folders import is_image
from unicl_fast.packing.sources.items import Item, item_of, require_text
from unicl_fast.packing.sources.rows import MAX_CAPTION_BYTES, ListOptions
from unicl_fast.packing.sources.source_kind import Place, SourceKind
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree


def _recognises(place: Place) -> bool:
    """Whether a folder without subfolders has an image x.jpg with an x.txt."""
    texts = {os.path.splitext(name)[0] for name in place.files if name.endswith(".txt")}
    return place.folders == place.aside and any(
        is_image(name) and os.path.splitext(name)[0] in texts for name in place.files
    )


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    items, passed_over = spool.new_items(), place.count_aside()
    entries = {each: entry for each, entry in open_tree(place.path).entries() if "/" not in each}
    texts = {os.path.splitext(each)[0]: each for each in entries if each.endswith(".txt")}
    used = set()
    for each, entry in entries.items():
        stem, suffix = os.path.splitext(each)
        if is_image(each):
            used.add(stem)
            items.append(_with_caption(each, entry, entries.get(texts.get(stem, ""))))
        elif suffix != ".txt":
            passed_over["hidden files" if each.startswith(".") else f"{suffix.lower()} files"] += 1
    if unused := len(texts.keys() - used):
        passed_over[".txt files without an image"] += unused
    return Source(name=place.name, items=items, labels_are_names=False, passed_over=passed_over)


def _with_caption(name: str, image: Found, text: Found | None) -> Item:
    item = item_of(name, image)
    try:
        if isinstance(text, Problem):
            raise EntryError(text.kind, text.message)
        caption = text.read(max_bytes=MAX_CAPTION_BYTES).decode("utf-8-sig").strip() if text else ""
        item.captions = [caption] if caption else []
    except (EntryError, UnicodeDecodeError) as error:
        item.problem = Problem("bad row", f"its .txt: {error}")
    require_text(item)
    return item


KIND = SourceKind(recognises=_recognises, read=_read)
