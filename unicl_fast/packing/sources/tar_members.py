"""What a tar holds and where, by its headers alone (POSIX ustar and pax, GNU long names).

Python's tarfile keeps an object a member for the life of the archive, reads extended headers of any
size into memory, and takes a cut archive for a whole one in some places. Here a member is a name
and a place, headers have limits, and an archive that is cut or damaged gives what comes before.
Nothing is ever written under a name found in a tar.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_MAX_EXTENDED = 1 << 20
"""Bytes of an extended header; a path has 4,096."""
_REGULAR = (b"0", b"\0", b"7")
_FOLDER = b"5"
_GNU_LONG_NAME, _GNU_LONG_LINK = b"L", b"K"
_PAX, _PAX_FOR_ALL = b"x", b"g"
_PADDING = 1 << 20
"""How far behind the end mark more members are looked for; GNU tar pads to 10,240 bytes."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    header: int
    """Where its (first) header begins."""
    offset: int
    num_bytes: int
    is_regular: bool
    """Not a link, device or the like."""


class DamagedTarError(ValueError):
    """The archive cannot be read further; members yielded before are whole."""

    def __init__(self, message: str, *, offset: int) -> None:
        super().__init__(message)
        self.offset = offset
        """First byte that is not understood."""


def iter_members(file: BinaryIO) -> Iterator[Member]:
    """Yields the files of a tar in order; folders are left out.

    Archives joined end to end (`cat a.tar b.tar`) are read through.

    Raises:
        DamagedTarError: the rest cannot be read, or is not there.
        OSError: the storage fails.
    """
    end = os.fstat(file.fileno()).st_size
    at = 0
    while True:
        extended: dict[str, str] = {}
        first = at
        while True:  # extended headers come before the member they speak of
            block = _read_block(file, at, end, first)
            if not any(block):
                following = _behind_end_mark(file, at, end)
                if following is None:
                    return
                at = first = following
                continue
            size = _check_header(block, at, first)
            kind = block[156:157]
            data = at + BLOCK
            if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_FOR_ALL):
                text = _read_extended(file, data, size, end, first)
                extended |= _parse_extended(kind, text, first)
                at = data + _padded(size)
                continue
            break
        if "size" in extended:  # of a member beyond 8 GB
            size = _number(extended["size"], first)
        if data + size > end:
            raise DamagedTarError(
                f"the archive ends in the middle of a file of {size:,} bytes", offset=first
            )
        if kind != _FOLDER:
            yield Member(
                name=extended.get("path") or _plain_name(block),
                header=first,
                offset=data,
                num_bytes=size,
                is_regular=kind in _REGULAR and "sparse" not in extended,
            )
        at = data + _padded(size)


def _read_block(file: BinaryIO, at: int, end: int, first: int) -> bytes:
    if at + BLOCK > end:
        raise DamagedTarError("the archive ends without its end mark", offset=first)
    file.seek(at)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise DamagedTarError("the archive has shrunk", offset=first)
    return block


def _check_header(block: bytes, at: int, first: int) -> int:
    """The size a header declares."""
    # the sum is over the header with blanks in its own place; some old tars sum signed bytes
    stated = block[148:156].strip(b" \0")
    try:
        expected = int(stated, 8)
    except ValueError:
        expected = -1
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    if expected not in (unsigned, signed):
        raise DamagedTarError(f"no header of a file at byte {at:,}", offset=first)
    size = block[124:136]
    if size[0] & 0x80:  # GNU: a binary number, for more than 8 GB
        number = int.from_bytes(size, "big") & ~(0x80 << 88)
        if size[0] & 0x40 or number >= 1 << 62:
            raise DamagedTarError(f"an absurd size at byte {at:,}", offset=first)
        return number
    try:
        return int(size.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise DamagedTarError(f"no size in the header at byte {at:,}", offset=first) from error


def _behind_end_mark(file: BinaryIO, at: int, end: int) -> int | None:
    """Where another archive begins behind this one's end; None if only padding follows."""
    file.seek(at)
    padding = file.read(_PADDING)
    rest = padding.lstrip(b"\0")
    if not rest:
        return None
    return at + (len(padding) - len(rest)) // BLOCK * BLOCK


def _read_extended(file: BinaryIO, data: int, size: int, end: int, first: int) -> bytes:
    if size > _MAX_EXTENDED:
        raise DamagedTarError(f"a header of {size:,} bytes", offset=first)
    if data + size > end:
        raise DamagedTarError("the archive ends in the middle of a header", offset=first)
    file.seek(data)
    return file.read(size)


def _parse_extended(kind: bytes, text: bytes, first: int) -> dict[str, str]:
    if kind == _GNU_LONG_NAME:
        return {"path": _decode(text.split(b"\0", 1)[0])}
    if kind != _PAX:
        return {}
    found = {}
    while text.strip(b"\0"):
        # "<length> <key>=<value>\n", the length counting all of that
        number, _, _ = text.partition(b" ")
        length = _number(number.decode("ascii", "replace"), first)
        record = text[len(number) + 1 : length]
        key, equals, value = record.partition(b"=")
        if not equals or length <= len(number) + 1 or length > len(text):
            raise DamagedTarError("an extended header is broken", offset=first)
        if key in (b"path", b"size"):
            found[key.decode()] = _decode(value.removesuffix(b"\n"))
        elif key.startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        text = text[length:]
    return found


def _number(text: str, first: int) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise DamagedTarError("an extended header is broken", offset=first)
    return int(text)


def _plain_name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # GNU tar, with "ustar  ", has other things there
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _decode(name)


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
