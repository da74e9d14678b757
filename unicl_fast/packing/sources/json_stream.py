"""JSON files larger than memory, element by element.

COCO's instances are half a gigabyte of text and take several as Python objects; of each annotation
two numbers are wanted. So the arrays at the top of a file are walked without being held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_BLOCK = 1 << 20
MAX_ELEMENT = 64 << 20
"""Characters of one element, twice which may be held. The outline of a crowd takes some 100,000."""

_decoder = json.JSONDecoder()
_BEHIND_VALUES = frozenset(" \t\r\n,]}:")
_NO_BLANK = re.compile(r"[^ \t\r\n]")


def iter_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields what a JSON file holds, in pieces.

    An array at the top gives its elements, each as ("", element). An object gives for each of its
    fields (name, value), and where the value is an array (name, element) for each element of it.

    Raises:
        ValueError: it is not JSON, or is cut short; what came before has been yielded.
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _Reader(file).top()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error


def first_character(path: Path) -> str:
    """The first character that is no blank: `[` or `{` in files that are read here."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1]


class _Reader:
    """A window on the text, which moves on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._passed = 0
        self._ended = False

    def top(self) -> Iterator[tuple[str, Any]]:
        opening = self._next()
        if opening == "[":
            yield from self._array("")
        elif opening == "{":
            yield from self._object()
        else:
            raise ValueError(f"it begins with {opening!r}, not with [ or {{")
        if rest := self._peek():
            raise ValueError(f"{rest!r} follows where it should end")

    def _object(self) -> Iterator[tuple[str, Any]]:
        if self._peek() == "}":
            self._next()
            return
        while True:
            name = self._value()
            if not isinstance(name, str):
                raise ValueError(f"a field's name at character {self._place:,} is no text")
            self._expect(":")
            if self._peek() == "[":
                self._next()
                yield from self._array(name)
            else:
                yield name, self._value()
            if self._expect(",}") == "}":
                return

    def _array(self, name: str) -> Iterator[tuple[str, Any]]:
        if self._peek() == "]":
            self._next()
            return
        while True:
            yield name, self._value()
            if self._expect(",]") == "]":
                return

    def _value(self) -> Any:
        """The next value, read in full."""
        self._peek()
        wanted = _BLOCK
        while True:
            is_all = self._ended or len(self._text) - self._at > MAX_ELEMENT
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if is_all:
                    place = self._passed + error.pos
                    raise ValueError(f"at character {place:,}: {error.msg}") from error
            except ValueError as error:  # a number of more digits than Python converts
                if is_all:
                    raise ValueError(f"at character {self._place:,}: {error}") from error
            else:
                # a number at the end of the window, as 1 or 1. may be, can go on behind it
                if is_all or self._text[end : end + 1] in _BEHIND_VALUES:
                    self._at = end
                    return value
            self._more(wanted)
            wanted *= 2  # so that a long element is not tried again at every block

    def _expect(self, characters: str) -> str:
        found = self._next()
        if not found or found not in characters:
            wanted = " or ".join(characters)
            raise ValueError(
                f"at character {self._place:,}: {found!r} where {wanted} should be"
                if found
                else f"it ends at character {self._place:,}, where {wanted} should be"
            )
        return found

    def _next(self) -> str:
        found = self._peek()
        self._at += len(found)
        return found

    def _peek(self) -> str:
        """The next character that is no blank, or nothing at the end."""
        while True:
            if found := _NO_BLANK.search(self._text, self._at):
                self._at = found.start()
                return found.group()
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more(_BLOCK)

    def _more(self, num_characters: int) -> None:
        self._passed += self._at
        read = self._file.read(num_characters)
        self._text = self._text[self._at :] + read
        self._at = 0
        self._ended = not read

    @property
    def _place(self) -> int:
        return self._passed + self._at
