"""Checksums of files: XXH3-64, and the list of them that a packed data set carries.

The list stands beside the manifest, in a file that readers of earlier versions pass over: a data
set without it is read too, but damage to its arrays can then be found only where it contradicts
itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import xxhash

CHECKSUMS_NAME = "checksums.txt"
_LINE = re.compile(r"XXH3_([0-9a-f]{16})  ([^/\0]+)")
_BLOCK_BYTES = 1 << 18  # stays in the cache


def file_checksum(path: Path) -> str:
    """XXH3-64 of a file, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def format_checksums(checksums: Iterable[tuple[str, str]]) -> str:
    """The text of a list, of names and checksums, in the form of the program xxhsum."""
    return "".join(f"XXH3_{checksum}  {name}\n" for name, checksum in sorted(checksums))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Checksum of each file that a data set lists; None where it has no list.

    Raises:
        ValueError: the list is damaged.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return None
    return parse_checksums(path.read_bytes(), where=str(path))


def parse_checksums(data: bytes, *, where: str) -> dict[str, str]:
    """Checksum of each file in a list; `where` names the list in messages.

    Raises:
        ValueError: the list is damaged.
    """
    lines = data.decode("utf-8", "replace").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    found = {match.group(2): match.group(1) for match in matches if match is not None}
    if lines[-1] or not found or len(found) < len(matches):
        raise ValueError(f"{where} is damaged or cut short; copy the data set again")
    return found


def compare_checksum(path: Path, found: str, checksums: dict[str, str]) -> None:
    """Refuses a file whose checksum is not the listed one.

    Raises:
        ValueError: it differs, or is not listed.
    """
    expected = checksums.get(path.name)
    if found != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {found}, {CHECKSUMS_NAME} says "
            f"{expected or 'nothing of it'}; copy the data set again"
        )
