"""A kind of source: how to recognise a SOURCE argument, and how to read it.

Each kind is one file in this folder, listed in `read_sources.SOURCES`, with a `KIND`.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.sources.rows import ListOptions
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import UrlTree


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
