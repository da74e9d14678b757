"""Features of a frozen image encoder, one row for each sample, used instead of images.

    KEY.npy    [N width], in the encoder's output type; bfloat16 as its bits, uint16
    KEY.json   the type, the checksum of KEY.npy, and the samples with unreadable images

The key is a hash of everything that affects the features, so files of other weights, images or
preprocessing are never found. KEY.json is written last: without it there are no features.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from unicl_fast.config import DataConfig
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.atomic_files import flush_to_disk, lock, locked, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, file_checksum, parse_checksummed_json
from unicl_fast.system.untrusted_files import open_regular, read_file


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureFile:
    """The features of one data set, memory-mapped."""

    rows: NDArray[Any]
    """[N width]."""
    dtype: str
    """The name of their type; bfloat16 rows are uint16."""
    unreadable: frozenset[int]
    """Samples without features."""

    def row(self, sample: int) -> NDArray[Any] | None:
        """The features of a sample [width]; None if its image could not be read."""
        return None if sample in self.unreadable else self.rows[sample]


def feature_key(
    data: DataConfig,
    dataset: PackedDataset,
    *,
    encoder: str,
    precision: str,
    weights: str,
    device_type: str,
    view: Any,
    **more: Any,
) -> str:
    """The key of a data set's features: equal if and only if the features are.

    `encoder` is the image encoder's name, `weights` a digest of the weights that affect features,
    `view` the part of an image shown, beyond the config's sizes. `view` and `more` (a version and
    anything else relevant) are JSON values.
    """
    images: NDArray[np.uint64] = np.ascontiguousarray(dataset.samples["xxh3"])
    facts = {
        **more,
        "encoder": encoder,
        "weights": weights,
        "images": [xxhash.xxh3_64_hexdigest(images.tobytes()), len(dataset)],
        "view": [data.image_size, view, data.interpolation, data.resample],
        "normalisation": [*data.mean, *data.std],
        "precision": precision,
        "device": [device_type, data.decode_device],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def has_features(folder: Path, key: str) -> bool:
    """Whether complete features are stored under that key."""
    return all((folder / f"{key}.{kind}").is_file() for kind in ("json", "npy"))


def partial_path(folder: Path, key: str, token: str) -> Path:
    """The file that rows are written to before it gets its final name."""
    return folder / f".{key}.{token}.partial"


def make_rows(path: Path, *, num_samples: int, width: int, kind: str) -> None:
    """Creates a file for rows of NumPy's type `kind`; removes its key's leftovers of crashes."""
    for left in path.parent.glob(partial_path(Path(), path.name.split(".")[1], "*").name):
        with contextlib.suppress(OSError), locked(left) as is_unused:
            if is_unused:
                left.unlink()
    shape = (num_samples, width)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(kind), shape=shape).flush()


class RowsWriter:
    """Writes rows into a file of `make_rows`; several processes can write different ones at once.

    With `pwrite`: on a network drive, pages of a mapped file would overwrite neighbouring rows.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, created by `make_rows`."""
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        self._offset, self._row_bytes = int(rows.offset), rows.shape[1] * rows.itemsize
        self._file = open_regular(path, os.O_WRONLY)[0]
        with contextlib.suppress(OSError):  # a file system without locks
            lock(self._file, shared=True)  # until its process ends: marks it as used

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


def seal_features(
    aside: Path, folder: Path, key: str, *, dtype: str, unreadable: Iterable[int]
) -> None:
    """Gives a file with all rows its name and description, unless another run stored the same."""
    values = {"dtype": dtype, "xxh3": file_checksum(aside), "unreadable": sorted(unreadable)}
    flush_to_disk(aside)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks on folders
            lock(descriptor, wait=True)
        if has_features(folder, key):
            aside.unlink()
            return
        aside.rename(folder / f"{key}.npy")
        write_text_atomically(folder / f"{key}.json", dump_checksummed_json(values))
    finally:
        os.close(descriptor)


def read_features(folder: Path, key: str, *, num_samples: int, check: bool = True) -> FeatureFile:
    """Opens stored features; `check` reads all for their checksum. ValueError if damaged."""
    path = folder / f"{key}.npy"
    try:
        values = parse_checksummed_json(read_file(folder / f"{key}.json"))
        if check and (found := file_checksum(path)) != values["xxh3"]:
            raise ValueError(f"its xxh3 is {found}, {key}.json says {values['xxh3']}")
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.ndim != 2 or len(rows) != num_samples:
            raise ValueError(f"{num_samples} rows are expected, {list(rows.shape)} came")
        return FeatureFile(
            rows=rows, dtype=str(values["dtype"]), unreadable=frozenset(values["unreadable"])
        )
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(
            f"the stored features {path} are damaged: {error}; remove {key}.npy and {key}.json, "
            "and they are made again"
        ) from error
