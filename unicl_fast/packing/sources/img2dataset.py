"""img2dataset's folders of files: 00000/000000000.jpg, .txt and .json; `tars` reads its tars."""

import functools

from unicl_fast.packing.sources.entries import Found, Problem
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.tars import (
    MAX_TEXT_BYTES,
    NO_SAMPLE,
    Group,
    SampleMaker,
    count_failures,
    split_name,
)
from unicl_fast.packing.sources.trees import open_tree


def _recognises(place: Place) -> bool:
    """Whether a shard's folder has statistics or a list beside it."""
    endings = ("_stats.json", ".parquet")
    shards = (folder for folder in place.folders if folder.isdecimal())
    return any(f"{shard}{ending}" in place.files for shard in shards for ending in endings)


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    path = place.path
    maker = SampleMaker(options, spool)
    at, group = "", Group()
    for name, entry in open_tree(path).entries():
        key, extension = split_name(name)
        if extension is None or "/" not in key:
            if not name.endswith((".parquet", "_stats.json")):
                maker.passed_over[NO_SAMPLE] += 1
            continue
        if key != at:  # sorted, so the files of a sample follow each other
            if at:
                maker.add(at, group)
            at, group = key, Group()
        maker.add_file(group, extension, entry, functools.partial(_read_text, entry))
    if at:
        maker.add(at, group)
    for shard in sorted(each for each in path.iterdir() if each.is_dir()):
        count_failures(shard, maker)
    return maker.source(place.name, "images")


def _read_text(entry: Found) -> bytes:
    return b"" if isinstance(entry, Problem) else entry.read(max_bytes=MAX_TEXT_BYTES)


KIND = SourceKind(recognises=_recognises, read=_read)
