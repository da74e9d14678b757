"""Folders, zips and URLs as trees of named files; nothing is ever written under a name found there.

Names lead to entries, or to the problem that is known from the listing.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from unicl_fast.dataset.object_store import ObjectStore, is_url
from unicl_fast.packing.sources.entries import (
    LOCAL_HEADER_BYTES,
    Entry,
    FileEntry,
    Found,
    Problem,
    Span,
    ZipEntry,
)
from unicl_fast.packing.sources.items import Item, item_of, refused
from unicl_fast.system.paths import nearest_name

_MAX_PATH_BYTES = 4096
"""Linux's PATH_MAX. Longer names cannot exist, and resolving them costs quadratic time."""
_MADE_ON_UNIX = 3  # only then do the upper 16 bits of a member's attributes tell its kind of file


class FolderTree:
    """The files under a folder.

    Links are followed anywhere, since their author could have put the files there instead. A name
    that itself leaves the folder is refused, since a list can come from somebody else.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)

    def entries(self) -> Iterator[tuple[str, Found]]:
        """Yields all files, sorted by name; a folder that several links point to comes once.

        Only the names in one folder, and in the folders above it, are in memory.
        """
        seen = set[str]()
        # not recursive: folders can be nested deeper than Python's stack
        waiting: list[tuple[str, Found | _Folder]] = [("", _Folder(self.root, self._real_root))]
        while waiting:
            name, found = waiting.pop()
            if not isinstance(found, _Folder):
                yield name, found
            elif found.real not in seen:
                seen.add(found.real)
                waiting += sorted(_list_folder(found, name), reverse=True, key=itemgetter(0))

    def find(self, name: str) -> Found:
        """Returns the file called `name`, or why there is none."""
        try:
            if len(os.fsencode(name)) > _MAX_PATH_BYTES:
                return Problem("missing", "the path is longer than any file's")
            path = os.path.realpath(self.root / name)
            # `..` after a link is not the folder before it, and absolute paths have many spellings
            if not self._names_inside(name) and not _is_under(path, self._real_root):
                message = f"the path leaves {self.root}; --image-root says where images are"
                return Problem("outside", message)
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: a zero byte, or half a character
            return Problem("missing", f"no such file in {self.root}")
        if not stat.S_ISREG(status.st_mode):
            return Problem("unreadable", "not a regular file")
        # by the folder's own path, which can be relative: an index can then be moved with it
        return FileEntry(str(self.root / name), status.st_size, status.st_mtime_ns)

    def _names_inside(self, name: str) -> bool:
        """Whether a path, as written, stays in the folder before links are followed."""
        if ".." in name.split("/"):
            return False
        return not os.path.isabs(name) or _is_under(name, os.path.abspath(self.root))


def _is_under(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


@dataclass(frozen=True, slots=True)
class _Folder:
    path: str | Path
    real: str
    """The path without links."""


def _list_folder(folder: _Folder, prefix: str) -> Iterator[tuple[str, Found | _Folder]]:
    """Yields a folder's direct contents: files, and folders with a slash after their names."""
    with os.scandir(folder.path) as listing:
        for child in listing:
            name = prefix + child.name
            try:
                if child.is_dir():
                    real = os.path.join(folder.real, child.name)
                    if child.is_symlink():  # resolving deep paths is slow
                        real = os.path.realpath(child.path)
                    yield name + "/", _Folder(child.path, real)
                    continue
                status = child.stat()
                yield name, FileEntry(child.path, status.st_size, status.st_mtime_ns)
            except FileNotFoundError:  # a dangling link; reading it will say so
                yield name, FileEntry(child.path, 0)
            except OSError as error:  # a link to itself
                yield name, Problem("unreadable", error.strerror or str(error))


class ZipTree:
    """The files of a zip, or of one folder inside it."""

    def __init__(self, archive: Path, inside: str = "") -> None:
        self._archive, self.root = archive, archive / inside
        prefix = inside.strip("/") + "/" if inside.strip("/") else ""
        members = [member for member in _read_directory(archive) if not member.is_dir()]
        archive_bytes = archive.stat().st_size
        repeated = {
            name for name, n in Counter(member.filename for member in members).items() if n > 1
        }
        overlapping = _find_overlapping(members)
        self._entries: dict[str, Found] = {}
        for member in members:
            if member.filename.startswith(prefix):
                refused = _refuse(member, archive_bytes, overlapping=overlapping, repeated=repeated)
                self._entries[member.filename.removeprefix(prefix)] = refused or ZipEntry(
                    path=str(archive),
                    header_offset=member.header_offset,
                    packed_bytes=member.compress_size,
                    num_bytes=member.file_size,
                    method=member.compress_type,
                    crc=member.CRC,
                    flags=member.flag_bits,
                )
        if prefix and not self._entries:
            folders = sorted({member.filename.split("/")[0] for member in members})
            raise FileNotFoundError(
                f"{archive} holds no folder {inside!r}; at its top are: "
                f"{', '.join(folders[:10])}{', ...' if len(folders) > 10 else ''}"
            )

    def entries(self) -> Iterator[tuple[str, Found]]:
        """Yields all files, sorted by name."""
        return ((name, self._entries[name]) for name in sorted(self._entries))

    def find(self, name: str) -> Found:
        """Returns the file called `name`, or why there is none."""
        missing = Problem("missing", f"no such file in {self._archive}")
        return self._entries.get(name.removeprefix("./"), missing)


