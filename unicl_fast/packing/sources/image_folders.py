"""Images beside their texts: x.txt has the caption of x.jpg, or a list those of all.

The list is metadata.jsonl or metadata.csv, as in Hugging Face's ImageFolder. As class folders,
`train/1.jpg` with `train/metadata.jsonl` would become an image of the class "train" without its
caption, so class folders refuse such a list.
"""

import dataclasses
import os
import re
from pathlib import Path

from unicl_fast.packing.sources.entries import EntryError, FileEntry, Found, Problem
from unicl_fast.packing.sources.items import Item, item_of, require_text
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.lists import read_list
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import MAX_CAPTION_BYTES
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree
from unicl_fast.system.untrusted_files import open_file

NOT_IMAGES = frozenset(
    f".{extension}"
    for group in (
        "txt csv tsv json jsonl md rst xml html htm yaml yml toml ini cfg log pdf",
        "py sh db pkl npy npz mat h5 idx zip tar gz tgz mp3 wav mp4 avi mov parquet arrow",
    )
    for extension in group.split()
)
"""Extensions skipped in class folders; a file with another extension, or none, is tried."""

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_NAMES_FILES = re.compile(rb"\bfile_name\b")
_HEAD_BYTES = 65_536


def is_metadata(name: str, entry: Found) -> bool:
    """Whether a file is ImageFolder's metadata, by its name and a column `file_name`."""
    if os.path.basename(name) not in METADATA_NAMES or isinstance(entry, Problem):
        return False
    try:
        if isinstance(entry, FileEntry):  # it can be larger than any image
            with open_file(entry.path) as file:
                head = file.read(_HEAD_BYTES)
        else:
            head = entry.read()[:_HEAD_BYTES]
    except (OSError, EntryError):
        return False
    return _NAMES_FILES.search(head) is not None


def _find_metadata(place: Place) -> list[Path]:
    paths = [place.path / name for name in place.files]
    return [path for path in paths if is_metadata(path.name, FileEntry(str(path), 0))]


def _read_list(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads the list of a folder's images, and counts images that it does not name."""
    path, *others = _find_metadata(place)
    if others:
        names = " and ".join(one.name for one in (path, *others))
        raise ValueError(f"{place.path} holds {names}: name one of them")
    source = read_list(path, options, spool)
    find = source.items.find
    missing = sum(
        is_image(each) and find(each) is None and find(f"./{each}") is None
        for each, _ in open_tree(path.parent).entries()
    )
    if missing:
        source.passed_over[f"images that {path.name} does not name"] += missing
    return dataclasses.replace(source, name=place.name)


def is_image(name: str) -> bool:
    """Whether a file is tried as an image: it is not hidden, nor one of `NOT_IMAGES`."""
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and os.path.splitext(name)[1].lower() not in NOT_IMAGES


def _has_texts(place: Place) -> bool:
    """Whether a folder without subfolders has an image x.jpg with an x.txt."""
    texts = {os.path.splitext(name)[0] for name in place.files if name.endswith(".txt")}
    return place.folders == place.aside and any(
        is_image(name) and os.path.splitext(name)[0] in texts for name in place.files
    )


def _read_texts(place: Place, options: ListOptions, spool: Spool) -> Source:
    options.refuse_filters(place.path)
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


KIND = SourceKind(
    recognises=lambda place: bool(_find_metadata(place)) or _has_texts(place),
    read=lambda place, options, spool: (_read_list if _find_metadata(place) else _read_texts)(
        place, options, spool
    ),
)
