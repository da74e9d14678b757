"""Reads what a user has - folders, archives, lists, data sets of others - into items to pack.

A source says for each image where its bytes are and which captions and labels it has, as the
source spells them. Here it is decided what a place is, and class folders are read; all other kinds
have a module of their own. Joining label spaces is the business of `class_names`, opening images
that of the workers. What is passed over or cannot be packed is never dropped in silence: it is
counted by name, or stays in the list with its problem and ends in quarantine.csv.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unicl_fast.packing.sources import cifar as source_cifar
from unicl_fast.packing.sources import idx as source_idx
from unicl_fast.packing.sources import tables as source_tables
from unicl_fast.packing.sources import tars as source_tars
from unicl_fast.packing.sources import tsv as source_tsv
from unicl_fast.packing.sources.coco import read_coco
from unicl_fast.packing.sources.entries import RefusedEntry
from unicl_fast.packing.sources.items import Item as Item
from unicl_fast.packing.sources.items import Label as Label
from unicl_fast.packing.sources.items import ListOptions as ListOptions
from unicl_fast.packing.sources.items import Problem as Problem
from unicl_fast.packing.sources.items import Source as Source
from unicl_fast.packing.sources.items import split_condition as split_condition
from unicl_fast.packing.sources.json_stream import first_character
from unicl_fast.packing.sources.lists import MAP_ENDING, read_list, read_map
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.trees import open_tree

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TABLE_SUFFIXES = (*source_tables.PARQUET, *source_tables.ARROW)
TAR_SUFFIXES = (".tar", *source_tars.GZIPPED)

NOT_IMAGES = frozenset(
    f".{extension}"
    for group in (
        "txt csv tsv json jsonl md rst xml html htm yaml yml toml ini cfg log pdf",
        "py sh db pkl npy npz mat h5 idx zip tar gz tgz mp3 wav mp4 avi mov parquet arrow",
    )
    for extension in group.split()
)
"""Extensions passed over in class folders; a file with any other, or none, is tried."""


def read_sources(
    places: Sequence[str], options: ListOptions | None = None, spool: Spool | None = None
) -> list[Source]:
    """Reads all sources of a build; COCO's files become one, whatever stands between them."""
    coco = [Path(place) for place in places if _is_coco(Path(place))]
    sources = []
    is_coco_read = False
    for place in places:
        if Path(place) not in coco:
            sources.append(read_source(place, options, spool))
        elif not is_coco_read:
            files = list(dict.fromkeys(coco))
            sources.append(read_coco(files, options or ListOptions(), spool or Spool(None)))
            is_coco_read = True
    return sources


def read_source(
    place: str, options: ListOptions | None = None, spool: Spool | None = None
) -> Source:
    """Reads one source.

    Args:
        place: see docs/sources.md.
        options: for lists, and for what else has columns or fields.
        spool: where what cannot be read in place is unpacked; it must outlive the items. Without
            one such sources are refused.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is not such a thing; the message says what to do.
    """
    path = Path(place)
    options = options or ListOptions()
    spool = spool or Spool(None)
    name = path.name or str(path)
    if path.is_dir():
        return _read_folder(path, options, spool)
    if path.is_file():
        return _read_file(path, options, spool)
    if (tars := source_tars.expand_braces(place)) != [place]:
        return source_tars.read_tars(name, [Path(tar) for tar in tars], options, spool)
    if source_cifar.ARCHIVE.fullmatch(path.parent.name) and path.parent.is_file():
        return source_cifar.read_cifar(path, options, spool)
    if path.parent.is_dir() and (parquet := source_tables.find_parquet(path.parent)):
        chosen = source_tables.choose_split(path.parent, parquet, split=path.name)
        return source_tables.read_tables(f"{path.parent.name}/{name}", chosen, options, spool)
    return _read_class_folders(path, spool)


