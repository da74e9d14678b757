"""WebDataset tars, including img2dataset's.

`tarfile` parses headers. Its iteration over an archive is not used: it keeps an object for each
member, reads extended headers of any size, and treats a broken header as the archive's end. Nothing
is ever written under a name found in a tar.
"""

import functools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from unicl_fast.dataset.object_store import is_url
from unicl_fast.packing.sources.cells import Cells, key_in_group, wanted_labels
from unicl_fast.packing.sources.entries import EntryError, Found, Problem, Span
from unicl_fast.packing.sources.items import Item, item_of, refused
from unicl_fast.packing.sources.list_options import ListOptions, names_of
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import (
    CAPTION_COLUMNS,
    FAILED_DOWNLOADS,
    LABEL_COLUMNS,
    LEFT_OUT,
    Columns,
    add_texts,
    meets,
    too_low,
)
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.urls import open_source
from unicl_fast.system.untrusted_files import open_file

IMAGES = frozenset(
    "jpg jpeg png webp gif bmp tif tiff avif jp2 ppm pgm img image".split()  # noqa: SIM905
)
_TEXTS = ("txt", "cls", "json")
_NOT_REGULAR = "not a regular file but a link or a device"
MAX_TEXT_BYTES = 1 << 20  # largest size of a .txt, .cls or .json
_GZIPPED = (".tar.gz", ".tgz")
TARS = (".tar", *_GZIPPED)

NO_SAMPLE = "files that belong to no sample"
_REFUSED = "unicl_fast.refused"  # key of a member's headers
_EXTENDED = (b"x", b"g", b"X", b"L", b"K")  # headers before the header of a file
_MAX_HEADER_BYTES = 1 << 20  # limit for all headers of a member; a path has 4,096
_PADDING = 1 << 20
"""Bytes after the end mark in which another archive can start; GNU tar pads to 10,240 bytes."""

_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_EXPANDED = 1_000_000
_MANY_DIGITS = re.compile(rb"\d{1000}")


def expand_braces(name: str) -> list[str]:
    """Expands `shard-{000..002}.tar` to three names; a name without braces to itself."""
    names = [name]
    while match := _BRACES.search(names[0]):
        low, high = match.groups()
        numbers = range(int(low), int(high) + 1)
        if not 0 < len(numbers) * len(names) <= _MAX_EXPANDED:
            raise ValueError(f"{name}: {match.group()} is no range of 1 to {_MAX_EXPANDED:,} names")
        names = [
            f"{each[: found.start()]}{number:0{len(low)}d}{each[found.end() :]}"
            for each in names
            if (found := _BRACES.search(each))
            for number in numbers
        ]
    return names


def _tars_of(place: Place) -> list[str]:
    """The tars of a place: the file itself, or all of a folder, URL or pattern."""
    is_tar = place.name.lower().endswith(TARS)
    if place.is_url and is_tar:
        return expand_braces(place.given)
    if place.is_url:
        found = sorted(place.tree.sizes)
        return [place.tree.url_of(one) for one in found if one.endswith(".tar") and "/" not in one]
    if place.is_folder:
        found = [name for name in place.files if name.lower().endswith(TARS)]
        return [str(place.path / name) for name in found] if place.folders == place.aside else []
    if place.is_file:
        return [str(place.path)] if is_tar else []
    if (expanded := expand_braces(str(place.path))) != [str(place.path)]:
        return expanded
    is_pattern = all(name.lower().endswith(TARS) for name in place.matches)
    return [str(Path(name)) for name in place.matches] if is_pattern else []


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads tars as one source; refuses compressed ones, which cannot be read in place."""
    paths = _tars_of(place)
    missing = [path for path in paths if not is_url(path) and not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} tars are not there: {missing[0]}")
    for path in paths:
        if path.lower().endswith(_GZIPPED):
            raise ValueError(
                f"{path} is compressed, and images are read in place; unpack it to a .tar first: "
                f"gunzip {path}"
            )
    maker = SampleMaker(options, spool)
    for path in paths:
        _read_tar(path, maker)
        if not is_url(path):
            count_failures(Path(path).with_suffix(""), maker)
    source = maker.source(place.name, "images (KEY.jpg beside KEY.txt, KEY.cls or KEY.json)")
    source.passed_over.update(place.count_aside())
    own = (*TARS, ".parquet", "_stats.json")
    beside = (name for name in place.files if not name.lower().endswith(own))
    source.passed_over.update("files beside the tars" for _ in beside)
    return source


def split_name(name: str) -> tuple[str, str | None]:
    """A file's key, by which files form a sample, and its extension in lower case, if any."""
    folder, slash, file_name = name.rpartition("/")
    stem, dot, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower() if stem and dot else None


