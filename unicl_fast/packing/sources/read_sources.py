"""Reads the SOURCE arguments of a build; a new kind of source is a file here and a line in SOURCES.

Nothing is dropped silently: skipped files are counted by kind, and images that cannot be packed
become items with a problem and end up in quarantine.csv.
"""

from collections.abc import Sequence
from importlib import import_module

from unicl_fast.packing.sources.rows import ListOptions
from unicl_fast.packing.sources.source_kind import Place, SourceKind
from unicl_fast.packing.sources.spool import Source, Spool

SOURCES = (
    "packed",  # before tars: its shards are tars
    "img2dataset",  # before class_folders: its folders 00000, 00001, ... are no classes
    "tars",  # before tables: img2dataset writes a Parquet file beside each tar
    "tables",  # before the folders of images: a folder of Parquet files can hold images too
    "image_folders",  # before text_files: metadata name the images to use
    "text_files",
    "karpathy",  # before coco: both are one JSON object with `images`
    "coco",  # before lists: a .json that is an object; an array is a list
    "lists",
    "maps",
    "class_folders",  # last: any other folder or zip; refuses all else
)
"""The file of each kind; the first kind that recognises a path reads it."""


def read_sources(paths: Sequence[str], options: ListOptions, spool: Spool) -> list[Source]:
    """Reads all sources of a build, in order; sources read together come with the first.

    Sources that cannot be read in place are unpacked into the spool, which must outlive the items.

    Raises:
        FileNotFoundError: a source is missing.
        ValueError: a source is of no known kind (docs/sources.md), or holds nothing.
    """
    kinds: list[SourceKind] = [import_module(f"{__package__}.{name}").KIND for name in SOURCES]
    places = {
        place: next(kind for kind in kinds if kind.recognises(place)) for place in map(Place, paths)
    }
    sources = []
    joined = set[SourceKind]()
    for place, kind in places.items():
        if kind.read_together is None:
            sources.append(kind.read(place, options, spool))
        elif kind not in joined:
            same = {each.path: each for each in places if places[each] == kind}  # each file once
            sources.append(kind.read_together(list(same.values()), options, spool))
            joined.add(kind)
    return sources