def _read_file(path: Path, options: ListOptions, spool: Spool) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".tsv" and source_tsv.holds_images(path):
        return source_tsv.read_tsv(path, options, spool)
    if _is_coco(path):
        return read_coco([path], options, spool)
    if suffix in LIST_SUFFIXES:
        return read_list(path, options, spool)
    if suffix in TABLE_SUFFIXES:
        return source_tables.read_tables(path.name, [path], options, spool)
    if source_cifar.ARCHIVE.fullmatch(path.name) or source_cifar.is_cifar_file(path):
        return source_cifar.read_cifar(path, options, spool)
    if path.name.lower().endswith(TAR_SUFFIXES):
        return source_tars.read_tars(path.name, [path], options, spool)
    if path.name.lower().endswith(MAP_ENDING):
        return read_map(path, options, spool)
    if source_idx.is_idx(path):
        return source_idx.read_idx(path, spool)
    return _read_class_folders(path, spool)


def _read_folder(path: Path, options: ListOptions, spool: Spool) -> Source:
    """A folder by what lies right in it; what is nothing else is one of class folders."""
    if source_tables.is_saved_dataset(path):
        return source_tables.read_saved_dataset(path, options, spool)
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    files = sorted(name for name in names if os.path.isfile(path / name))
    folders = {name for name in names if os.path.isdir(path / name)}
    name = path.name or str(path)
    if source_cifar.is_cifar(files):
        return source_cifar.read_cifar(path, options, spool)
    shards = (folder for folder in folders if folder.isdecimal())
    if any(f"{shard}{end}" in files for shard in shards for end in ("_stats.json", ".parquet")):
        return source_tars.read_image_folders(path, options, spool)
    tars = [file for file in files if file.lower().endswith(TAR_SUFFIXES)]
    parquet = source_tables.find_parquet(path)
    # what programs leave beside their output: img2dataset's _tmp, __MACOSX
    aside = {folder for folder in folders if folder.startswith("_")}
    if tars and folders == aside:
        source = source_tars.read_tars(name, [path / tar for tar in tars], options, spool)
    elif parquet and folders - aside <= {"data"}:
        chosen = source_tables.choose_split(path, parquet)
        source = source_tables.read_tables(name, chosen, options, spool)
    else:
        beside = tars or [file.name for file in parquet if file.parent == path]
        return _read_class_folders(path, spool, beside=beside)
    source.passed_over.update(f"folder {folder}" for folder in sorted(aside))
    return source


def _is_coco(path: Path) -> bool:
    """A .json that is one object; one that is an array is a list like any other."""
    return path.suffix.lower() == ".json" and path.is_file() and first_character(path) != "["


def _read_class_folders(path: Path, spool: Spool, *, beside: Sequence[str] = ()) -> Source:
    """Class = name of the folder that directly holds the image.

    `beside` are tars or Parquet files that lie there too and are not read, which is said.
    """
    items = spool.new_items()
    passed_over: Counter[str] = Counter()
    for name, entry in open_tree(path).entries():
        *folders, file_name = name.split("/")
        suffix = os.path.splitext(file_name)[1].lower()
        if isinstance(entry, RefusedEntry):
            problem = Problem(kind=entry.kind, message=entry.message)
            items.append(Item(name, problem=problem))
        elif any(part.startswith(".") or part == "__MACOSX" for part in name.split("/")):
            passed_over["hidden files"] += 1
        elif name in beside:
            passed_over[f"{suffix} files beside folders (name them to pack them)"] += 1
        elif suffix in NOT_IMAGES:
            passed_over[f"{suffix} files"] += 1
        elif folders:
            items.append(Item(name, entry, labels=[folders[-1]]))
        else:
            problem = Problem(
                kind="no class",
                message="the image lies in no class folder; expected for example cat/1.jpg",
            )
            items.append(Item(name, problem=problem))
    if not items:
        raise ValueError(
            f"{path} holds no images; expected class folders with images in them, such as "
            f"{path}/cat/1.jpg"
            + (
                f". Files such as {beside[0]} lie there too, and are not read where there are "
                "folders beside them: name the files, or move the folders away"
                if beside
                else ""
            )
        )
    return Source(
        name=path.name or str(path), items=items, labels_are_names=True, passed_over=passed_over
    )
