"""JSON files that may be larger than memory, read element by element."""

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
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _JsonWindow(file).top()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error


class _JsonWindow:
    """Part of a JSON text, which moves forwards through it.

    ijson, with its parser in C, takes 5.6 s for 154 MB of COCO's instances where this takes 1.7 s
    (it reads the file once for each of the three arrays; its events are no faster). It also holds
    an element of any length, and refuses NaN and integers of more than 64 bits, which cost only
    their row here.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._before = 0
        """Characters of the file before the window."""
        self._ended = False

    def top(self) -> Iterator[tuple[str, Any]]:
        opening = self._peek()
        if opening not in ("[", "{"):
            raise ValueError(f"it begins with {opening!r}, not with [ or {{")
        yield from self._array("") if opening == "[" else self._object()
        if rest := self._peek():
            raise ValueError(f"{rest!r} follows where it should end")

    def _object(self) -> Iterator[tuple[str, Any]]:
        for _ in self._between("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                raise ValueError(f"a field's name at character {self._position:,} is no text")
            self._take(":")
            if self._peek() == "[":
                yield from self._array(name)
            else:
                yield name, self._value()

    def _array(self, name: str) -> Iterator[tuple[str, Any]]:
        for _ in self._between("[", "]"):
            yield name, self._value()

    def _between(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each entry between brackets, which the caller then reads."""
        self._take(opening)
        if self._peek() == closing:
            self._take(closing)
            return
        yield
        while self._take(f",{closing}") == ",":
            yield

    def _value(self) -> Any:
        """Reads the next value as a whole."""
        self._peek()
        wanted = _BLOCK
        while True:
            is_all = self._ended or len(self._text) - self._at > MAX_ELEMENT
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except ValueError as error:  # not JSON, or more digits than Python converts
                if is_all:
                    position = self._before + getattr(error, "pos", self._at)
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"at character {position:,}: {reason}") from error
            else:
                # a number at the end of the window, as 1 or 1. may be, can continue after it
                if is_all or self._text[end : end + 1] in _BEHIND_VALUES:
                    self._at = end
                    return value
            self._more(wanted)
            wanted *= 2  # so that a long element is not tried again at every block

    def _take(self, characters: str) -> str:
        """Reads the next character that is no blank, which must be one of these."""
        found = self._peek()
        self._at += len(found)
        if not found or found not in characters:
            wanted, found = " or ".join(characters), repr(found) if found else "the end"
            raise ValueError(f"at character {self._position:,}: {found} where {wanted} should be")
        return found

    def _peek(self) -> str:
        """Returns the next character that is no blank, or nothing at the end."""
        while True:
            if found := _NO_BLANK.search(self._text, self._at):
                self._at = found.start()
                return found.group()
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more(_BLOCK)

    def _more(self, num_characters: int) -> None:
        self._before += self._at
        read = self._file.read(num_characters)
        self._text = self._text[self._at :] + read
        self._at = 0
        self._ended = not read

    @property
    def _position(self) -> int:
        return self._before + self._at
