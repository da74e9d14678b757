"""The files of a zip, read in place.

Workers read an entry by what the zip's directory says of it and never parse that directory. A zip
may lie: about sizes, places, names and what a member is. Sizes and checksums are compared with what
is found, nothing is inflated beyond what is declared, and members that no sound zip has are refused
by name. Nothing is ever written under a name found in a zip.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from unicl_fast.packing.sources.entries import (
    MAX_FILE_BYTES,
    Entry,
    EntryError,
    RefusedEntry,
    check_file_size,
)

_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 0x1
_MADE_ON_UNIX = 3
"""Only then do the upper 16 bits of the attributes say what kind of file a member was."""


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

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        if self.flags & _ENCRYPTED:
            raise EntryError("unreadable", "encrypted inside the zip")
        if self.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise EntryError("unreadable", f"zip compression method {self.method} is not known")
        check_file_size(self.num_bytes, max_bytes)
        check_file_size(self.packed_bytes, max_bytes)
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
        header = file.read(_LOCAL_HEADER_BYTES)
        if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
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


class ZipTree:
    """The files of a zip, or of one folder inside it."""

    def __init__(self, archive: Path, inside: str = "") -> None:
        self._archive = archive
        prefix = inside.strip("/") + "/" if inside.strip("/") else ""
        members = [member for member in _read_directory(archive) if not member.is_dir()]
        archive_bytes = archive.stat().st_size
        repeated = {
            name for name, n in Counter(member.filename for member in members).items() if n > 1
        }
        overlapping = _find_overlapping(members)
        self._entries: dict[str, Entry] = {}
        for member in members:
            if member.filename.startswith(prefix):
                refused = _refuse(member, archive_bytes, overlapping=overlapping, repeated=repeated)
                self._entries[member.filename.removeprefix(prefix)] = refused or ZipEntry(
                    archive=str(archive),
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

    def entries(self) -> Iterator[tuple[str, Entry]]:
        return ((name, self._entries[name]) for name in sorted(self._entries))

    def find(self, name: str) -> Entry:
        entry = self._entries.get(name.removeprefix("./"))
        if entry is None:
            raise EntryError("missing", f"no such file in {self._archive}")
        return entry


def _read_directory(archive: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(archive) as file:
            return file.infolist()
    except Exception as error:  # zipfile raises whatever its parsing stumbles over
        reason = str(error) or type(error).__name__
        raise ValueError(f"{archive} cannot be read as a zip: {reason}") from error


def _refuse(
    member: zipfile.ZipInfo, archive_bytes: int, *, overlapping: set[int], repeated: set[str]
) -> RefusedEntry | None:
    """Why a member is not to be read, by what the directory says; None if it may be."""
    name = member.filename
    if name.startswith("/") or ".." in name.split("/"):
        return RefusedEntry("outside", "the name leaves the zip")
    if name in repeated:
        return RefusedEntry("ambiguous", "the zip holds several files of this name")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.create_system == _MADE_ON_UNIX and kind not in (0, stat.S_IFREG):
        return RefusedEntry("unreadable", "not a regular file but a link or a device")
    end = member.header_offset + _LOCAL_HEADER_BYTES + member.compress_size
    if member.header_offset < 0 or end > archive_bytes:
        return RefusedEntry("damaged", "the zip's directory says it lies beyond the zip's end")
    if member.header_offset in overlapping:
        return RefusedEntry("damaged", "it shares its bytes with another file of the zip")
    return None


def _find_overlapping(members: Sequence[zipfile.ZipInfo]) -> set[int]:
    """Places of members whose packed bytes overlap: no archiver writes them, zip bombs do."""
    spans = sorted((member.header_offset, member.compress_size) for member in members)
    overlapping: set[int] = set()
    reach, reached_by = 0, -1
    for start, size in spans:
        if start < reach:
            overlapping |= {start, reached_by}
        end = start + _LOCAL_HEADER_BYTES + size
        if end > reach:
            reach, reached_by = end, start
    return overlapping
