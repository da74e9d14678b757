"""Reads the SOURCE arguments of a build; a new kind of source is a file here and a line in SOURCES.

Nothing is dropped silently: skipped files are counted by kind, and images that cannot be packed
become items with a problem and end up in quarantine.csv.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import UrlTree

SOURCES = (
    "packed",  # before tars: its shards are tars
    "img2dataset",  # before class_folders: its folders 00000, 00001, ... are no classes
    "tars",  # before tables: img2dataset writes a Parquet file beside each tar
    "tables",  # before the folders of images: a folder of Parquet files can hold images too
    "image_folders",
    "karpathy",  # before coco: both are one JSON object with `images`
    "coco",  # before lists: a .json that is an object; an array is a list
    "lists",
    "maps",
    "class_folders",  # last: any other folder or zip; refuses all else
)
"""The file of each kind, which has a `KIND`; the first kind that recognises a path reads it."""


class Place:
    """A SOURCE argument, and the files there, looked up once when first needed."""

    def __init__(self, given: str) -> None:
        self.given = given
        self.path = Path(given)
        self.name = self.path.name or str(self.path)
        """For tables and messages."""

    @cached_property
    def is_url(self) -> bool:
        return is_url(self.given)

    @cached_property
    def is_file(self) -> bool:
        return not self.is_url and self.path.is_file()

    @cached_property
    def is_folder(self) -> bool:
        return not self.is_url and self.path.is_dir()

    @cached_property
    def files(self) -> list[str]:
        """Names of the files directly in the folder, sorted, without hidden ones."""
        return sorted(name for name in self._names if os.path.isfile(self.path / name))

    @cached_property
    def folders(self) -> set[str]:
        """Names of the folders directly in it, without hidden ones."""
        return {name for name in self._names if os.path.isdir(self.path / name)}

    @cached_property
    def _names(self) -> list[str]:
        names = os.listdir(self.path) if self.is_folder else []
        return [name for name in names if not name.startswith(".")]

    @property
    def aside(self) -> set[str]:
        """Folders that programs leave next to their output: img2dataset's _tmp, __MACOSX."""
        return {folder for folder in self.folders if folder.startswith("_")}

    def count_aside(self) -> Counter[str]:
        """Counts those folders for `Source.passed_over`."""
        return Counter(f"folder {folder}" for folder in sorted(self.aside))

    @cached_property
    def matches(self) -> list[str]:
        """Files and folders that a pattern such as 'shards-*.tar' matches, sorted."""
        is_there = self.is_url or self.is_file or self.is_folder
        return [] if is_there else sorted(glob.glob(self.given))

    @cached_property
    def tree(self) -> UrlTree:
        """The files below a URL; raises like `UrlTree`."""
        return UrlTree(self.given)


@dataclass(frozen=True, kw_only=True)
class SourceKind:
    """One kind of source."""

    recognises: Callable[[Place], bool]
    """Whether a place is of this kind, if no kind before it in the registry recognises it."""
    read: Callable[[Place, ListOptions, Spool], Source]
    """Reads it; ValueError for a source that is invalid or empty."""
    read_together: Callable[[Sequence[Place], ListOptions, Spool], Source] | None = None
    """Reads all of a build's sources of this kind as one."""


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
