"""Large JSON files, read element by element."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from unicl_fast.system.untrusted_files import open_file

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HEAD = 1 << 16
_Elements = list[msgspec.Raw]


def object_head(path: Path) -> str:
    """The first 65,536 characters of a .json that is one object; "" for an array or other file."""
    if path.suffix.lower() != ".json":
        return ""
    with open_file(path, "r", encoding="utf-8-sig", errors="replace") as file:
        head = str(file.read(_HEAD))
    return "" if head.lstrip()[:1] == "[" else head


def iter_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the elements of an array as ("", element), the fields of an object as (name, value).

    A field whose value is an array yields (name, element) for each element. The file is mapped, not
    read into memory. Raises ValueError if it is not JSON, or is cut short.
    """
    try:
        with open_file(path) as file:  # the mapping lives as long as something refers to it
            text = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(text[:3]) == _BYTE_ORDER_MARK:
            text = text[3:]
        top = msgspec.json.decode(text, type=dict[str, msgspec.Raw] | _Elements)
        for name, value in top.items() if isinstance(top, dict) else [("", top)]:
            elements = value if isinstance(value, list) else [value]
            if isinstance(value, msgspec.Raw) and bytes(memoryview(value)[:1]) == b"[":
                elements = msgspec.json.decode(value, type=_Elements)
            for element in elements:  # by json, which reads integers of any length
                yield name, json.loads(bytes(element))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:  # also an empty file, which cannot be mapped
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