@dataclass(slots=True)
class Group:
    """The files of one sample."""

    images: list[tuple[str, Found]] = field(default_factory=list)
    """(extension, entry)."""
    row: dict[str, Any] = field(default_factory=dict)
    """Its texts, as fields of a row."""
    seen: set[str] = field(default_factory=set)
    problem: Problem | None = None


class SampleMaker:
    """Turns groups of files into items."""

    def __init__(self, options: ListOptions, spool: Spool) -> None:
        # .txt and .cls are ignored if an option names a field of .json
        captions, labels = names_of(options.caption_column), tuple(options.patterns("label"))
        captions, labels = captions or ("txt", *CAPTION_COLUMNS), labels or ("cls", *LABEL_COLUMNS)
        columns = Columns((), captions, labels, options.weight_column)
        key_of, wanted = key_in_group(options), wanted_labels(options)
        self._cells = Cells(columns=columns, key_of=key_of, wanted=wanted)
        self._conditions, self._scores = options.conditions(), options.scores()
        asked = {column for column, _ in options.asked_columns(())}
        self._fields = {*asked, *columns.captions, *columns.labels, "status"}
        self._fields -= set(_TEXTS)  # of a .json; .txt and .cls are files
        self._items = spool.new_items()
        self._has_image = False
        self._first_problem = ""
        self.passed_over: Counter[str] = Counter()

    def source(self, name: str, wanted: str) -> Source:
        if not self._has_image:
            problem = self._first_problem or ", ".join(self.passed_over)
            raise ValueError(f"{name} holds no {wanted}" + (f": {problem}" if problem else ""))
        return Source(
            name=name, items=self._items, labels_are_names=False, passed_over=self.passed_over,
            columns=self._cells.columns.found,
        )  # fmt: skip

    def add_file(
        self, group: Group, extension: str, entry: Found, read: Callable[[], bytes]
    ) -> None:
        """Keeps an image, or the used fields of a .txt, .cls or .json; counts other files."""
        if extension not in IMAGES and extension not in _TEXTS:
            self.passed_over[f".{extension} files"] += 1
            return
        if extension in group.seen:
            message = f"several files of this name end in .{extension}"
            group.problem = Problem("ambiguous", message)
        group.seen.add(extension)
        if extension in IMAGES:
            group.images.append((extension, entry))
            return
        try:
            if isinstance(entry, Problem):
                raise EntryError(entry.kind, entry.message)
            data = read()
            if extension == "json":
                fields = json.loads(data)
                if not isinstance(fields, dict):
                    raise ValueError("not a JSON object")
                used = ((k, v) for k, v in fields.items() if k in self._fields)
                group.row |= {k: v.strip() if isinstance(v, str) else v for k, v in used}
            else:
                text = data.decode("utf-8").strip()
                is_number = extension == "cls" and len(text) < 10 and text.isdecimal()
                group.row[extension] = int(text) if is_number else text
        except EntryError as error:
            group.problem = Problem(error.problem.kind, f".{extension}: {error}")
        except (ValueError, RecursionError) as error:
            group.problem = Problem("bad row", f".{extension}: {error!s:.300}")

    def add(self, key: str, group: Group) -> None:
        """Makes the item of one sample."""
        if not group.images:
            status = group.row.get("status")
            if isinstance(status, str) and status != "success":
                return  # a failure in img2dataset's files format, which `count_failures` counts
            missing = group.problem or Problem("missing", "a sample without an image")
            self.append(Item(key, problem=missing))
            return
        if not meets(group.row, self._conditions):
            self.passed_over[LEFT_OUT] += 1
            return
        item = item_of(key, group.images[0][1])
        if (problem := group.problem or too_low(group.row, self._scores)) is not None:
            item.problem = problem
        elif len(group.images) > 1:
            names = " and ".join(f".{name}" for name, _ in group.images)
            item.problem = Problem("ambiguous", f"several images: {names}")
        if item.problem is None:
            texts = self._cells.texts_of(group.row, ())
            add_texts(item, texts, self._cells.columns, "the sample")
        self.append(item)

    def append(self, item: Item) -> None:
        self._has_image |= item.entry is not None
        if item.problem is not None and not self._first_problem:
            self._first_problem = item.problem.message
        self._items.append(item)


def _read_tar(path: str, maker: SampleMaker) -> None:
    """Adds the samples of one tar; from a cut tar, the samples that must be complete."""
    name = os.path.basename(path)
    groups: dict[str, Group] = {}
    group, rest = None, None
    try:
        with open_source(path) as file:
            for member in iter_members(file):
                key, extension = split_name(member.name)
                if extension is None:
                    maker.passed_over[NO_SAMPLE] += 1
                    continue
                group = groups.setdefault(key, Group())
                reason = member.pax_headers.get(_REFUSED, "" if is_plain(member) else _NOT_REGULAR)
                span = Span(path, member.offset_data, member.size)
                entry = Problem("unreadable", reason) if reason else span
                read = functools.partial(_read_text, file, member)
                maker.add_file(group, extension, entry, read)
    except DamagedTarError as error:
        if group is not None:
            message = "the tar is cut after it, and some of its files can be lost"
            group.problem = Problem("damaged", message)
        rest = refused(f"{name} from byte {error.offset}", "damaged", str(error))
    except OSError as error:
        reason = error.strerror or str(error)
        maker.append(refused(f"{name} from byte 0", "unreadable", reason))
        return
    for key, group in groups.items():
        maker.add(f"{name}/{key}", group)
    if rest is not None:
        maker.append(rest)


