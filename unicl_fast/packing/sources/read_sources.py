"""Reads the SOURCE arguments of a build: decides what each path is, and reads class folders.

What is passed over or cannot be packed is never dropped in silence: it is counted by name, or stays
in the list with its problem and ends in quarantine.csv.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.sources import lists, tables, tars
from unicl_fast.packing.sources.coco import is_coco, read_coco
from unicl_fast.packing.sources.entries import RefusedEntry
from unicl_fast.packing.sources.image_folders import (
    METADATA_NAMES,
    NOT_IMAGES,
    find_metadata,
    has_text_files,
    is_metadata,
    read_with_metadata,
    read_with_text_files,
    require_classes,
    require_one_split,
)
from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.karpathy import is_karpathy, read_karpathy
from unicl_fast.packing.sources.packed import is_packed, read_packed
from unicl_fast.packing.sources.rows import ListOptions
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import UrlTree, open_tree

_NO_OPTIONS = ListOptions()


def read_sources(
    paths: Sequence[str], options: ListOptions = _NO_OPTIONS, spool: Spool | None = None
) -> list[Source]:
    """Reads all sources of a build; all of COCO's files become one, in the place of the first."""
    spool = spool or Spool(None)
    files = dict.fromkeys(map(Path, paths))
    coco = [path for path in files if is_coco(path) and not is_karpathy(path)]
    sources = []
    is_coco_read = False
    for path in paths:
        if Path(path) not in coco:
            sources.append(read_source(path, options, spool))
        elif not is_coco_read:
            sources.append(read_coco(coco, options, spool))
            is_coco_read = True
    return sources


def read_source(
    path: str, options: ListOptions = _NO_OPTIONS, spool: Spool | None = None
) -> Source:
    """Reads one source (docs/sources.md).

    What cannot be read in place is unpacked into the spool, which must outlive the items; without
    one such sources are refused. Raises FileNotFoundError if it is not there, ValueError if it is
    no such thing or holds nothing.
    """
    place = Path(path)
    spool = spool or Spool(None)
    name = place.name or str(place)
    if is_url(path):
        return _read_url(path, name, options, spool)
    if place.is_dir():
        return _read_folder(place, name, options, spool)
    if place.is_file():
        return _read_file(place, options, spool)
    if (shards := tars.expand_braces(path)) != [path]:
        return tars.read_tars(name, [Path(shard) for shard in shards], options, spool)
    if found := sorted(glob.glob(path)):
        return _read_matches(path, found, options, spool)
    parquet = tables.find_parquet(place.parent) if not place.suffix else []
    if any(map(tables.split_of, parquet)):
        chosen = tables.choose_split(place.parent, parquet, split=place.name)
        return tables.read_tables(f"{place.parent.name}/{name}", chosen, options, spool)
    return _read_class_folders(place, name, spool)


def _read_url(url: str, name: str, options: ListOptions, spool: Spool) -> Source:
    """Reads tars, or a folder of tars or of class folders, where they lie under a URL."""
    if name.lower().endswith(tars.TARS):
        return tars.read_tars(name, tars.expand_braces(url), options, spool)
    tree = UrlTree(url)
    if found := sorted(each for each in tree.sizes if each.endswith(".tar") and "/" not in each):
        return tars.read_tars(name, list(map(tree.url_of, found)), options, spool)
    return _read_class_folders(Path(name), name, spool, tree=tree)


def _read_matches(pattern: str, found: Sequence[str], options: ListOptions, spool: Spool) -> Source:
    """Reads the files that a pattern in quotes matches: tars, or tables, as one source."""
    paths, name = [Path(each) for each in found], Path(pattern).name
    if all(each.lower().endswith(tars.TARS) for each in found):
        return tars.read_tars(name, paths, options, spool)
    if all(each.lower().endswith(tables.PARQUET) for each in found):
        return tables.read_tables(name, paths, options, spool)
    raise ValueError(
        f"{pattern} matches {len(found):,} files or folders, such as {found[0]}; patterns are read "
        "for tars and Parquet files alone, since an image by itself has neither class nor caption. "
        "Name the folder that holds the class folders, or a list (.csv, .jsonl, ...)"
    )


