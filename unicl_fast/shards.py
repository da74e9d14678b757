"""The packed data set, format version 1: its arrays, its manifest and a plain reader.

A data set is a folder: tar shards that WebDataset and DALI also read, four small arrays that say
where each picture lies and which texts and labels it has, and a manifest. `docs/data-format.md`
holds the full text. This module only reads; `shard_writer` writes. Decoding pictures and choosing
which sample comes when belong to others.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.array_files import open_array, verify_arrays
from unicl_fast.manifest import FORMAT_VERSION as FORMAT_VERSION
from unicl_fast.manifest import MANIFEST_NAME as MANIFEST_NAME
from unicl_fast.manifest import Manifest as Manifest
from unicl_fast.manifest import ShardInfo as ShardInfo

QUARANTINE_NAME = "quarantine.csv"
KEY_DIGITS = 10

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("xxh3", "<u8"),
        ("captions_start", "<u8"),
        ("captions_count", "<u2"),
        ("labels_start", "<u8"),
        ("labels_count", "<u2"),
    ]
)
"""A row of samples.npy: where the picture's bytes lie, its size as displayed, XXH3-64 of the bytes,
and its ranges of captions.npy and labels.npy."""
CAPTION_DTYPE = np.dtype([("tokens_start", "<u8"), ("tokens_length", "u1")])
"""A row of captions.npy: its range of tokens.npy, start and end tokens included."""
TOKEN_DTYPE = np.dtype("<u2")
LABEL_DTYPE = np.dtype("<i4")
ARRAY_DTYPES = {
    "samples": SAMPLE_DTYPE,
    "captions": CAPTION_DTYPE,
    "tokens": TOKEN_DTYPE,
    "labels": LABEL_DTYPE,
}

# Beyond this many shards a file is opened for each read: descriptors are a scarce resource (often
# 1,024 a process), opening a local file costs a few microseconds.
_MAX_OPEN_SHARDS = 256


class DamagedSampleError(ValueError):
    """The bytes of one sample are not those that were packed; the message names the place."""


def sample_key(index: int) -> str:
    """The name of sample `index` inside its shard, without extension."""
    return f"{index:0{KEY_DIGITS}d}"


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


class PackedDataset:
    """One packed data set, opened for reading by sample number.

    Arrays are memory-mapped and read-only. Pictures are read with `preadv`, never mapped: a shard
    that shrinks under a running job is then an error with a name instead of a bus error. Reads from
    several threads at once are safe.
    """

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
        """Opens the data set in `folder`.

        Args:
            folder: what `unicl-pack build` made.
            verify: compare the arrays with their checksums, and what refers to something with what
                is there: about a second for ten million samples. Without it a damaged array gives
                wrong samples, or worse.

        Raises:
            FileNotFoundError: not a data set, or a file of it is missing.
            ValueError: its files contradict each other or their checksums.
        """
        self.folder = Path(folder)
        self.manifest = Manifest.load(folder)
        self.samples: npt.NDArray[Any] = self._load_array("samples", self.manifest.num_samples)
        self.captions: npt.NDArray[Any] = self._load_array("captions", self.manifest.num_captions)
        self.tokens: npt.NDArray[np.uint16] = self._load_array("tokens", self.manifest.num_tokens)
        self.labels: npt.NDArray[np.int32] = self._load_array("labels", self.manifest.num_labels)
        self._files: dict[int, int] = {}
        self._closed = False
        self._check_shards()
        self.largest_token: int | None = None
        """Largest token id of all captions; None if opened without `verify`."""
        if verify:
            self.largest_token = verify_arrays(self.folder, self.manifest, ARRAY_DTYPES)

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __enter__(self) -> PackedDataset:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def image_bytes(self, index: int, *, verify: bool = False) -> npt.NDArray[np.uint8]:
        """The encoded picture (JPEG or PNG) of sample `index`.

        Args:
            index: 0 to len - 1.
            verify: also compare with the checksum taken when packing; costs about 10 us for 100 kB.

        Raises:
            DamagedSampleError: the shard is shorter than it was, or `verify` found other bytes.
        """
        row = self.samples[self._checked(index)]
        size, offset = int(row["size"]), int(row["offset"])
        data = np.empty(size, dtype=np.uint8)
        done = self._read_into(int(row["shard"]), data, offset)
        if done < size:
            raise DamagedSampleError(
                f"{self.describe(index)}: the shard ends after {done} of {size} bytes"
            )
        if verify and xxhash.xxh3_64_intdigest(data.data) != int(row["xxh3"]):
            raise DamagedSampleError(
                f"{self.describe(index)}: the bytes differ from those that were packed (checksum)"
            )
        return data

    def caption_tokens(self, index: int, which: int) -> npt.NDArray[np.uint16]:
        """Token ids of caption `which` of sample `index`, start and end included, unpadded."""
        row = self.samples[self._checked(index)]
        count = int(row["captions_count"])
        if not 0 <= which < count:
            raise IndexError(f"{self.describe(index)} has {count} captions, not a number {which}")
        caption = self.captions[int(row["captions_start"]) + which]
        start = int(caption["tokens_start"])
        return self.tokens[start : start + int(caption["tokens_length"])]

    def labels_of(self, index: int) -> npt.NDArray[np.int32]:
        """Labels of sample `index`, in the data set's own label space; empty if it has none."""
        row = self.samples[self._checked(index)]
        start = int(row["labels_start"])
        return self.labels[start : start + int(row["labels_count"])]

    def describe(self, index: int) -> str:
        """Names one sample for a message: data set, shard, key and offset."""
        row = self.samples[index]
        shard = int(row["shard"])
        known = shard < len(self.manifest.shards)
        name = self.manifest.shards[shard].name if known else f"shard {shard}, which does not exist"
        return f"sample {sample_key(index)} of {self.folder} ({name}, offset {int(row['offset'])})"

    def close(self) -> None:
        """Closes the shard files; reading pictures afterwards is an error."""
        self._closed = True
        while self._files:
            os.close(self._files.popitem()[1])

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has samples 0 to {len(self) - 1}, not {index}")
        return index

    def _load_array(self, name: str, length: int) -> npt.NDArray[Any]:
        return open_array(self.folder / f"{name}.npy", ARRAY_DTYPES[name], length)

    def _check_shards(self) -> None:
        total = sum(shard.num_samples for shard in self.manifest.shards)
        if total != len(self):
            raise ValueError(
                f"{self.folder / MANIFEST_NAME} contradicts itself: {len(self)} samples, but the "
                f"shards hold {total}"
            )
        for number, shard in enumerate(self.manifest.shards):
            path = self.folder / shard.name
            if shard.name != shard_name(number):
                raise ValueError(
                    f"{self.folder / MANIFEST_NAME}: shard {number} should be called "
                    f"{shard_name(number)}, not {shard.name!r}"
                )
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; copy the data set again")
            if path.stat().st_size != shard.num_bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {shard.num_bytes}; "
                    "copy the data set again"
                )

    def _read_into(self, shard: int, buffer: npt.NDArray[np.uint8], offset: int) -> int:
        """Fills `buffer` from a shard; returns how many bytes there were."""
        if self._closed:
            raise ValueError(f"{self.folder} has been closed")
        if shard >= len(self.manifest.shards):
            raise DamagedSampleError(f"{self.folder} has no shard {shard}; samples.npy is damaged")
        file = self._files.get(shard)
        keep = file is not None or len(self._files) < _MAX_OPEN_SHARDS
        if file is None:
            file = os.open(self.folder / self.manifest.shards[shard].name, os.O_RDONLY)
            if keep and self._files.setdefault(shard, file) != file:
                keep = False  # another thread was first
        try:
            view, done = buffer.data, 0
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done
        finally:
            if not keep:
                os.close(file)