def _read_text(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise EntryError("bad row", f"a text of {member.size:,} bytes")
    file.seek(member.offset_data)
    return file.read(member.size)


def count_failures(stem: Path, maker: SampleMaker) -> None:
    """Counts img2dataset's failures, from its statistics next to each shard."""
    stats = stem.with_name(f"{stem.name}_stats.json")
    try:
        with open_file(str(stats)) as file:
            fields = json.loads(file.read(MAX_TEXT_BYTES))
        failed = sum(int(fields.get(f"failed_to_{what}", 0)) for what in ("download", "resize"))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return  # a shard is whole without statistics
    if failed > 0:
        maker.passed_over[FAILED_DOWNLOADS] += failed


class DamagedTarError(ValueError):
    """The archive cannot be read beyond the byte `offset`; members before it are complete."""

    def __init__(self, message: str, *, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


def iter_members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yields the files of a tar, or of several joined end to end (`cat a.tar b.tar`), in order.

    Raises DamagedTarError if the rest is unreadable or missing.
    """
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    headers, refused_for = _HeaderFile(file), ""
    archive = _Archive(
        fileobj=cast("BinaryIO", headers), encoding="utf-8", errors="surrogateescape"
    )
    while True:
        at = archive.offset
        file.seek(at)
        headers.num_bytes_left = _MAX_HEADER_BYTES
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            archive.offset = _after_end_mark(file, at, end)
            if archive.offset < 0:
                return
            continue
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            message = "the archive ends without its end mark"
            raise DamagedTarError(message, offset=at) from error
        except OSError:
            raise
        except _LongHeaderError as error:
            file.seek(at)
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "replace")
            if header.type not in _EXTENDED or not 0 < header.size < end - at:
                message = f"no header of a file at byte {at:,} ({error})"
                raise DamagedTarError(message, offset=at) from error
            # the file that it belongs to comes next, by a name that may be cut short
            archive.offset = at + tarfile.BLOCKSIZE * (1 - -header.size // tarfile.BLOCKSIZE)
            refused_for = str(error)
            continue
        except Exception as error:  # tarfile raises any error that its parsing runs into
            message = f"no header of a file at byte {at:,} ({error or type(error).__name__})"
            raise DamagedTarError(message, offset=at) from error
        last = max(member.offset_data + member.size * is_plain(member), archive.offset - 511)
        if member.size < 0 or last > end:
            message = f"the archive ends in the middle of a file of {member.size:,} bytes"
            raise DamagedTarError(message, offset=at)
        if refused_for:
            member.pax_headers, refused_for = {_REFUSED: refused_for}, ""
        if not member.isdir():
            yield member


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a regular file, stored as one run of bytes."""
    return member.isreg() and not member.issparse()


class _LongHeaderError(ValueError):
    """A member has more headers than are read."""


class _Archive(tarfile.TarFile):
    """The state that `TarInfo.fromtarfile` needs: the file, an encoding and the next offset."""

    def next(self) -> None:
        """Reads nothing on opening the archive: errors must come from `iter_members`."""


class _HeaderFile:
    """A tar as tarfile sees it: only headers can be read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell
        self.num_bytes_left = 0
        """Limit for all headers of the next member."""

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= self.num_bytes_left:
            raise _LongHeaderError(f"a header of {num_bytes:,} bytes")
        self.num_bytes_left -= num_bytes
        data = self._file.read(num_bytes)
        # quadratic time in Python before 3.11.10 and 3.12.6 (CVE-2024-6232)
        if num_bytes > tarfile.BLOCKSIZE and _MANY_DIGITS.search(data):
            raise ValueError("a header with a number of a thousand digits")
        return data


def _after_end_mark(file: BinaryIO, at: int, end: int) -> int:
    """The start of the next archive after this one's end; -1 if only padding follows."""
    file.seek(at)
    padding = file.read(_PADDING)
    rest = padding.lstrip(b"\0")
    if not rest and end - at > _PADDING:
        message = f"{end - at:,} zeros, as in a file whose download has not ended: fetch it again"
        raise DamagedTarError(message, offset=at)
    return at + (len(padding) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE if rest else -1


KIND = SourceKind(recognises=lambda place: bool(_tars_of(place)), read=_read)
