"""WebDataset tars, and what img2dataset writes: as tars, or as folders of files.

The files of a sample have one name but for what comes after its first dot: 000123.jpg, 000123.txt
(a caption), 000123.cls (a label), 000123.json (fields).
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from unicl_fast.packing.sources.entries import Entry, EntryError, RefusedEntry
from unicl_fast.packing.sources.items import (
    FAILED_DOWNLOADS,
    LEFT_OUT,
    Columns,
    Item,
    ListOptions,
    Problem,
    Source,
    add_texts,
    meets,
    require_text,
    split_condition,
)
from unicl_fast.packing.sources.lists import CAPTION_COLUMNS, LABEL_COLUMNS
from unicl_fast.packing.sources.spans import Span, open_regular
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.tar_members import DamagedTarError, Member, iter_members
from unicl_fast.packing.sources.trees import open_tree

IMAGES = frozenset(
    "jpg jpeg png webp gif bmp tif tiff avif jp2 ppm pgm img image".split()  # noqa: SIM905
)
_TEXTS = ("txt", "cls", "json")
_MAX_TEXT_BYTES = 1 << 20
"""Bytes of a .txt, .cls or .json."""
GZIPPED = (".tar.gz", ".tgz")

_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_EXPANDED = 1_000_000


def expand_braces(place: str) -> list[str]:
    """`shard-{000..002}.tar` -> three names; one name without braces.

    Raises:
        ValueError: the braces are no range.
    """
    names = [place]
    while match := _BRACES.search(names[0]):
        low, high = match.group(1), match.group(2)
        numbers = range(int(low), int(high) + 1)
        if not 0 < len(numbers) * len(names) <= _MAX_EXPANDED:
            raise ValueError(
                f"{place}: {match.group()} is no range of 1 to {_MAX_EXPANDED:,} names"
            )
        names = [
            f"{name[: found.start()]}{number:0{len(low)}d}{name[found.end() :]}"
            for name in names
            if (found := _BRACES.search(name))
            for number in numbers
        ]
    return names


def read_tars(name: str, paths: Sequence[Path], options: ListOptions, spool: Spool) -> Source:
    """Reads tars as one source.

    Args:
        name: what the source is to be called.
        paths: .tar, .tar.gz or .tgz files.
        options: which fields of KEY.json are captions and labels, and `where`.
        spool: where compressed tars are unpacked.

    Raises:
        ValueError: there is no image in any of them.
        FileNotFoundError: one is not there.
    """
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} tars are not there: {missing[0]}")
    maker = _SampleMaker(options, spool)
    for path in paths:
        _read_tar(path, maker, spool)
        _count_failures(path.with_suffix(""), maker)
    return maker.source(name, "images (KEY.jpg beside KEY.txt, KEY.cls or KEY.json)")


def read_image_folders(place: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads img2dataset's folders of files: 00000/000000000.jpg, .txt, .json.

    Raises:
        ValueError: there is no image.
    """
    maker = _SampleMaker(options, spool)
    key, group = "", None
    for name, entry in open_tree(place).entries():
        folder, slash, file_name = name.rpartition("/")
        stem, dot, extension = file_name.partition(".")
        if not folder or not dot or file_name.startswith("."):
            if not file_name.endswith((".parquet", "_stats.json")):
                maker.passed_over["files that belong to no sample"] += 1
            continue
        if group is None or key != folder + slash + stem:  # sorted, so a sample's follow each other
            if group is not None:
                maker.add(key, group)
            key, group = folder + slash + stem, _Group()
        extension = extension.lower()
        if extension in IMAGES:
            group.add_image(extension, entry)
        else:
            read = functools.partial(entry.read, max_bytes=_MAX_TEXT_BYTES)
            maker.add_text(group, extension, read)
    if group is not None:
        maker.add(key, group)
    for folder in sorted(path for path in place.iterdir() if path.is_dir()):
        _count_failures(folder, maker)
    return maker.source(place.name or str(place), "images")


@dataclass(slots=True)
class _Group:
    """What is known of one sample."""

    images: list[tuple[str, Entry]] = field(default_factory=list)
    """With their extensions."""
    row: dict[str, Any] = field(default_factory=dict)
    """Its texts, as the fields of a row."""
    seen: set[str] = field(default_factory=set)
    place: int = 0
    problem: Problem | None = None

    def add_image(self, extension: str, entry: Entry) -> None:
        self.note(extension)
        self.images.append((extension, entry))

    def note(self, extension: str) -> None:
        if extension in self.seen:
            message = f"several files of this name end in .{extension}"
            self.problem = Problem(kind="ambiguous", message=message)
        self.seen.add(extension)


