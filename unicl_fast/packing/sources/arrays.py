"""Images stored as raw arrays: CIFAR-10 and CIFAR-100 as they are downloaded, and IDX (MNIST).

CIFAR comes as Python or binary version, in a folder or a .tar.gz, which stands for its training
images; the test images are `FOLDER/test_batch`, `cifar-10-python.tar.gz/test_batch`,
`FOLDER/test.bin` and so on. IDX are pairs such as train-images-idx3-ubyte and
train-labels-idx1-ubyte, plain or as .gz. Their labels are numbers, so a build wants
`--class-names`. EMNIST's images are stored on their side, which the file does not say; they are
packed as they lie.

The Python version consists of pickles, which can call any function. `_ArrayUnpickler` knows the
three names that NumPy's arrays need and imports nothing; it runs in a process with limits on memory
and time, and gives only numbers and texts back. Pixels stay in their files.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unicl_fast.images.check import MAX_SIDE
from unicl_fast.packing.limited_processes import run_limited
from unicl_fast.packing.sources.items import (
    EntryError,
    Item,
    ListOptions,
    PixelSpan,
    Problem,
    Source,
    Span,
    open_regular,
    read_span,
)
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.tars import DamagedTarError, is_plain, iter_members

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_NAMES_BYTES = 1 << 20

_TRAIN = re.compile(r"(data_batch_\d+|train)(\.bin)?")
_TEST = re.compile(r"(test_batch|test)(\.bin)?")
_NAME_FILES = ("batches.meta", "meta", "batches.meta.txt", "fine_label_names.txt")
ARCHIVE = re.compile(r"cifar.*\.(tar|tar\.gz|tgz)", re.IGNORECASE)

_MEMORY_BYTES = 2_000_000_000
"""Ceiling for reading a pickle; CIFAR-100's takes 0.5 GB."""
_SECONDS = 60.0
"""CPU time for reading a pickle; CIFAR-100's takes 0.5 s."""


