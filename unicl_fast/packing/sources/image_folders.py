"""Folders of images next to their texts: Hugging Face's ImageFolder, and x.jpg with x.txt.

Read as class folders, `train/1.jpg` with `train/metadata.jsonl` would become an image of the class
"train" without its caption; so what is such a folder, and what is a split, is decided here.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from unicl_fast.packing.sources.entries import (
    Entry,
    EntryError,
    FileEntry,
    RefusedEntry,
)
from unicl_fast.packing.sources.items import Item, Problem, require_text
from unicl_fast.packing.sources.lists import read_list
from unicl_fast.packing.sources.rows import MAX_CAPTION_BYTES, ListOptions
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
"""Extensions passed over in class folders; a file with any other, or none, is tried."""

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
_NAMES_FILES = re.compile(rb"\bfile_name\b")
_HEAD_BYTES = 65_536


def is_metadata(name: str, entry: Entry) -> bool:
    """Whether a file is ImageFolder's metadata: called so, with a column `file_name`."""
    if os.path.basename(name) not in METADATA_NAMES:
        return False
    try:
        if isinstance(entry, FileEntry):  # which may be larger than any image
            with open_file(entry.path) as file:
                head = file.read(_HEAD_BYTES)
        else:
            head = entry.read()[:_HEAD_BYTES]
    except (OSError, EntryError):
        return False
    return _NAMES_FILES.search(head) is not None


def find_metadata(folder: Path, files: Iterable[str]) -> Path | None:
    """Returns ImageFolder's metadata among the files of a folder."""
    found = [name for name in files if is_metadata(name, FileEntry(str(folder / name), 0))]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(found)}: name the one to be read")
    return folder / found[0] if found else None


def read_with_metadata(name: str, path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads the list of a folder's images, and counts the images that it does not name."""
    source = read_list(path, options, spool)
    find = source.items.find
    missing = sum(
        _is_image(each) and find(each) is None and find(f"./{each}") is None
        for each, _ in open_tree(path.parent).entries()
    )
    if missing:
        source.passed_over[f"images that {path.name} does not name"] += missing
    return dataclasses.replace(source, name=name)


def has_text_files(files: Sequence[str]) -> bool:
    """Whether an image among the files of a folder has a .txt of its name."""
    texts = {os.path.splitext(name)[0] for name in files if name.endswith(".txt")}
    return any(_is_image(name) and os.path.splitext(name)[0] in texts for name in files)


def read_with_text_files(name: str, path: Path, spool: Spool) -> Source:
    """Reads the images that lie directly in a folder; the caption of x.jpg is in x.txt."""
    items, passed_over = spool.new_items(), Counter[str]()
    entries = {each: entry for each, entry in open_tree(path).entries() if "/" not in each}
    texts = {os.path.splitext(each)[0]: each for each in entries if each.endswith(".txt")}
    used = set()
    for each, entry in entries.items():
        stem, suffix = os.path.splitext(each)
        if _is_image(each):
            used.add(stem)
            items.append(_with_caption(each, entry, entries.get(texts.get(stem, ""))))
        elif suffix != ".txt":
            passed_over["hidden files" if each.startswith(".") else f"{suffix.lower()} files"] += 1
    if unused := len(texts.keys() - used):
        passed_over[".txt files without an image"] += unused
    return Source(name=name, items=items, labels_are_names=False, passed_over=passed_over)


def _with_caption(name: str, image: Entry, text: Entry | None) -> Item:
    item = Item(name, image)
    if isinstance(image, RefusedEntry):
        item.problem = Problem(image.kind, image.message)
    if text is not None:
        try:
            caption = text.read(max_bytes=MAX_CAPTION_BYTES).decode("utf-8-sig").strip()
            item.captions = [caption] if caption else []
        except (EntryError, UnicodeDecodeError) as error:
            item.problem = Problem("bad row", f"its .txt: {error}")
    require_text(item)
    return item


def _is_image(name: str) -> bool:
    is_hidden = any(part.startswith(".") for part in name.split("/"))
    return not is_hidden and os.path.splitext(name)[1].lower() not in NOT_IMAGES


def require_one_split(path: Path, folders: Iterable[str]) -> None:
    """Refuses several splits with a ValueError: joined, they leak into each other."""
    splits = sorted(folder for folder in folders if folder.lower() in SPLITS)
    if len(splits) > 1:
        chosen = next((split for split in splits if split.lower().startswith("train")), splits[0])
        every = " ".join(f"{path}/{split}" for split in splits)
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}, which would become one data set. Take "
            f"one: unicl-pack build {path}/{chosen} --out ...; or, to have them joined, name each: "
            f"unicl-pack build {every} --out ..."
        )


def require_classes(path: Path, classes: Iterable[str]) -> None:
    """Refuses images that lie directly in the folders of splits, whose names are no classes."""
    names = sorted(classes)
    if names and all(name.lower() in SPLITS for name in names):
        raise ValueError(
            f"the only class in {path} would be {names[0]!r}, which is the name of a split. If "
            "captions lie beside the images (1.txt beside 1.jpg, or a metadata.jsonl), name that "
            f"folder: unicl-pack build {path}/{names[0]} --out ...; else put "
            f"the images into class folders, such as {names[0]}/cat/1.jpg"
        )