class _SampleMaker:
    """Turns groups of files into items."""

    def __init__(self, options: ListOptions, spool: Spool) -> None:
        # .txt and .cls say nothing where a field of .json is asked for by name
        self._columns = Columns(
            "",
            (options.caption_column,) if options.caption_column else ("txt", *CAPTION_COLUMNS),
            (options.label_column,) if options.label_column else ("cls", *LABEL_COLUMNS),
        )
        self._conditions = [split_condition(condition) for condition in options.where]
        asked = {column for column, _ in self._conditions}
        wanted = {*self._columns.captions, *self._columns.labels, *asked, "status"}
        self._fields = wanted - set(_TEXTS)  # of a .json; .txt and .cls have their own files
        self._items = spool.new_items()
        self._has_image = False
        self._first_problem = ""
        self.passed_over: Counter[str] = Counter()

    def source(self, name: str, wanted: str) -> Source:
        if not self._has_image:
            problem = self._first_problem
            raise ValueError(f"{name} holds no {wanted}" + (f": {problem}" if problem else ""))
        return Source(
            name=name, items=self._items, labels_are_names=False, passed_over=self.passed_over
        )

    def refuse(self, name: str, kind: str, message: str) -> None:
        self._append(Item(name, problem=Problem(kind=kind, message=message)))

    def add_text(self, group: _Group, extension: str, read: Callable[[], bytes]) -> None:
        """Keeps what is wanted of a .txt, .cls or .json; counts files of any other kind."""
        if extension not in _TEXTS:
            self.passed_over[f".{extension} files"] += 1
            return
        group.note(extension)
        try:
            data = read()
            if extension == "json":
                fields = json.loads(data)
                if not isinstance(fields, dict):
                    raise ValueError("not a JSON object")
                group.row |= {k: v for k, v in fields.items() if k in self._fields}
            else:
                text = data.decode("utf-8").strip()
                is_number = extension == "cls" and len(text) < 10 and text.isdecimal()
                group.row[extension] = int(text) if is_number else text
        except EntryError as error:
            group.problem = Problem(kind=error.kind, message=f".{extension}: {error}")
        except (ValueError, RecursionError) as error:
            group.problem = Problem(kind="bad row", message=f".{extension}: {error!s:.300}")

    def add(self, key: str, group: _Group) -> None:
        """Makes the item of one sample."""
        if not group.images:
            status = group.row.get("status")
            if isinstance(status, str) and status != "success":
                return  # img2dataset's files format describes failures too; they are counted once
            problem = group.problem or Problem(kind="missing", message="a sample without an image")
            self._append(Item(key, problem=problem, place=group.place))
            return
        if not meets(group.row, self._conditions):
            self.passed_over[LEFT_OUT] += 1
            return
        item = Item(key, problem=group.problem, place=group.place)
        _, image = group.images[0]
        if len(group.images) > 1 and item.problem is None:
            names = " and ".join(f".{name}" for name, _ in group.images)
            item.problem = Problem(kind="ambiguous", message=f"several images: {names}")
        elif isinstance(image, RefusedEntry):
            item.problem = Problem(kind=image.kind, message=image.message)
        else:
            item.entry = image
        if item.problem is None:
            add_texts(item, group.row, self._columns, "the sample")
            require_text(item)
        self._append(item)

    def _append(self, item: Item) -> None:
        self._has_image |= item.entry is not None
        if item.problem is not None and not self._first_problem:
            self._first_problem = item.problem.message
        self._items.append(item)


def _read_tar(path: Path, maker: _SampleMaker, spool: Spool) -> None:
    """Adds the samples of one tar. Of a cut one, those are taken that must be whole."""
    broken = ""
    try:
        place = str(path)
        if path.name.lower().endswith(GZIPPED):
            unpacked, broken = spool.gunzip(place)
            place = str(unpacked)
        groups, damage = _group_members(place, maker)
        size = os.stat(place).st_size
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        maker.refuse(f"{path.name} from byte 0", "unreadable", error.strerror or str(error))
        return
    for key, group in groups.items():
        maker.add(f"{path.name}/{key}", group)
    if damage is not None or broken:
        offset = size if damage is None else damage.offset
        message = " and ".join(filter(None, (broken, str(damage or ""))))
        maker.refuse(f"{path.name} from byte {offset}", "damaged", message)


def _group_members(
    place: str, maker: _SampleMaker
) -> tuple[dict[str, _Group], DamagedTarError | None]:
    """The samples of a tar in order, and why its end could not be read, if it could not.

    Texts are read on the way, so that the tar is gone through once, forwards.
    """
    groups: dict[str, _Group] = {}
    group = None
    with open_regular(place) as file:
        try:
            for member in iter_members(file):
                folder, slash, file_name = member.name.rpartition("/")
                key, dot, extension = file_name.partition(".")
                if not dot or file_name.startswith("."):
                    maker.passed_over["files that belong to no sample"] += 1
                    continue
                group = groups.setdefault(folder + slash + key, _Group(place=member.header))
                extension = extension.lower()
                if extension in IMAGES:
                    group.add_image(extension, _image(place, member))
                else:
                    maker.add_text(group, extension, functools.partial(_read_text, file, member))
        except DamagedTarError as error:
            if group is not None:
                message = "the tar is cut behind it, and some of its files may be lost"
                group.problem = Problem(kind="damaged", message=message)
            return groups, error
    return groups, None


def _image(place: str, member: Member) -> Entry:
    if not member.is_regular:
        return RefusedEntry("unreadable", "not a regular file but a link or a device")
    return Span(place, member.offset, member.num_bytes)


def _read_text(file: BinaryIO, member: Member) -> bytes:
    if not member.is_regular:
        raise EntryError("unreadable", "not a regular file but a link or a device")
    if member.num_bytes > _MAX_TEXT_BYTES:
        raise EntryError("bad row", f"a text of {member.num_bytes:,} bytes")
    file.seek(member.offset)
    return file.read(member.num_bytes)


def _count_failures(stem: Path, maker: _SampleMaker) -> None:
    """Counts what img2dataset could not get, by the statistics it leaves beside each shard."""
    stats = stem.with_name(f"{stem.name}_stats.json")
    try:
        with open_regular(str(stats)) as file:
            fields = json.loads(file.read(_MAX_TEXT_BYTES))
        failed = sum(int(fields.get(f"failed_to_{what}", 0)) for what in ("download", "resize"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return  # statistics are for people; a shard is whole without
    if failed > 0:
        maker.passed_over[FAILED_DOWNLOADS] += failed
