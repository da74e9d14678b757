"""A folder beside the output for what does not fit into memory or cannot be read in any order.

Samples are packed in shuffled order, and an image in a Parquet file or a .gz cannot be reached
without unpacking what lies before it. So such files are unpacked once, in order, and images are
read from the copy. That takes as much room as their images, on the disk that is to hold the
packed ones anyway, and never more memory than a block. The list of all samples lies there too
(`item_store`).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from unicl_fast.packing.sources.item_store import ItemStore
from unicl_fast.packing.sources.spans import open_regular
from unicl_fast.system.atomic_files import flush_to_disk, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json

_BLOCK = 1 << 20
MAX_EXPANSION = 100
"""A .gz that unpacks to more than this many times its size is a bomb: pixels shrink to a fifth,
photographs not at all, and only a blank MNIST would come near."""
_SMALL = 16_000_000
"""A file may always unpack to so many bytes."""


class Spool:
    """The folder; made when it is first needed, and removed at the end.

    Use it as a context manager. Where it is never entered, it goes with the object. One that was
    given its place stays there, for a build that goes on: what was unpacked of the same files need
    not be unpacked again.
    """

    def __init__(self, out: Path | None, *, folder: Path | None = None) -> None:
        """Makes nothing yet.

        Args:
            out: the folder that is to be made; the spool lies beside it. None allows no file.
            folder: where the spool is to lie instead. The caller removes it.
        """
        self._folder = folder or (out and out.with_name(f"{out.name}.spool-{secrets.token_hex(4)}"))
        self._stays = folder is not None
        self._num_files = 0
        self.origins: list[str] = []
        """The files that were unpacked."""
        if self._folder is not None and not self._stays:
            self._removal = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None and not self._stays:
            self._removal()

    def locate(self, path: str) -> str | None:
        """A file's place in the spool, the same in every build; None if it is none of it."""
        prefix = f"{self._folder}/"
        return path.removeprefix(prefix) if path.startswith(prefix) else None

    def new_file(self) -> Path:
        """A place for one more file, which the caller makes."""
        if self._folder is None:
            raise ValueError(
                "this source must be unpacked to be read, and there is no place for it"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_files += 1
        return self._folder / f"{self._num_files:06d}"

    def new_items(self) -> ItemStore:
        """Room for the items of a source."""
        return ItemStore(self._folder)

    def remember(self, places: Sequence[Path], made_of: Any, values: Mapping[str, Any]) -> None:
        """Notes that files are whole, for a build that goes on.

        Args:
            places: the files.
            made_of: tells whether they would be made of the same again; a JSON value.
            values: what else is to be known of them; JSON values.
        """
        if not self._stays:
            return
        for place in places:
            flush_to_disk(place)
        sizes = [place.stat().st_size for place in places]
        note = {"made of": made_of, "sizes": sizes, "values": dict(values)}
        write_text_atomically(_note_of(places[0]), dump_checksummed_json(note))

    def release(self, place: Path) -> None:
        """Removes a file that has been read, unless a build that goes on may want it again."""
        if not self._stays:
            place.unlink()

    def recall(self, places: Sequence[Path], made_of: Any) -> dict[str, Any] | None:
        """What was noted of files that are whole and made of the same; None if they are not."""
        if not self._stays:
            return None
        try:
            note = parse_checksummed_json(_note_of(places[0]).read_bytes())
            sizes = [place.stat().st_size for place in places]
        except (ValueError, OSError):
            return None
        if note.get("sizes") != sizes or note.get("made of") != made_of:
            return None
        values: dict[str, Any] = note["values"]
        return values

    def gunzip(self, path: str) -> tuple[Path, str]:
        """Unpacks a .gz file.

        Returns:
            The unpacked file, and what is wrong with the .gz, or nothing. What could be unpacked
            before the fault is kept.

        Raises:
            OSError: it cannot be opened, or the disk is full.
        """
        place = self.new_file()
        self.origins.append(path)
        made_of = [*stamp(path)]
        if (known := self.recall([place], made_of)) is not None:
            return place, str(known["broken"])
        try:
            with open_regular(path) as packed, place.open("wb") as unpacked:
                broken = _inflate(packed, unpacked)
            self.remember([place], made_of, {"broken": broken})
            return place, broken
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise full_disk(place) from error
            raise


def _note_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.json")


def stamp(path: str) -> tuple[str, int, int]:
    """A file, its size and when it was written; zeros for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


def _inflate(packed: BinaryIO, unpacked: BinaryIO) -> str:
    """Unpacks a .gz until its end or its fault, which is returned."""
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    read = written = 0
    while block := packed.read(_BLOCK):
        read += len(block)
        while block:
            if inflater.eof:  # members of a .gz may follow each other (RFC 1952, 2.2)
                block = block.lstrip(b"\0")
                if not block:
                    break
                inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                data = inflater.decompress(block, _BLOCK)
            except zlib.error as error:
                return f"its gzip data are broken: {error}"
            block = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
            written += len(data)
            if written > max(_SMALL, MAX_EXPANSION * read):
                return f"it unpacks to more than {MAX_EXPANSION} times its size"
            unpacked.write(data)
    return "" if inflater.eof else "it ends in the middle of its gzip data"


def full_disk(place: object) -> OSError:
    """The error that says what the room is for."""
    return OSError(
        errno.ENOSPC,
        f"no room left for {place}, where images that cannot be read in place are unpacked; it "
        "takes as much room as they do, on the disk of --out",
    )
