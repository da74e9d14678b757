"""Images that are a stretch of a larger file: members of tars, lines of a TSV, rows of pixels.

Each is a place in a file and nothing else, so a worker reads it with one seek, knows nothing of the
format that holds it, and needs no library for it.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unicl_fast.packing.sources.entries import MAX_FILE_BYTES, EntryError, check_file_size


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of bytes in a file, which are the image's file."""

    path: str
    offset: int
    num_bytes: int

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        return read_span(self.path, self.offset, self.num_bytes)


@dataclass(frozen=True, slots=True)
class Base64Span:
    """A stretch of a text file, which is an image's file in base64 (RFC 4648, with padding)."""

    path: str
    offset: int
    num_characters: int

    @property
    def num_bytes(self) -> int:
        return self.num_characters // 4 * 3

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        try:
            text = read_span(self.path, self.offset, self.num_characters)
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise EntryError("damaged", f"not base64: {error}") from error


@dataclass(frozen=True, slots=True)
class PixelSpan:
    """A stretch of bytes that are the pixels themselves; read as a PNG of exactly these pixels."""

    path: str
    offset: int
    height: int
    width: int
    channels: int
    """1 (grey) or 3 (RGB)."""
    planar: bool = False
    """Whether all of red comes first, then green, then blue."""

    @property
    def num_bytes(self) -> int:
        return self.height * self.width * self.channels

    def read(self, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        check_file_size(self.num_bytes, max_bytes)
        data = read_span(self.path, self.offset, self.num_bytes)
        if self.planar:
            planes = np.frombuffer(data, np.uint8).reshape(self.channels, self.height, self.width)
            data = planes.transpose(1, 2, 0).tobytes()
        mode = "L" if self.channels == 1 else "RGB"
        file = io.BytesIO()
        Image.frombytes(mode, (self.width, self.height), data).save(file, format="PNG")
        return file.getvalue()


def read_span(path: str, offset: int, num_bytes: int) -> bytes:
    """Exactly these bytes of a regular file.

    Raises:
        EntryError: they cannot be had.
    """
    try:
        with open_regular(path) as file:
            file.seek(offset)
            data = file.read(num_bytes)
    except OSError as error:
        raise EntryError("unreadable", error.strerror or str(error)) from error
    if len(data) < num_bytes:
        raise EntryError("damaged", f"{path} has shrunk since it was listed")
    return data


def open_regular(path: str) -> io.BufferedReader:
    """Opens a regular file, and nothing else.

    Opening a device can do things (a tape rewinds), so it is looked at first; and again when it is
    open, since it may be another file by then. Not blocking: a pipe that lies among images must
    not stop the program.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    _require_regular(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    file = open(descriptor, "rb")  # noqa: SIM115
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        file.close()
        raise
    return file


def _require_regular(status: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{path} is not a regular file")
