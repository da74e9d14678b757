"""Rows that are stored once: features of images and texts by frozen encoders, and alike.

    KEY.npy            [N width], in the rows' own type; bfloat16 as its bits, uint16
    KEY.json           the type, which rows are stored, their checksum, unreadable images
    KEY.FAMILY.items   uint64 [N]: a hash of each row's image or text, if others can use the rows

A key is a hash of everything that affects the rows, so files of other weights, images or
preprocessing are never found; a family is a hash of all that but the items. A row is stored once
KEY.json says so, and is never written again: a file that a killed process leaves is continued (the
rest of texts goes into another), and a run that needs more rows adds them. `training.kept_rows`
writes these files.
"""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.untrusted_files import read_file

_CHECKED_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """The features of one data set, memory-mapped."""

    rows: NDArray[Any]
    """[N width]."""
    dtype: str
    """The name of their type; bfloat16 rows are uint16."""
    stored: NDArray[np.bool_]
    """[N]: whether a sample's row is there. One that could not be read has none, and counts."""
    unreadable: frozenset[int]
    """Samples without features, since their images could not be read."""
    checksum: int
    """The sum of the stored rows' XXH3."""

    def row(self, sample: int) -> NDArray[Any] | None:
        """The features of a sample [width]; None if its image could not be read."""
        has_row = self.stored[sample] and sample not in self.unreadable
        return self.rows[sample] if has_row else None


def has_features(folder: Path, key: str) -> bool:
    """Whether features, maybe not of all samples, are stored under that key."""
    return all((folder / f"{key}.{kind}").is_file() for kind in ("json", "npy"))


def checksum_of(rows: NDArray[Any], numbers: NDArray[np.int64]) -> int:
    """The sum of the XXH3 of these rows, so that rows can be added without reading all again."""
    rows, found = np.asarray(rows), 0  # each row of a memmap would be a memmap, at 2 us
    for start in range(0, len(numbers), _CHECKED_AT_ONCE):
        some = numbers[start : start + _CHECKED_AT_ONCE]
        found += sum(map(xxhash.xxh3_64_intdigest, rows[some], some.tolist()))
    return found % 2**64


def describe_rows(folder: Path, key: str, file: FeatureFile) -> None:
    """Writes KEY.json; its rows are on disk."""
    values = {"key": key, "dtype": file.dtype, "xxh3": f"{file.checksum:016x}",
              "unreadable": sorted(file.unreadable)}  # fmt: skip
    if not file.stored.all():
        packed = zlib.compress(np.packbits(file.stored).tobytes())
        values["stored"] = base64.b64encode(packed).decode()
    write_text_atomically(folder / f"{key}.json", dump_checksummed_json(values))


def read_features(folder: Path, key: str, *, num_samples: int, check: bool = True) -> FeatureFile:
    """Opens stored features; `check` reads all for their checksum. ValueError if damaged."""
    path = folder / f"{key}.npy"
    try:
        values = parse_checksummed_json(read_file(folder / f"{key}.json"))
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.ndim != 2 or len(rows) != num_samples:
            raise ValueError(f"{num_samples} rows are expected, {list(rows.shape)} came")
        if values.get("key", key) != key:  # files of earlier versions have none
            raise ValueError(f"they are another model's or data set's, {values['key']}")
        stored = np.ones(num_samples, np.bool_)
        if "stored" in values:
            packed = zlib.decompressobj().decompress(
                base64.b64decode(values["stored"]), num_samples // 8 + 1
            )
            stored = np.unpackbits(np.frombuffer(packed, np.uint8), count=num_samples).view(
                np.bool_
            )
        checksum = int(values["xxh3"], 16)
        if check and checksum_of(rows, np.flatnonzero(stored)) != checksum:
            raise ValueError(f"its xxh3 is another than {key}.json says")
        return FeatureFile(
            rows=rows, dtype=str(values["dtype"]), stored=stored, checksum=checksum,
            unreadable=frozenset(values["unreadable"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise ValueError(
            f"the stored features {path} are damaged: {error}; remove {key}.npy and {key}.json, "
            "and they are made again"
        ) from error


class KnownRows:
    """All stored rows of a family, found by their items."""

    def __init__(self, folder: Path, family: str, *, check: bool = True) -> None:
        """Raises ValueError if a file is damaged; `check` reads all."""
        self._files, known = list[FeatureFile](), [np.zeros((3, 0), np.int64)]
        for number, (key, items) in enumerate(states(folder, family)):
            self._files.append(read_features(folder, key, num_samples=len(items), check=check))
            rows = np.flatnonzero(self._files[-1].stored)
            known.append(np.stack([items[rows].view(np.int64), np.full_like(rows, number), rows]))
        items, files, rows = np.concatenate(known, axis=1)
        self._items, first = np.unique(items.view(np.uint64), return_index=True)
        self._places = np.stack([files, rows])[:, first]

    def find(self, items: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The number int64 [k] of each item; -1 if its row is not stored."""
        if not len(self._items):
            return np.full(len(items), -1)
        numbers = self._items.searchsorted(items).clip(max=len(self._items) - 1)
        return np.where(self._items[numbers] == items, numbers, -1)

    def take(self, numbers: NDArray[np.int64]) -> Tensor:
        """The rows [k width] by the numbers of `find`."""
        files, rows = self._places[:, numbers]
        kind = self._files[0].rows
        found = np.empty((len(numbers), kind.shape[1]), kind.dtype)
        for file in np.unique(files).tolist():
            mine = np.flatnonzero(files == file)
            found[mine] = self._files[file].rows[rows[mine]]
        return as_tensor(found, self._files[0].dtype)


def states(folder: Path, family: str) -> Iterator[tuple[str, NDArray[np.uint64]]]:
    """Keys and items of all files of a family."""
    for path in sorted(folder.glob(f"*.{family}.items")):
        key = path.name.partition(".")[0]
        if has_features(folder, key):
            yield key, np.fromfile(path, np.uint64)


def as_tensor(rows: NDArray[Any], dtype: str) -> Tensor:
    """Rows of a file, whose type is `dtype`, as a tensor."""
    return torch.from_numpy(rows).view(getattr(torch, dtype))


def bits_of(features: Tensor) -> NDArray[Any]:
    """Features as NumPy knows them, which has no bfloat16."""
    known = features.view(torch.uint16) if features.dtype == torch.bfloat16 else features
    return known.contiguous().numpy()
