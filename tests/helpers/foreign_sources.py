"""Makes small sources as other programs write them, and looks at what they are read as."""

from __future__ import annotations

import base64
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from unicl_fast.packing.sources.items import EntryError, Item, Source


def jpeg(number: int) -> bytes:
    """An image of 8 x 8 pixels; every number has its own."""
    pixels = np.full((8, 8, 3), (number * 7 % 256, number % 256, 200), np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels))


def base64_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> Path:
    pairs = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w") as archive:
        for name, data in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def outcomes(source: Source) -> dict[str, str]:
    """What becomes of each item: the kind of its problem, or "read"."""
    return {item.name: outcome(item) for item in source.items}


def outcome(item: Item) -> str:
    if item.problem is not None:
        return item.problem.kind
    assert item.entry is not None
    try:
        return "read" if item.entry.read() else "empty"
    except EntryError as error:
        return error.kind


def texts(source: Source) -> dict[str, tuple[list[str], list[str | int]]]:
    """Captions and labels of what has no problem."""
    return {item.name: (item.captions, item.labels) for item in source.items if not item.problem}


def read(item: Item) -> bytes:
    assert item.entry is not None
    return item.entry.read()


def python2_pickle(value: object) -> bytes:
    """The bytes that Python 2's cPickle writes with protocol 2, as CIFAR's files were made."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    if isinstance(value, dict):
        parts = b"".join(_python2(key) + _python2(entry) for key, entry in value.items())
        return b"}q\x01(" + parts + b"u"
    if isinstance(value, list):
        return b"]q\x02(" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str):
        return _python2(value.encode())
    if isinstance(value, bytes):
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    shape = b"".join(map(_python2, value.shape)) + b"\x86"
    dtype = b"cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * _python2(-1)
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
    return array + b"(K\x01" + shape + dtype + b"K\x00tb\x89" + _python2(value.tobytes()) + b"tb"


def planes(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Images [n 32 32 3] as CIFAR's rows [n 3072]: red, green, blue."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
