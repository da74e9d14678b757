"""Where picture bytes come from: a folder or a zip, seen as a tree of named files.

`sources` decides what the files mean; this module lists them and reads them. An entry is small,
can be sent to a worker process, and is read there without the tree: a worker never parses a zip's
directory. Nothing is ever written under a name found in a zip or a list.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

MAX_FILE_BYTES = 512_000_000
"""Largest file read as a picture; a larger one is no picture that training could use."""

_ZIP_LOCAL_HEADER_BYTES = 30
_ZIP_ENCRYPTED = 0x1


class EntryError(ValueError):
    """Why a file cannot be had: a short `kind` to count by, and a sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Entry(Protocol):
    """One file that can be read anywhere, any time."""

    @property
    def num_bytes(self) -> int:
        """Size as listed; a hint for sharing out work."""
        ...

    def read(self) -> bytes:
        """The file's bytes, or an `EntryError`."""
        ...


class Tree(Protocol):
    """Named files under one root, names with forward slashes."""

    def entries(self) -> list[tuple[str, Entry]]:
        """All files, sorted by name."""
        ...

    def find(self, name: str) -> Entry:
        """The file called `name`, or an `EntryError`."""
        ...


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of its own."""

    path: str
    num_bytes: int

    def read(self) -> bytes:
        try:
            # not blocking: a pipe that lies among pictures must not stop the program
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise EntryError("unreadable", "not a regular file")
                _check_file_size(status.st_size)
                return file.read()
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file inside a zip, with what the zip's directory says of it."""

    archive: str
    header_offset: int
    packed_bytes: int
    num_bytes: int
    method: int
    crc: int
    flags: int

    def read(self) -> bytes:
        if self.flags & _ZIP_ENCRYPTED:
            raise EntryError("unreadable", "encrypted inside the zip")
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise EntryError("unreadable", f"zip compression method {self.method} is not known")
        _check_file_size(self.num_bytes)
        _check_file_size(self.packed_bytes)
        try:
            with open(self.archive, "rb") as file:
                packed = self._read_packed(file)
        except OSError as error:
            raise EntryError("unreadable", error.strerror or str(error)) from error
        data = packed if self.method == zipfile.ZIP_STORED else self._inflate(packed)
        if len(data) != self.num_bytes or zlib.crc32(data) != self.crc:
            raise EntryError("damaged", "the zip's checksum does not fit the file inside it")
        return data

    def _read_packed(self, file: BinaryIO) -> bytes:
        # The local header repeats the name and has an extra field of its own length, so where the
        # data begin is known only here (APPNOTE.TXT 4.3.7).
        file.seek(self.header_offset)
        header = file.read(_ZIP_LOCAL_HEADER_BYTES)
        if len(header) < _ZIP_LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
            raise EntryError("damaged", "the zip has no file where its directory says")
        name_bytes = int.from_bytes(header[26:28], "little")
        extra_bytes = int.from_bytes(header[28:30], "little")
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        return file.read(self.packed_bytes)

    def _inflate(self, packed: bytes) -> bytes:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # never more than the directory promises, whatever the stream holds
            return inflater.decompress(packed, self.num_bytes + 1)
        except zlib.error as error:
            raise EntryError("damaged", f"the zip's compressed data are broken: {error}") from error


def _check_file_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise EntryError(
            "too large", f"{num_bytes:,} bytes; files of at most {MAX_FILE_BYTES:,} are read"
        )


class FolderTree:
    """The files under a folder. Links are followed in a listing, each folder visited once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)

    def entries(self) -> list[tuple[str, Entry]]:
        found: list[tuple[str, Entry]] = []
        self._collect(str(self._root), "", set(), found)
        found.sort(key=lambda entry: entry[0])
        return found

    def find(self, name: str) -> Entry:
        path = os.path.realpath(self._root / name)
        if os.path.commonpath([path, self._real_root]) != self._real_root:
            raise EntryError("outside", f"the path leaves {self._root}")
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            raise EntryError("missing", f"no such file in {self._root}") from error
        if not stat.S_ISREG(status.st_mode):
            raise EntryError("unreadable", "not a regular file")
        return FileEntry(path, status.st_size)

    def _collect(
        self, folder: str, prefix: str, seen: set[str], found: list[tuple[str, Entry]]
    ) -> None:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        with os.scandir(folder) as listing:
            children = sorted(listing, key=lambda child: child.name)
        for child in children:
            if child.is_dir():
                self._collect(child.path, f"{prefix}{child.name}/", seen, found)
            else:
                try:
                    size = child.stat().st_size
                except OSError:
                    size = 0  # a dangling link; reading it will say so
                found.append((prefix + child.name, FileEntry(child.path, size)))


class ZipTree:
    """The files of a zip, or of one folder inside it."""

    def __init__(self, archive: Path, inside: str = "") -> None:
        self._archive = archive
        self._entries: dict[str, Entry] = {}
        prefix = inside.strip("/") + "/" if inside.strip("/") else ""
        try:
            with zipfile.ZipFile(archive) as file:
                members = file.infolist()
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise ValueError(f"{archive} cannot be read as a zip: {error}") from error
        for member in members:
            if member.filename.startswith(prefix) and not member.is_dir():
                self._entries[member.filename.removeprefix(prefix)] = ZipEntry(
                    archive=str(archive),
                    header_offset=member.header_offset,
                    packed_bytes=member.compress_size,
                    num_bytes=member.file_size,
                    method=member.compress_type,
                    crc=member.CRC,
                    flags=member.flag_bits,
                )
        if prefix and not self._entries:
            folders = sorted({name.filename.split("/")[0] for name in members})
            raise FileNotFoundError(
                f"{archive} holds no folder {inside!r}; at its top are: "
                f"{', '.join(folders[:10])}{', ...' if len(folders) > 10 else ''}"
            )

    def entries(self) -> list[tuple[str, Entry]]:
        return sorted(self._entries.items())

    def find(self, name: str) -> Entry:
        entry = self._entries.get(name.removeprefix("./"))
        if entry is None:
            raise EntryError("missing", f"no such file in {self._archive}")
        return entry


def open_tree(place: Path) -> Tree:
    """A folder, a zip, or a folder inside a zip (`pictures.zip/train`)."""
    if place.is_dir():
        return FolderTree(place)
    archive = next((path for path in (place, *place.parents) if path.is_file()), None)
    if archive is None:
        raise FileNotFoundError(
            f"{place}: no such folder or zip of pictures, and no list (.csv, .tsv, .jsonl)"
        )
    if not zipfile.is_zipfile(archive):
        raise ValueError(
            f"{archive} is neither a folder nor a zip; sources are folders of class folders, zips "
            "of them, and lists whose name ends in .csv, .tsv or .jsonl"
        )
    return ZipTree(archive, place.relative_to(archive).as_posix() if place != archive else "")
