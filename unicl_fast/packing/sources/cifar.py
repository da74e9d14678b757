"""CIFAR-10 and CIFAR-100 as they are downloaded: Python or binary version, folder or .tar.gz.

A folder or an archive stands for its training images; the test images are
`FOLDER/test_batch`, `cifar-10-python.tar.gz/test_batch`, `FOLDER/test.bin` and so on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unicl_fast.packing.sources.items import Item, Label, ListOptions, Problem, Source
from unicl_fast.packing.sources.pickled_arrays import (
    LongString,
    PickledArray,
    PickleRefusedError,
    read_pickle,
)
from unicl_fast.packing.sources.spans import PixelSpan, Span, open_regular, read_span
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.tar_members import DamagedTarError, iter_members

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_NAMES_BYTES = 1 << 20

_TRAIN = re.compile(r"(data_batch_\d+|train)(\.bin)?")
_TEST = re.compile(r"(test_batch|test)(\.bin)?")
_NAMES_OF_100 = ("meta", "fine_label_names.txt")
_NAMES_OF_10 = ("batches.meta", "batches.meta.txt")
ARCHIVE = re.compile(r"cifar.*\.(tar|tar\.gz|tgz)", re.IGNORECASE)


def is_cifar(names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is one of CIFAR's."""
    return any(name in names for name in (*_NAMES_OF_10, *_NAMES_OF_100)) and any(
        _TRAIN.fullmatch(name) or _TEST.fullmatch(name) for name in names
    )


def is_cifar_file(path: Path) -> bool:
    """Whether a file is one of CIFAR's batches, by its name and those beside it."""
    if not (_TRAIN.fullmatch(path.name) or _TEST.fullmatch(path.name)):
        return False
    return any((path.parent / name).is_file() for name in (*_NAMES_OF_10, *_NAMES_OF_100))


