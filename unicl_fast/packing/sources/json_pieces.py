"""Large JSON files, read element by element."""

import json
import mmap
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from unicl_fast.system.untrusted_files import open_file

_BYTE_ORDER_MARK = "\ufeff"
_HEAD = 1 << 16
_CLOSED_BY = {"[": "]", "{": "}"}
_BLANK = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def object_head(path: Path) -> str:
    """The first 65,536 characters of a .json that is one object; "" for an array or other file."""
    if path.suffix.lower() != ".json":
        return ""
    with open_file(path, "r", encoding="utf-8-sig", errors="replace") as file:
        head = str(file.read(_HEAD))
    return "" if head.lstrip()[:1] == "[" else head


def iter_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the elements of an array as ("", element), the fields of an object as (name, value).

    A field whose value is an array yields (name, element) for each element. Only the text and one
    element are in memory. By json, whose NaN and lone surrogates are for the row's reader to
    refuse. Raises ValueError if it is not JSON, or is cut short.
    """
    try:
        with open_file(path) as file:
            text = str(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "utf-8")
        at = _skip(text, len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0)
        if text[at : at + 1] not in _CLOSED_BY:
            raise json.JSONDecodeError("expected an array or an object", text, at)
        end = yield from _inside(text, at, "")
        if end < len(text):
            raise json.JSONDecodeError("extra data", text, end)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:  # also an empty file, which cannot be mapped
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def _inside(text: str, at: int, name: str) -> Generator[tuple[str, Any], None, int]:
    """Yields what is inside the array or object that opens at `at`; returns where it has ended."""
    close = _CLOSED_BY[text[at]]
    at = _skip(text, at + 1)
    while text[at : at + 1] != close:
        if close == "}":
            name, at = _decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] != ":" or not isinstance(name, str):
                raise json.JSONDecodeError("expected a name and a colon", text, at)
            at = _skip(text, at + 1)
        if close == "}" and text[at : at + 1] == "[":
            at = yield from _inside(text, at, name)
        else:
            value, at = _decode(text, at)
            yield name, value
            at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != close:
            raise json.JSONDecodeError(f"expected a comma or {close}", text, at)
    return _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    """The position of the next character that is not blank."""
    found = _BLANK.match(text, at)
    return found.end() if found is not None else at