def _read_directory(archive: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as file:
            return file.infolist()
    except Exception as error:  # zipfile raises any error that its parsing runs into
        reason = str(error) or type(error).__name__
        raise ValueError(f"{archive} cannot be read as a zip: {reason}") from error


def _refuse(
    member: zipfile.ZipInfo, archive_bytes: int, *, overlapping: set[int], repeated: set[str]
) -> Problem | None:
    """The reason, from the directory, not to read a member; None if it can be read."""
    name = member.filename
    if name.startswith("/") or ".." in name.split("/"):
        return Problem("outside", "the name leaves the zip")
    if name in repeated:
        return Problem("ambiguous", "the zip holds several files of this name")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.create_system == _MADE_ON_UNIX and kind not in (0, stat.S_IFREG):
        return Problem("unreadable", "not a regular file but a link or a device")
    end = member.header_offset + LOCAL_HEADER_BYTES + member.compress_size
    if member.header_offset < 0 or end > archive_bytes:
        return Problem("damaged", "the zip's directory says it lies beyond the zip's end")
    if member.header_offset in overlapping:
        return Problem("damaged", "it shares its bytes with another file of the zip")
    return None


def _find_overlapping(members: Sequence[zipfile.ZipInfo]) -> set[int]:
    """The offsets of members that share bytes: archivers write none, zip bombs do."""
    spans = sorted((member.header_offset, member.compress_size) for member in members)
    overlapping: set[int] = set()
    reach, reached_by = 0, -1
    for start, size in spans:
        if start < reach:
            overlapping |= {start, reached_by}
        end = start + LOCAL_HEADER_BYTES + size
        if end > reach:
            reach, reached_by = end, start
    return overlapping


def require_there(entry: Entry, source: str, problem: Problem) -> None:
    """Raises FileNotFoundError if an image's source has vanished, as a dropped mount does.

    A single file can be gone. If its folder is missing or empty, or its archive is missing, all
    other images are gone too. A store that does not answer is no image's fault.
    """
    if problem.kind != "unreadable":
        return
    if is_url(entry.path):
        raise FileNotFoundError(f"{source} cannot be read: {problem.message}")
    if isinstance(entry, FileEntry):
        place = os.path.dirname(entry.path)
        try:
            with os.scandir(place) as listing:
                is_there = next(listing, None) is not None
        except PermissionError:  # images can be read by name even if names cannot be listed
            is_there = True
        except OSError:
            is_there = False
    else:
        place = entry.path
        is_there = os.path.exists(place)
    if not is_there:
        raise FileNotFoundError(
            f"the source {source} has vanished while it was packed: {place} was there when it was "
            "listed, and is gone or empty. Restore it (a dropped mount, say) and give the same "
            "command again"
        )


class UrlTree:
    """The files below a URL."""

    def __init__(self, url: str) -> None:
        """Raises ValueError if the store cannot list, FileNotFoundError if nothing is there."""
        self._url = url.rstrip("/")
        listed = ObjectStore(self._url).list_objects()
        if listed is None:
            raise ValueError(
                f"{url}: http cannot list folders; name its tars: {self._url}/{{000..099}}.tar"
            )
        self.sizes = {name: one.size for name, one in listed.items() if name[-1:] not in ("", "/")}
        if not self.sizes:
            raise FileNotFoundError(
                f"{url}: no tar and no folder of tars or class folders, which are read in place"
            )

    def url_of(self, name: str) -> str:
        return f"{self._url}/{name}"

    def entries(self) -> Iterator[tuple[str, Found]]:
        """Yields all files, sorted by name."""
        return (
            (name, Span(self.url_of(name), 0, size)) for name, size in sorted(self.sizes.items())
        )


Tree = FolderTree | ZipTree
"""Named files under one root; names have forward slashes."""


def open_tree(path: Path) -> Tree:
    """Opens a folder, a zip, or a folder inside a zip (`images.zip/train`)."""
    if path.is_dir():
        return FolderTree(path)
    archive = next((each for each in (path, *path.parents) if each.is_file()), None)
    if archive is None:
        raise FileNotFoundError(
            f"{path}: no such folder or zip of images, and no list (.csv, .jsonl, .parquet, ...)"
            + nearest_name(path)
        )
    if not zipfile.is_zipfile(archive):
        raise ValueError(
            f"{archive} is neither a folder nor a zip; sources are folders of class folders, zips "
            "of them, lists whose name ends in .csv, .tsv, .jsonl, .json or .parquet, and what "
            "docs/sources.md names"
        )
    return ZipTree(archive, path.relative_to(archive).as_posix() if path != archive else "")


def find_image(tree: Tree, name: str) -> Item:
    """Returns the item of an image; an absolute path must lead into the tree."""
    if ".." in name.split("/"):
        return refused(name, "outside", "paths must stay inside the image root")
    return item_of(name, tree.find(name))