def read_cifar(place: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads CIFAR's files as one source.

    Args:
        place: a folder, an archive, or one file in either.
        options: `label_column` may be `coarse_labels`, for the 20 classes of CIFAR-100.
        spool: where a .tar.gz is unpacked.

    Raises:
        ValueError: there is nothing of CIFAR in it.
        FileNotFoundError: the file is not there.
    """
    wanted = ""
    if place.is_dir():
        files = _files_of_folder(place)
    elif ARCHIVE.fullmatch(place.name):
        files = _files_of_archive(place, spool)
    else:
        wanted = place.name
        inside = place.parent.is_file()
        files = _files_of_archive(place.parent, spool) if inside else _files_of_folder(place.parent)
        if wanted not in files:
            raise FileNotFoundError(f"{place.parent} has no {wanted}; it has {sorted(files)}")
    chosen = [wanted] if wanted else sorted(name for name in files if _TRAIN.fullmatch(name))
    if not chosen:
        raise ValueError(
            f"{place} has no data_batch_1 or train; name a file of it, such as {place}/test_batch"
        )
    coarse = _wants_coarse(options.label_column)
    names = _class_names(files, coarse=coarse)
    items = spool.new_items()
    for name in chosen:
        read = _read_binary if name.endswith(".bin") else _read_python
        items.extend(read(name, files, names, coarse))
    left = sum(1 for name in files if _TEST.fullmatch(name) and name not in chosen)
    return Source(
        name=place.name or str(place),
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
                if member.is_regular:
                    name = member.name.rpartition("/")[2]
                    files[name] = Span(path, member.offset, member.num_bytes)
    except DamagedTarError as error:
        # the files of CIFAR are few and large: what a cut archive has left is not the data set
        raise ValueError(f"{archive} is damaged: {broken or error}; fetch it again") from error
    if broken:
        raise ValueError(f"{archive} is damaged: {broken}; fetch it again")
    return files


def _wants_coarse(column: str) -> bool:
    if column in ("", "fine_labels", "labels"):
        return False
    if column == "coarse_labels":
        return True
    raise ValueError(f"--label-column of CIFAR is fine_labels or coarse_labels, not {column!r}")


def _class_names(files: Mapping[str, Span], *, coarse: bool) -> tuple[str, ...]:
    """The names of the classes, if a file has them."""
    kind = "coarse" if coarse else "fine"
    for name in ("batches.meta.txt", f"{kind}_label_names.txt"):
        if name in files:
            at = files[name]
            text = read_span(at.path, at.offset, min(at.num_bytes, _MAX_NAMES_BYTES))
            return tuple(text.decode("utf-8", "replace").split("\n\n")[0].split())
    for name in ("batches.meta", "meta"):
        if name in files:
            try:
                fields = _unpickle(files[name])
                names = fields.get("label_names") or fields.get(f"{kind}_label_names") or []
            except PickleRefusedError as error:
                raise ValueError(f"{name} of CIFAR cannot be read: {error}") from error
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return tuple(names)
    return ()


def _unpickle(at: Span) -> dict[str, Any]:
    with open_regular(at.path) as file:
        fields = read_pickle(file, at.offset, at.num_bytes)
    if not isinstance(fields, dict):
        raise PickleRefusedError("the pickle is no dict")
    return fields


def _read_python(
    name: str, files: Mapping[str, Span], names: tuple[str, ...], coarse: bool
) -> list[Item]:
    at = files[name]
    try:
        fields = _unpickle(at)
        start, count = _find_pixels(fields.get("data"))
        labels = fields.get("coarse_labels" if coarse else "fine_labels", fields.get("labels"))
        if not isinstance(labels, list) or len(labels) != count:
            raise PickleRefusedError(f"it has no list of {count:,} labels")
    except PickleRefusedError as error:
        problem = Problem(kind="damaged", message=str(error))
        return [Item(f"{name} from row 0", problem=problem)]
    return [
        _item(
            name,
            row,
            PixelSpan(at.path, start + row * _PIXELS, _SIDE, _SIDE, 3, True),
            label,
            names,
        )
        for row, label in enumerate(labels)
    ]


def _find_pixels(data: Any) -> tuple[int, int]:
    """Where the pixels begin, and how many images they are."""
    if not isinstance(data, PickledArray):
        raise PickleRefusedError("it has no array called `data`")
    if len(data.shape) != 2 or data.shape[1] != _PIXELS or data.dtype not in ("u1", "uint8"):
        raise PickleRefusedError(
            f"`data` is {data.dtype} of shape {data.shape}, where CIFAR has bytes of N x {_PIXELS}"
        )
    if data.fortran:
        raise PickleRefusedError("`data` is stored column by column, where CIFAR has rows")
    if not isinstance(data.data, LongString) or data.data.length != data.shape[0] * _PIXELS:
        raise PickleRefusedError(f"`data` is not {data.shape[0]:,} x {_PIXELS} bytes long")
    return data.data.offset, data.shape[0]


def _read_binary(
    name: str, files: Mapping[str, Span], names: tuple[str, ...], coarse: bool
) -> list[Item]:
    at = files[name]
    of_100 = name in ("train.bin", "test.bin")
    label_bytes = 2 if of_100 else 1  # of CIFAR-100 the coarse label comes first
    record = label_bytes + _PIXELS
    which = 0 if coarse or not of_100 else 1
    items = []
    count, rest = divmod(at.num_bytes, record)
    with open_regular(at.path) as file:
        for row in range(count):
            start = at.offset + row * record
            file.seek(start)
            label = file.read(label_bytes)[which]
            span = PixelSpan(at.path, start + label_bytes, _SIDE, _SIDE, 3, True)
            items.append(_item(name, row, span, label, names))
    if rest:
        message = f"the file ends {rest:,} bytes into a record of {record:,}"
        problem = Problem(kind="damaged", message=message)
        items.append(Item(f"{name} from row {count}", problem=problem))
    return items


def _item(name: str, row: int, span: PixelSpan, label: Any, names: tuple[str, ...]) -> Item:
    item = Item(f"{name}:{row}", span, place=row)
    _give_label(item, label, names)
    return item


def _give_label(item: Item, label: Any, names: tuple[str, ...]) -> None:
    """Gives a number, or the name it stands for; one beyond the names is the item's problem."""
    if not isinstance(label, int) or isinstance(label, bool):
        message = f"the label is {label!r:.100}, not a number"
    elif names and not 0 <= label < len(names):
        message = f"label {label}, where there are {len(names)} class names"
    else:
        found: Label = names[label] if names else label
        item.labels = [found]
        return
    item.problem = Problem(kind="bad row", message=message)