def _read_file(path: Path, options: ListOptions, spool: Spool) -> Source:
    suffix = path.suffix.lower()
    if is_karpathy(path):
        return read_karpathy(path, options, spool)
    if is_coco(path):
        return read_coco([path], options, spool)
    if suffix in lists.LIST_SUFFIXES:
        return lists.read_list(path, options, spool)
    if suffix in tables.PARQUET:
        return tables.read_tables(path.name, [path], options, spool)
    if path.name.lower().endswith(tars.TARS):
        return tars.read_tars(path.name, [path], options, spool)
    if path.name.lower().endswith(lists.MAP_ENDING):
        return lists.read_map(path, options, spool)
    return _read_class_folders(path, path.name, spool)


def _read_folder(path: Path, name: str, options: ListOptions, spool: Spool) -> Source:
    """Reads a folder by what is directly in it; any other folder is one of class folders."""
    if is_packed(path):
        return read_packed(path, options, spool)
    names = [each for each in os.listdir(path) if not each.startswith(".")]
    files = sorted(each for each in names if os.path.isfile(path / each))
    folders = {each for each in names if os.path.isdir(path / each)}
    if folders and all(is_packed(path / folder) for folder in folders):
        every = " ".join(f"{path}/{folder}" for folder in sorted(folders))
        raise ValueError(f"{path} holds packed data sets: name one, or each: {every}")
    shards = (folder for folder in folders if folder.isdecimal())
    if any(f"{shard}{end}" in files for shard in shards for end in ("_stats.json", ".parquet")):
        return tars.read_image_folders(path, options, spool)
    archives = [file for file in files if file.lower().endswith(tars.TARS)]
    parquet = tables.find_parquet(path)
    # what programs leave next to their output: img2dataset's _tmp, __MACOSX
    aside = {folder for folder in folders if folder.startswith("_")}
    if archives and folders == aside:
        source = tars.read_tars(name, [path / archive for archive in archives], options, spool)
    elif parquet and folders - aside <= {"data"}:
        chosen = tables.choose_split(path, parquet)
        source = tables.read_tables(name, chosen, options, spool)
    elif metadata := find_metadata(path, files):
        return read_with_metadata(name, metadata, options, spool)
    elif folders == aside and has_text_files(files):
        source = read_with_text_files(name, path, spool)
    else:
        if not spool.takes_loose:
            require_one_split(path, folders)
        beside = archives or [file.name for file in parquet if file.parent == path]
        return _read_class_folders(path, name, spool, beside=beside)
    source.passed_over.update(f"folder {folder}" for folder in sorted(aside))
    return source


def _read_class_folders(
    path: Path,
    source_name: str,
    spool: Spool,
    *,
    beside: Sequence[str] = (),
    tree: UrlTree | None = None,
) -> Source:
    """Reads class folders; `beside` are tars or Parquet files there that are not read."""
    items = spool.new_items()
    passed_over: Counter[str] = Counter()
    tops, classes = set[str](), set[str]()
    for name, entry in (tree or open_tree(path)).entries():
        parts = name.split("/")
        *folders, file_name = parts
        _, dot, extension = file_name.rpartition(".")  # `splitext` takes a tenth of the whole loop
        suffix = f".{extension.lower()}" if dot else ""
        if isinstance(entry, RefusedEntry):
            items.append(refused(name, entry.kind, entry.message))
        elif name[0] == "." or "/." in name or "__MACOSX" in parts:
            passed_over["hidden files"] += 1
        elif name in beside:
            passed_over[f"{suffix} files beside folders (name them to pack them)"] += 1
        elif file_name in METADATA_NAMES and is_metadata(name, entry):
            holder = "/".join([str(path), *folders])
            raise ValueError(
                f"{path} holds {name}, a list of images with their texts, which class folders do "
                f"not have: unicl-pack build {holder} --out ... reads it (out of a zip: unpack it)"
            )
        elif suffix in NOT_IMAGES:
            passed_over[f"{suffix} files"] += 1
        elif folders:
            tops.add(folders[0])
            classes.add(folders[-1])
            items.append(Item(name, entry, [], [folders[-1]]))
        elif spool.takes_loose:
            items.append(Item(name, entry, labels=[path.resolve().name]))
        else:
            message = "the image lies in no class folder; expected for example cat/1.jpg"
            items.append(refused(name, "no class", message))
    if not items:
        message = f"{path} holds no images; expected class folders with images in them, such as "
        message += f"{path}/cat/1.jpg"
        if beside:
            message += f". Files such as {beside[0]} lie there too, and are not read where there "
            message += "are folders beside them: name the files, or move the folders away"
        raise ValueError(message)
    if not spool.takes_loose:
        require_one_split(path, tops)
        require_classes(path, classes)
    return Source(name=source_name, items=items, labels_are_names=True, passed_over=passed_over)
