"""The journal of a data set in the making: from its last line a program that was killed goes on.

A line is added when a shard is finished and everything that it tells of is on the disk. It says
how much of each file belongs to the samples of the shards so far, so what was written behind that
can be cut off, and packing goes on as if it had never been written. Each line carries its own
checksum: one that was being written when the power failed is not taken for a line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from unicl_fast.dataset.growing_files import Kept
from unicl_fast.dataset.manifest import ShardInfo
from unicl_fast.system.atomic_files import flush_to_disk

_CHECKSUM_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedShard:
    """What is safely on the disk once a shard is finished."""

    shard: ShardInfo
    index_xxh3: str
    """Of the shard's .idx file."""
    num_samples: int
    """In this shard and all before."""
    num_quarantined: int
    """Rows of the quarantine list."""
    files: Mapping[str, Kept]
    """How much of each array, of the list, and of the pixels of a raw data set."""
    image_size: tuple[int, int] | None
    """Height and width of the images of a raw data set."""
    has_webp: bool = False
    """Whether there is a WebP in it or before, which makes it another version of the format."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the caller wants to find again: JSON values."""

    def to_line(self) -> bytes:
        text = json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode("ascii")
        return xxhash.xxh3_64_hexdigest(text).encode("ascii") + b" " + text + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> FinishedShard | None:
        """None if the line is not whole."""
        checksum, text = line[:_CHECKSUM_DIGITS], line[_CHECKSUM_DIGITS + 1 : -1]
        if not line.endswith(b"\n") or checksum != xxhash.xxh3_64_hexdigest(text).encode("ascii"):
            return None
        values: dict[str, Any] = json.loads(text)
        size = values["image_size"]
        values["shard"] = ShardInfo(**values["shard"])
        values["files"] = {name: Kept(**kept) for name, kept in values["files"].items()}
        values["image_size"] = None if size is None else (size[0], size[1])
        return cls(**values)


def read_journal(path: Path) -> list[FinishedShard]:
    """The finished shards in order, up to the first line that is not whole; none without a file."""
    found: list[FinishedShard] = []
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                finished = FinishedShard.from_line(line)
                if finished is None:
                    break
                found.append(finished)
    return found


class ShardJournal:
    """The journal while it grows."""

    def __init__(self, path: Path, finished: Sequence[FinishedShard]) -> None:
        """Begins with lines that are known to be true; any others in the file go."""
        data = b"".join(each.to_line() for each in finished)
        self._file = path.open("r+b" if path.exists() else "wb", buffering=0)
        # written over what is the same already, and cut behind: at no moment is a true line missing
        self._file.write(data)
        self._file.truncate(len(data))
        os.fsync(self._file.fileno())
        flush_to_disk(path.parent)

    def append(self, finished: FinishedShard) -> None:
        """Adds a line; comes back when it is on the disk."""
        self._file.write(finished.to_line())
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
