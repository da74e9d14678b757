"""Files in folders that others can have made: opened without surprises, read within limits."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, ClassVar

from unicl_fast.system.wording import shorten

MOST_BYTES = 64 << 20
"""Largest file of settings: a manifest of 400,000 shards, or a list of a million classes."""
_MOST_YAML_BYTES = 256 << 10  # PyYAML needs some 20 s for a megabyte
_MOST_YAML_VALUES = 100_000
"""Limit of values with all aliases expanded: nine lines can mean a billion."""
_MOST_DEPTH = 100  # limit of nested objects and lists, which are read recursively
_BLOCK_BYTES = 1 << 20
_YAML_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
YAML_FLOAT = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z")

AnyPath = str | os.PathLike[str]


class NotRegularError(OSError):
    """A link, a pipe, a device or a folder instead of a regular file."""


def open_regular(path: AnyPath, flags: int = os.O_RDONLY, *, mode: int = 0o666) -> tuple[int, int]:
    """Opens a regular file; returns its descriptor and size. Does not wait for pipes.

    A link is followed only for reading: who made the folder must not choose the file to overwrite.

    Raises:
        NotRegularError: it is not a regular file; it is not opened.
        OSError: it cannot be opened.
    """
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    kind = stat.S_IFREG
    # checked first, because opening a device can have effects (a tape rewinds), and again once it
    # is open, when it can be another file
    try:
        kind = (os.lstat if writes else os.stat)(path).st_mode
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    if stat.S_ISREG(kind):
        flags |= os.O_NONBLOCK | os.O_NOCTTY | (os.O_NOFOLLOW if writes else 0)
        descriptor = os.open(path, flags, mode)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return descriptor, status.st_size
        os.close(descriptor)
    if stat.S_ISLNK(kind):
        raise NotRegularError(
            f"{path} is a link, through which nothing is written: remove it if you did not make "
            "it, or name another folder"
        )
    raise NotRegularError(f"{path} is not a regular file")


def open_file(path: AnyPath, mode: str = "rb", **options: Any) -> Any:
    """Opens a file as `open` does, but by `open_regular`."""
    return open(path, mode, opener=lambda name, flags: open_regular(name, flags)[0], **options)


def read_file(path: AnyPath, *, most_bytes: int = MOST_BYTES, piped: bool = False) -> bytes:
    """Reads a regular file or, if `piped`, a pipe.

    Raises:
        OSError: as `open_regular`.
        ValueError: there are more than `most_bytes`.
    """
    parts, left = list[bytes](), most_bytes
    with open(path, "rb") if piped else open_file(path) as file:
        while data := file.read(_BLOCK_BYTES):
            parts.append(data)
            left -= len(data)
            if left < 0:
                raise ValueError(f"{path} is too large: at most {most_bytes:,} bytes are read")
    return b"".join(parts)


def read_text(path: AnyPath) -> str:
    """Reads a text in UTF-8, with or without a byte order mark; raises as `read_file`."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file in UTF-8: {error}") from error


def read_json(path: AnyPath) -> Any:
    """Reads a file by `parse_json`; raises as `read_file` too."""
    return parse_json(read_file(path), where=str(path))


def parse_json(data: bytes | str, *, where: str) -> Any:
    """Parses JSON, `Infinity` included; raises ValueError, also if an object has a name twice."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return _refuse_deep(values, where)


def parse_yaml(data: bytes, *, where: str) -> Any:
    """Parses YAML by the core schema of version 1.2, which agrees with JSON.

    `off` is a text and 1e-3 a number; in PyYAML's version 1.1 it is the other way round. Raises
    ValueError, also if a mapping has a name twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _without_repeats([(str(name.value), None) for name, _ in node.value])
            return super().construct_mapping(node, deep)

    for tag, pattern, first in (
        ("bool", re.compile(r"([tT]rue|[fF]alse|TRUE|FALSE)\Z"), "tTfF"),
        ("null", re.compile(r"(null|~|)\Z"), ["n", "~", ""]),
        ("int", _YAML_INT, "-+0123456789"),
        ("float", YAML_FLOAT, "-+.0123456789"),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, list(first))
    if len(data) > _MOST_YAML_BYTES:
        raise ValueError(f"{where} is too large: at most {_MOST_YAML_BYTES:,} bytes of YAML")
    try:
        loader = Loader(data)
        root = loader.get_single_node()
        if root is not None and _count_values(root, {}) > _MOST_YAML_VALUES:
            raise ValueError(f"its aliases mean more than {_MOST_YAML_VALUES:,} values")
        values = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    except Exception as error:  # several types, for `!!int ''`, `!!bool x`, `!!timestamp x`
        reason = f"a value is not what its tag says ({error!r})"
        raise ValueError(f"{where} is not YAML: {reason}") from error
    return _refuse_deep(values, where)


@contextlib.contextmanager
def reading_table(path: AnyPath, *, delimiter: str = ",") -> Iterator[csv.DictReader[str]]:
    """Yields the rows of a CSV file; faults raise ValueError within the context."""
    csv.field_size_limit(1 << 17)  # Python's default, which packing raises for its texts
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        yield rows
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}, is not CSV: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses repeated names, which JSON allows and readers treat differently."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a name stands twice among {shorten([name for name, _ in pairs])}")
    return values


def _refuse_deep(values: Any, where: str) -> Any:
    level = [values]
    for _ in range(_MOST_DEPTH + 1):
        holders = [one for one in level if isinstance(one, dict | list)]
        if not holders:
            return values
        inside = (one.values() if isinstance(one, dict) else one for one in holders)
        level = [value for holder in inside for value in holder]
    raise ValueError(f"{where} is nested more than {_MOST_DEPTH} levels deep")


def _count_values(node: Any, counts: dict[int, float]) -> float:
    """Counts the values of a node with aliases expanded; inf if it contains itself."""
    if id(node) not in counts:
        counts[id(node)] = float("inf")
        inside = node.value if isinstance(node.value, list) else []
        children = [one for each in inside for one in (each if isinstance(each, tuple) else [each])]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]
