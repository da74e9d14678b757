"""Features of a frozen image encoder, one row for each sample, used instead of images.

    KEY.npy    [N width], in the encoder's output type; bfloat16 as its bits, uint16
    KEY.json   the type, which rows are stored, their checksum, samples with unreadable images

The key is a hash of everything that affects the features, so files of other weights, images or
preprocessing are never found. A row is stored once KEY.json says so, and is never written again:
what a killed process leaves is continued, and a run that needs more rows adds them.
"""

import base64
import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.atomic_files import is_at, lock, make_folder, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.untrusted_files import open_regular, read_file

_ROWS_AT_ONCE = 4096  # rows that are read together for a checksum


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

    def row(self, sample: int) -> NDArray[Any] | None:
        """The features of a sample [width]; None if its image could not be read."""
        has_row = self.stored[sample] and sample not in self.unreadable
        return self.rows[sample] if has_row else None


def feature_key(
    data: DataConfig,
    dataset: PackedDataset | None,
    *,
    encoder: str,
    precision: str,
    weights: str,
    device_type: str,
    view: Any,
    **more: Any,
) -> str:
    """The key of a data set's features: equal if and only if the features are.

    Without a data set: of all features made in the same way.

    `encoder` is the image encoder's name, `weights` a digest of the weights that affect features,
    `view` the part of an image shown, beyond the config's sizes. `view` and `more` (a version and
    anything else relevant) are JSON values.
    """
    images = b"" if dataset is None else dataset.samples["xxh3"].tobytes()
    facts = {
        **more,
        "encoder": encoder,
        "weights": weights,
        "images": [xxhash.xxh3_64_hexdigest(images), len(images) // 8],
        "view": [data.image_size, view, data.interpolation, data.resample],
        "normalisation": [*data.mean, *data.std],
        "precision": precision,
        "device": [device_type, data.decode_device],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def has_features(folder: Path, key: str) -> bool:
    """Whether features, maybe not of all samples, are stored under that key."""
    return all((folder / f"{key}.{kind}").is_file() for kind in ("json", "npy"))


@contextlib.contextmanager
def sole_storer(folder: Path, key: str) -> Iterator[None]:
    """Makes the folder, and waits until no other process writes features of that key."""
    make_folder(folder)
    path = folder / f".{key}.lock"
    while True:
        descriptor, _ = open_regular(path, os.O_RDWR | os.O_CREAT, mode=0o600)
        with contextlib.suppress(OSError):  # a file system without locks
            lock(descriptor, wait=True)
        if is_at(descriptor, path):  # the last writer removes it
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def make_rows(folder: Path, key: str, *, num_samples: int, width: int, kind: str) -> None:
    """Makes KEY.npy for rows of NumPy's type `kind`, unless rows are stored there."""
    if not has_features(folder, key):
        path, shape = folder / f"{key}.npy", (num_samples, width)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(kind), shape=shape).flush()


class RowsWriter:
    """Writes rows into the file of `make_rows`; several processes can write different ones at once.

    With `pwrite`: on a network drive, pages of a mapped file would overwrite neighbouring rows.
    """

    def __init__(self, folder: Path, key: str) -> None:
        path = folder / f"{key}.npy"
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        self._offset, self._row_bytes = int(rows.offset), rows.shape[1] * rows.itemsize
        self._file = open_regular(path, os.O_WRONLY)[0]

    def write(self, samples: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Writes `rows` [k width] for these samples."""
        for sample, row in zip(samples.tolist(), rows, strict=True):
            data, place = row.tobytes(), self._offset + sample * self._row_bytes
            if os.pwrite(self._file, data, place) != len(data):
                raise OSError(errno.ENOSPC, "features could not be written whole")

    def flush(self) -> None:
        """Returns when everything is on disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def seal_rows(
    folder: Path, key: str, *, dtype: str, stored: NDArray[np.bool_], unreadable: Iterable[int]
) -> None:
    """Says in KEY.json that these rows, which are on disk, are stored."""
    rows = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
    values = {"key": key, "dtype": dtype, "xxh3": _checksum(rows, stored),
              "unreadable": sorted(unreadable)}  # fmt: skip
    if not stored.all():
        packed = zlib.compress(np.packbits(stored).tobytes())
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
        if check and (found := _checksum(rows, stored)) != values["xxh3"]:
            raise ValueError(f"its xxh3 is {found}, {key}.json says {values['xxh3']}")
        return FeatureFile(
            rows=rows, dtype=str(values["dtype"]), stored=stored,
            unreadable=frozenset(values["unreadable"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise ValueError(
            f"the stored features {path} are damaged: {error}; remove {key}.npy and {key}.json, "
            "and they are made again"
        ) from error


def _checksum(rows: NDArray[Any], stored: NDArray[np.bool_]) -> str:
    """XXH3 of the stored rows: what a killed process wrote beyond them does not matter."""
    digest = xxhash.xxh3_64()
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        digest.update(rows[part][stored[part]].tobytes())
    return digest.hexdigest()
