"""IDX files, as MNIST and its kin come: train-images-idx3-ubyte and train-labels-idx1-ubyte.

Plain or as .gz. Labels are numbers, so a build wants `--class-names`. EMNIST's images are stored
on their side, which the file does not say; they are packed as they lie.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections import Counter
from pathlib import Path

from unicl_fast.images.check import MAX_SIDE
from unicl_fast.packing.sources.items import Item, Problem, Source
from unicl_fast.packing.sources.spans import PixelSpan, open_regular
from unicl_fast.packing.sources.spool import Spool

_IMAGES = b"\0\0\x08\x03"
"""Unsigned bytes in three dimensions: images, rows, columns."""
_COLOUR = b"\0\0\x08\x04"
_LABELS = b"\0\0\x08\x01"
_HEAD_BYTES = 16
"""Of a file of images: what it is, and how long its three dimensions are."""


def is_idx(path: Path) -> bool:
    """Whether a file, or what a .gz begins with, is IDX with unsigned bytes."""
    try:
        with open_regular(str(path)) as file:
            head = file.read(512)
    except OSError:
        return False
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 16)
        except zlib.error:
            return False
    return head[:4] in (_IMAGES, _COLOUR, _LABELS)


def read_idx(path: Path, spool: Spool) -> Source:
    """Reads the images of an IDX file and the labels beside it.

    Args:
        path: the images; the labels are the file with `labels` for `images` and `idx1` for
            `idx3` in its name, with or without .gz.
        spool: where a .gz is unpacked.

    Raises:
        ValueError: the files are no such pair.
        FileNotFoundError: there is no file of labels.
    """
    file, broken = _unpacked(path, spool)
    count, height, width = _read_shape(path, file)
    labels_path = _labels_of(path)
    labels_file, labels_broken = _unpacked(labels_path, spool)
    labels = _read_labels(labels_path, labels_file, count)
    size = height * width
    whole = min(count, max(0, os.stat(file).st_size - _HEAD_BYTES) // size)
    items = spool.new_items()
    for row in range(min(whole, len(labels))):
        item = Item(
            f"{path.name}:{row}",
            PixelSpan(str(file), _HEAD_BYTES + row * size, height, width, channels=1),
            labels=[labels[row]],
            place=row,
        )
        items.append(item)
    damage = [
        _damage(path.name, whole, count, broken),
        _damage(labels_path.name, len(labels), count, labels_broken),
    ]
    if any(damage):
        problem = Problem(kind="damaged", message=" and ".join(filter(None, damage)))
        items.append(Item(f"{path.name} from row {len(items)}", problem=problem))
    return Source(name=path.name, items=items, labels_are_names=False, passed_over=Counter())


def _damage(name: str, found: int, count: int, broken: str) -> str:
    """What is wrong with a file; also where all is there, but its checksum is not."""
    if found == count:
        return f"{name}: {broken}" if broken else ""
    short = f"{name} has {found:,} of the {count:,} that it declares"
    return f"{short}; {broken}" if broken else short


def _unpacked(path: Path, spool: Spool) -> tuple[Path, str]:
    with open_regular(str(path)) as file:
        if file.read(2) != b"\x1f\x8b":
            return path, ""
    return spool.gunzip(str(path))


def _read_shape(path: Path, file: Path) -> tuple[int, int, int]:
    """Number of images, their height and width."""
    with open_regular(str(file)) as opened:
        head = opened.read(_HEAD_BYTES)
    if head[:4] == _LABELS:
        raise ValueError(f"{path} holds labels; name the file with the images, its name says idx3")
    if head[:4] != _IMAGES or len(head) < _HEAD_BYTES:
        raise ValueError(f"{path} is no IDX file of grey images (unsigned bytes, 3 dimensions)")
    count, height, width = (int.from_bytes(head[at : at + 4], "big") for at in (4, 8, 12))
    if not (count and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise ValueError(f"{path} declares {count:,} images of {height:,} x {width:,} pixels")
    return count, height, width


def _labels_of(path: Path) -> Path:
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    for candidate in (name, name.removesuffix(".gz"), name + ".gz"):
        if candidate != path.name and path.with_name(candidate).is_file():
            return path.with_name(candidate)
    raise FileNotFoundError(
        errno.ENOENT, f"no file of labels beside {path}; expected {name}", str(path)
    )


def _read_labels(path: Path, file: Path, count: int) -> bytes:
    """The labels, fewer than `count` if the file is cut."""
    with open_regular(str(file)) as opened:
        head = opened.read(8)
        declared = int.from_bytes(head[4:8], "big")
        if head[:4] != _LABELS or len(head) < 8:
            raise ValueError(f"{path} is no IDX file of labels (unsigned bytes, 1 dimension)")
        if declared != count:
            raise ValueError(
                f"{path} declares {declared:,} labels for {count:,} images: they are no pair"
            )
        return opened.read(min(count, os.stat(file).st_size))