def is_cifar(names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is one of CIFAR's."""
    return any(name in names for name in _NAME_FILES) and any(
        _TRAIN.fullmatch(name) or _TEST.fullmatch(name) for name in names
    )


def is_cifar_file(path: Path) -> bool:
    """Whether a file is one of CIFAR's batches, by its name and those beside it."""
    beside = [name for name in _NAME_FILES if (path.parent / name).is_file()]
    return path.name not in beside and is_cifar([path.name, *beside])


def read_cifar(path: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads CIFAR's files as one source: a folder, an archive, or one file in either.

    `label_column` may be `coarse_labels`, for the 20 classes of CIFAR-100.
    """
    wanted = ""
    if path.is_dir():
        files = _files_of_folder(path)
    elif ARCHIVE.fullmatch(path.name):
        files = _files_of_archive(path, spool)
    else:
        wanted = path.name
        inside = path.parent.is_file()
        files = _files_of_archive(path.parent, spool) if inside else _files_of_folder(path.parent)
        if wanted not in files:
            raise FileNotFoundError(f"{path.parent} has no {wanted}; it has {sorted(files)}")
    chosen = [wanted] if wanted else sorted(name for name in files if _TRAIN.fullmatch(name))
    if not chosen:
        raise ValueError(
            f"{path} has no data_batch_1 or train; name a file of it, such as {path}/test_batch"
        )
    if options.label_column not in ("", "labels", "fine_labels", "coarse_labels"):
        raise ValueError(
            f"--label-column of CIFAR is fine_labels or coarse_labels, not {options.label_column!r}"
        )
    kind = "coarse" if options.label_column == "coarse_labels" else "fine"
    metas = [name for name in ("batches.meta", "meta") if name in files]
    pickles = [*metas, *(name for name in chosen if not name.endswith(".bin"))]
    tasks = [files[name] for name in pickles]
    read = run_limited(read_pickle, tasks, memory_bytes=_MEMORY_BYTES, seconds=_SECONDS)
    pickled = dict(zip(pickles, read, strict=True))
    names = _class_names(files, {name: pickled[name] for name in metas}, kind)
    items = spool.new_items()
    for name in chosen:
        if name in pickled:
            items.extend(_read_python(name, files[name], pickled[name], names, kind))
        else:
            items.extend(_read_binary(name, files[name], names, kind))
    left = sum(1 for name in files if _TEST.fullmatch(name) and name not in chosen)
    return Source(
        name=path.name or str(path),
        items=items,
        labels_are_names=bool(names),
        passed_over=Counter({"files of test images": left} if left and not wanted else {}),
    )


def _files_of_folder(folder: Path) -> dict[str, Span]:
    return {
        path.name: Span(str(path), 0, path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def _files_of_archive(archive: Path, spool: Spool) -> dict[str, Span]:
    path, broken = str(archive), ""
    if not archive.name.lower().endswith(".tar"):
        unpacked, broken = spool.gunzip(path)
        path = str(unpacked)
    files = {}
    try:
        with open_regular(path) as file:
            for member in iter_members(file):
                if is_plain(member):
                    name = member.name.rpartition("/")[2]
                    files[name] = Span(path, member.offset_data, member.size)
    except DamagedTarError as error:
        # the files of CIFAR are few and large: what a cut archive has left is not the data set
        raise ValueError(f"{archive} is damaged: {broken or error}; fetch it again") from error
    if broken:
        raise ValueError(f"{archive} is damaged: {broken}; fetch it again")
    return files


def _class_names(
    files: Mapping[str, Span], pickled: Mapping[str, Fields | Problem], kind: str
) -> tuple[str, ...]:
    """Returns the names of the classes, if a file has them."""
    for name in ("batches.meta.txt", f"{kind}_label_names.txt"):
        if name in files:
            at = files[name]
            text = read_span(at.path, at.offset, min(at.num_bytes, _MAX_NAMES_BYTES))
            return tuple(text.decode("utf-8", "replace").split("\n\n")[0].split())
    for name, fields in pickled.items():
        if isinstance(fields, Problem):
            raise ValueError(f"{name} of CIFAR cannot be read: {fields.message}")
        names = fields.get("label_names") or fields.get(f"{kind}_label_names") or []
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(map(str, names))
    return ()


def _read_python(
    name: str, at: Span, fields: Fields | Problem, names: tuple[str, ...], kind: str
) -> Iterator[Item]:
    """Yields the items of a pickled batch, or the one that says why it cannot be read."""
    batch = fields if isinstance(fields, Problem) else _check_batch(fields, kind)
    if isinstance(batch, Problem):
        yield Item(f"{name} from row 0", problem=batch)
        return
    start, labels = at.offset + batch[0], batch[1]
    for row, label in enumerate(labels):
        yield _item(name, row, at.path, start + row * _PIXELS, label, names)


def _check_batch(fields: Fields, kind: str) -> tuple[int, list[int | str]] | Problem:
    """Returns the offset of a batch's pixels, and its labels; or what is missing."""
    data = fields.get("data")
    if not isinstance(data, PickledArray):
        return Problem("damaged", "it has no array called `data`")
    if len(data.shape) != 2 or data.shape[1] != _PIXELS or data.dtype != "|u1":
        found = f"{data.dtype} of shape {data.shape}"
        return Problem("damaged", f"`data` is {found}, where CIFAR has bytes of N x {_PIXELS}")
    if data.offset < 0:
        message = "`data` is stored column by column or encoded, where CIFAR has rows of bytes"
        return Problem("damaged", message)
    labels = fields.get(f"{kind}_labels", fields.get("labels"))
    if not isinstance(labels, list) or len(labels) != data.shape[0]:
        return Problem("damaged", f"it has no list of {data.shape[0]:,} labels")
    return data.offset, labels


def _read_binary(name: str, at: Span, names: tuple[str, ...], kind: str) -> Iterator[Item]:
    of_100 = name in ("train.bin", "test.bin")
    label_bytes = 2 if of_100 else 1  # of CIFAR-100 the coarse label comes first
    which = 1 if of_100 and kind == "fine" else 0
    record = label_bytes + _PIXELS
    count, rest = divmod(at.num_bytes, record)
    with open_regular(at.path) as file:
        for row in range(count):
            start = at.offset + row * record
            file.seek(start)
            label = file.read(label_bytes)[which]
            yield _item(name, row, at.path, start + label_bytes, label, names)
    if rest:
        problem = Problem("damaged", f"the file ends {rest:,} bytes into a record of {record:,}")
        yield Item(f"{name} from row {count}", problem=problem)


def _item(
    name: str, row: int, path: str, offset: int, label: int | str, names: tuple[str, ...]
) -> Item:
    """Makes the item of a row with the number or name of its class.

    A number beyond the names is the item's problem, and so is a text, which is shown.
    """
    span = PixelSpan(path, offset, _SIDE, _SIDE, 3, True)
    item = Item(f"{name}:{row}", span, position=row)
    if isinstance(label, str):
        message = f"the label is {label:.100}, not a number"
    elif names and not 0 <= label < len(names):
        message = f"label {label}, where there are {len(names)} class names"
    else:
        item.labels = [names[label] if names else label]
        return item
    item.problem = Problem("bad row", message)
    return item


@dataclass(frozen=True, slots=True)
class PickledArray:
    """An array in a pickle, without its values."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    """The offset of its first value in the pickle; -1 if values do not lie there row by row."""


Fields = dict[str, PickledArray | list[int | str]]

_EMPTY = np.empty(0, np.uint8)
_KNOWN = {
    **dict.fromkeys(
        [("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")],
        _EMPTY.__reduce_ex__(2)[0],
    ),
    **dict.fromkeys(
        [("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer")],
        _EMPTY.__reduce_ex__(5)[0],
    ),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _RefusedError(ValueError):
    """The pickle asks for more than arrays."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        asked = f"{module}.{name}"
        raise _RefusedError(
            f"the pickle asks for {asked!r:.200}; only arrays of numpy are read, and nothing else "
            "is called"
        )


def read_pickle(at: Span) -> Fields | Problem:
    """Returns the arrays and lists of a pickled dict, or why it is refused.

    It is called in a limited process. Texts may be stored as bytes. A value of a list that is
    neither an int nor a text becomes a text.
    """
    try:
        data = read_span(at.path, at.offset, at.num_bytes)
        found = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except MemoryError:
        raise
    except (_RefusedError, EntryError) as error:
        return Problem("damaged", str(error))
    except Exception as error:  # a broken pickle can make anything stumble
        return Problem("damaged", f"the pickle is broken: {error!s:.300}")
    if not isinstance(found, dict):
        return Problem("damaged", "the pickle is no dict")
    fields: Fields = {}
    for key, value in found.items():
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            offset = data.find(value.tobytes()) if value.flags.c_contiguous else -1
            fields[str(_plain(key))] = PickledArray(value.shape, value.dtype.str, offset)
        elif isinstance(value, list):
            fields[str(_plain(key))] = [_plain(each) for each in value]
    return fields


def _plain(value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, str) else repr(value)[:100]


_IDX_IMAGES = b"\0\0\x08\x03"
"""Unsigned bytes in three dimensions: images, rows, columns."""
_IDX_COLOUR = b"\0\0\x08\x04"
_IDX_LABELS = b"\0\0\x08\x01"
_IDX_HEADER_BYTES = 16
"""Bytes before the images: what they are, and how long their three dimensions are."""


def is_idx(path: Path) -> bool:
    """Whether a file is IDX with unsigned bytes, plain or as .gz."""
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
    return head[:4] in (_IDX_IMAGES, _IDX_COLOUR, _IDX_LABELS)


def read_idx(path: Path, spool: Spool) -> Source:
    """Reads the images of an IDX file and the labels beside it.

    These are the file with `labels` for `images` and `idx1` for `idx3` in its name, with or without
    .gz.
    """
    file, broken = _unpack_if_needed(path, spool)
    count, height, width = _read_shape(path, file)
    labels_path = _labels_of(path)
    labels_file, labels_broken = _unpack_if_needed(labels_path, spool)
    labels = _read_labels(labels_path, labels_file, count)
    size = height * width
    whole = min(count, max(0, os.stat(file).st_size - _IDX_HEADER_BYTES) // size)
    items = spool.new_items()
    for row, label in enumerate(labels[:whole]):
        span = PixelSpan(str(file), _IDX_HEADER_BYTES + row * size, height, width, channels=1)
        items.append(Item(f"{path.name}:{row}", span, labels=[label], position=row))
    damage = [
        _shortage(path.name, whole, count, broken),
        _shortage(labels_path.name, len(labels), count, labels_broken),
    ]
    if any(damage):
        problem = Problem("damaged", " and ".join(filter(None, damage)))
        items.append(Item(f"{path.name} from row {len(items)}", problem=problem))
    return Source(name=path.name, items=items, labels_are_names=False)


def _shortage(name: str, found: int, count: int, broken: str) -> str:
    """Returns what is wrong with a file, or nothing; all rows may be there without a checksum."""
    if found == count:
        return f"{name}: {broken}" if broken else ""
    short = f"{name} has {found:,} of the {count:,} that it declares"
    return f"{short}; {broken}" if broken else short


def _unpack_if_needed(path: Path, spool: Spool) -> tuple[Path, str]:
    with open_regular(str(path)) as file:
        if file.read(2) != b"\x1f\x8b":
            return path, ""
    return spool.gunzip(str(path))


def _read_shape(path: Path, file: Path) -> tuple[int, int, int]:
    """Returns the number of images, their height and width."""
    with open_regular(str(file)) as opened:
        head = opened.read(_IDX_HEADER_BYTES)
    if head[:4] == _IDX_LABELS:
        raise ValueError(f"{path} holds labels; name the file with the images, its name says idx3")
    if head[:4] != _IDX_IMAGES or len(head) < _IDX_HEADER_BYTES:
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
    """Returns the labels, fewer than `count` if the file is cut."""
    with open_regular(str(file)) as opened:
        head = opened.read(8)
        declared = int.from_bytes(head[4:8], "big")
        if head[:4] != _IDX_LABELS or len(head) < 8:
            raise ValueError(f"{path} is no IDX file of labels (unsigned bytes, 1 dimension)")
        if declared != count:
            raise ValueError(
                f"{path} declares {declared:,} labels for {count:,} images: they are no pair"
            )
        return opened.read(min(count, os.stat(file).st_size))
