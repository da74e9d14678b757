"""Where image bytes come from: a folder or a zip, seen as a tree of named files.

`sources` decides what the files mean; this module lists them and reads them, those of folders
itself, those of zips by `zip_files`. Nothing is ever written under a name found in a source.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.packing.sources.entries import (
    MAX_FILE_BYTES,
    Entry,
    EntryError,
    RefusedEntry,
    Tree,
    check_file_size,
)
from unicl_fast.packing.sources.spans import open_regular
from unicl_fast.packing.sources.zip_files import ZipTree

_MAX_PATH_BYTES = 4096
"""Linux's PATH_MAX. Longer names cannot exist, and resolving one takes time squared."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of its own."""

    path: str
    num_bytes: int
    mtime_ns: int = 0
    """When it was written, by which a build that goes on sees that it was changed."""

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                check_file_size(size, max_bytes)
                # Memory for all that is asked for is taken at once, which for `max_bytes` takes
                # longer than reading a small file. Some files, those of /proc say, have no size.
                data = file.read(size + 1)
                if len(data) > size:
                    data += file.read(max_bytes + 1 - len(data))
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error
        check_file_size(len(data), max_bytes)
        return data


class FolderTree:
    """The files under a folder. Links are followed in a listing, each folder visited once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """All files, sorted by name; in memory are the folders, and the names in one of them."""
        folders = self._folders()
        # not by recursion: folders can be nested deeper than Python's stack
        waiting: list[tuple[str, Entry | None]] = [("", None)]
        while waiting:
            name, entry = waiting.pop()
            if entry is not None:
                yield name, entry
            elif name in folders:
                waiting += sorted(_list_files(folders[name], name), reverse=True, key=_by_name)

    def _folders(self) -> dict[str, str]:
        """The folders to be listed: their paths by the beginning of their files' names.

        A folder that several links lead to is listed where it comes first, and once.
        """
        found: dict[str, str] = {}
        seen: set[str] = set()
        waiting = [_Folder(str(self._root), self._real_root, "")]
        while waiting:
            folder = waiting.pop()
            if folder.real not in seen:
                seen.add(folder.real)
                found[folder.prefix] = folder.path
                waiting.extend(reversed(_list_folders(folder)))
        return found

    def find(self, name: str) -> Entry:
        try:
            if len(os.fsencode(name)) > _MAX_PATH_BYTES:
                raise EntryError("missing", "the path is longer than any file's")
            path = os.path.realpath(self._root / name)
            if os.path.commonpath([path, self._real_root]) != self._real_root:
                raise EntryError(
                    "outside", f"the path leaves {self._root}; --image-root says where images are"
                )
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise EntryError("unreadable", "not a regular file")
        except EntryError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a zero byte, or half a character
            raise EntryError("missing", f"no such file in {self._root}") from error
        return FileEntry(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder on the way through a tree; `real` is its path without links."""

    path: str
    real: str
    prefix: str


def _list_folders(folder: _Folder) -> list[_Folder]:
    """The folders right in a folder, sorted."""
    folders = []
    with os.scandir(folder.path) as listing:
        for child in listing:
            try:
                if not child.is_dir():
                    continue
            except OSError:  # a link to itself; it is named among the files
                continue
            # resolving is slow where it is deep, and only links need it
            real = (
                os.path.realpath(child.path)
                if child.is_symlink()
                else os.path.join(folder.real, child.name)
            )
            folders.append(_Folder(child.path, real, f"{folder.prefix}{child.name}/"))
    return sorted(folders, key=lambda each: each.prefix.removesuffix("/"))


def _list_files(path: str, prefix: str) -> Iterator[tuple[str, Entry | None]]:
    """What lies right in a folder: files, and folders, whose names end in a slash."""
    with os.scandir(path) as listing:
        for child in listing:
            name = prefix + child.name
            try:
                if child.is_dir():
                    yield name + "/", None
                    continue
                status = child.stat()
                yield name, FileEntry(child.path, status.st_size, status.st_mtime_ns)
            except FileNotFoundError:  # a dangling link; reading it will say so
                yield name, FileEntry(child.path, 0)
            except OSError as error:  # a link to itself
                yield name, RefusedEntry("unreadable", error.strerror or str(error))


def _by_name(found: tuple[str, Entry | None]) -> str:
    return found[0]


def open_tree(place: Path) -> Tree:
    """A folder, a zip, or a folder inside a zip (`images.zip/train`)."""
    if place.is_dir():
        return FolderTree(place)
    archive = next((path for path in (place, *place.parents) if path.is_file()), None)
    if archive is None:
        raise FileNotFoundError(
            f"{place}: no such folder or zip of images, and no list (.csv, .jsonl, .parquet, ...)"
        )
    if not zipfile.is_zipfile(archive):
        raise ValueError(
            f"{archive} is neither a folder nor a zip; sources are folders of class folders, zips "
            "of them, lists whose name ends in .csv, .tsv, .jsonl, .json or .parquet, and what "
            "docs/sources.md names"
        )
    return ZipTree(archive, place.relative_to(archive).as_posix() if place != archive else "")


class Trees:
    """Trees by their places, each opened once: a zip may have a long directory."""

    def __init__(self) -> None:
        self._opened: dict[Path, Tree] = {}

    def find(self, place: Path) -> Tree:
        """What `open_tree` makes of a place, with its errors."""
        if place not in self._opened:
            self._opened[place] = open_tree(place)
        return self._opened[place]
