"""XXH3-64 checksums: of files, of the files of a packed data set, of JSON objects.

A JSON object carries its own in the field `seal`; white space and order do not matter.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from unicl_fast.system.untrusted_files import open_file, parse_json, read_file

CHECKSUMS_NAME = "checksums.txt"
_LINE = re.compile(r"XXH3_([0-9a-f]{16})  ([^/\0]+)")
_FIELD = "seal"


def file_checksum(path: Path) -> str:
    """Computes the XXH3-64 of a file, as 16 hexadecimal digits."""
    with open_file(path, buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def format_checksums(checksums: Iterable[tuple[str, str]]) -> str:
    """Formats names and checksums as xxhsum does."""
    return "".join(f"XXH3_{checksum}  {name}\n" for name, checksum in sorted(checksums))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """Reads a data set's checksums; None if it has none. Raises as `parse_checksums`."""
    path = folder / CHECKSUMS_NAME
    return parse_checksums(read_file(path), where=str(path)) if path.is_file() else None


def parse_checksums(data: bytes, *, where: str) -> dict[str, str]:
    """Returns name -> checksum; raises ValueError, naming `where`, if the list is damaged."""
    lines = data.decode("utf-8", "replace").split("\n")
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    found = {match.group(2): match.group(1) for match in matches if match is not None}
    if lines[-1] or not found or len(found) < len(matches):
        raise ValueError(f"{where} is damaged or cut short; copy the data set again")
    return found


def compare_checksum(path: Path, found: str, checksums: dict[str, str]) -> None:
    """Raises ValueError if a file's checksum differs from the listed one, or none is listed."""
    expected = checksums.get(path.name)
    if found != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {found}, {CHECKSUMS_NAME} says "
            f"{expected or 'nothing of it'}; copy the data set again"
        )


def dump_checksummed_json(values: Mapping[str, Any]) -> str:
    """Formats a JSON object with its checksum."""
    return json.dumps({**values, _FIELD: _json_checksum(values)}, indent=1)


def parse_checksummed_json(text: bytes) -> dict[str, Any]:
    """Reads a JSON object, without its checksum; raises ValueError if it has changed."""
    values = parse_json(text, where="it")
    if not isinstance(values, dict):
        raise ValueError(f"an object is expected, not a {type(values).__name__}")
    if values.pop(_FIELD, None) != _json_checksum(values):
        raise ValueError("its content is not what was written (checksum)")
    return values


def _json_checksum(values: Mapping[str, Any]) -> str:
    # through JSON first: tuples become lists and keys strings there, before they are sorted
    plain = json.loads(json.dumps(dict(values)))
    return str(xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode("ascii")))
