"""Writes a packed data set: shards, their indexes, the arrays, the quarantine list, the manifest.

Everything is written into a folder beside the final one and renamed when it is whole, so a build
that fails or is killed leaves nothing that looks like a data set. The bytes written depend on the
samples and their order only: tar headers carry no time, owner or machine. Pictures are taken as
they come; checking them belongs to `images`. Of a raw data set the pictures, decoded, go into an
array of their own, and the shards hold their descriptions.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.checksums import CHECKSUMS_NAME, file_checksum, format_checksums
from unicl_fast.manifest import RAW_FORMAT_VERSION, PixelsInfo
from unicl_fast.pixel_file import PIXELS_NAME
from unicl_fast.shard_files import (
    BLOCK,
    END_OF_TAR,
    ArrayFile,
    GrowingPixels,
    ShardFile,
    create_csv,
    padded_bytes,
    sync_and_close,
)
from unicl_fast.shards import (
    ARRAY_DTYPES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    QUARANTINE_COLUMNS,
    QUARANTINE_NAME,
    Manifest,
    ShardInfo,
    sample_key,
    shard_name,
)
from unicl_fast.whole_files import flush_to_disk

DEFAULT_SHARD_BYTES = 512_000_000
"""A shard is closed before it would grow beyond this: large enough for sequential reads, small
enough to copy and to check one by one."""

_SAMPLE_ROW = struct.Struct("<IQIHHQQHQH")
_CAPTION_ROW = struct.Struct("<QB")
_encode_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSample:
    """One sample ready to be written."""

    image: bytes
    """The contents of a picture file, or of a raw data set the pixels [h w 3]."""
    extension: str
    """jpg, webp or png; of a raw data set it has no meaning."""
    height: int
    width: int
    xxh3: int
    """XXH3-64 of `image`."""
    captions: Sequence[str] = ()
    tokens: Sequence[npt.NDArray[np.uint16]] = ()
    """Token ids of each caption, start and end included."""
    labels: Sequence[int] = ()
    source: str = ""
    """Where the picture came from, and `name` its name there: for people, not for training."""
    name: str = ""


class DatasetWriter:
    """Writes one data set folder; use it as a context manager and call `finish` at the end.

    Leaving the context without `finish` removes what was written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        pictures: Literal["encoded", "raw"] = "encoded",
    ) -> None:
        """Makes the folder that is renamed at the end.

        Args:
            out: the final folder; must not exist, or be empty.
            shard_bytes: largest size of a shard.
            pictures: files as they come, in the shards, or (raw, format version 2) decoded pixels
                of one size in one array.
        """
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self.out = Path(out)
        require_free(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.aside = self.out.with_name(f"{self.out.name}.partial-{secrets.token_hex(4)}")
        self.aside.mkdir()
        self.num_samples = 0
        self.num_quarantined = 0
        self._shard_bytes = shard_bytes
        self._shards: list[ShardInfo] = []
        self._shard: ShardFile | None = None
        self._pixels = GrowingPixels(self.aside) if pictures == "raw" else None
        self._arrays = {name: ArrayFile(self.aside, name) for name in ARRAY_DTYPES}
        self._quarantine_file, self._quarantine = create_csv(
            self.aside / QUARANTINE_NAME, QUARANTINE_COLUMNS
        )

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    @property
    def num_captions(self) -> int:
        return self._arrays["captions"].length

    @property
    def num_labels(self) -> int:
        return self._arrays["labels"].length

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards, and of decoded pictures, so far."""
        unfinished = 0 if self._shard is None else self._shard.num_bytes
        pixels = 0 if self._pixels is None else self._pixels.num_bytes
        return sum(shard.num_bytes for shard in self._shards) + unfinished + pixels

    def add(self, sample: PackedSample) -> None:
        """Appends a sample; its number is the count of samples before it."""
        if len(sample.tokens) != len(sample.captions):
            raise ValueError("each caption needs its tokens")
        if not 0 < max(len(sample.captions), len(sample.labels)) < 2**16:
            raise ValueError("a sample needs 1 to 65,535 captions or labels")
        members = [("json", _describe(sample))]
        if self._pixels is None:
            members.insert(0, (sample.extension, sample.image))
        else:
            self._pixels.append(sample.image, height=sample.height, width=sample.width)
        offset = self._shard_for(members).add(sample_key(self.num_samples), members)
        captions, labels, tokens = (self._arrays[name] for name in ("captions", "labels", "tokens"))
        self._arrays["samples"].append(
            _SAMPLE_ROW.pack(
                len(self._shards),
                offset,
                len(members[0][1]),
                sample.height,
                sample.width,
                sample.xxh3,
                captions.length,
                len(sample.captions),
                labels.length,
                len(sample.labels),
            )
        )
        for ids in sample.tokens:
            captions.append(_CAPTION_ROW.pack(tokens.length, len(ids)))
            tokens.append(ids.astype("<u2").tobytes(), rows=len(ids))
        labels.append(np.asarray(sample.labels, dtype="<i4").tobytes(), rows=len(sample.labels))
        self.num_samples += 1

    def quarantine(self, *, source: str, name: str, kind: str, message: str) -> None:
        """Notes a sample that was left out, and why."""
        self._quarantine.writerow([source, name, kind, message])
        self.num_quarantined += 1

    def finish(
        self,
        *,
        tokenizer: str,
        vocabulary_hash: str,
        context_length: int,
        class_names: Sequence[str],
        templates: Sequence[str],
        source: Sequence[str],
        seed: int,
        tool_version: str,
    ) -> Manifest:
        """Closes and syncs all files, writes the manifest and renames the folder into place."""
        if self.num_samples == 0:
            raise ValueError("a data set needs at least one sample")
        self._close_shard()
        pixels = None if self._pixels is None else self._pixels.finish()
        manifest = Manifest(
            version=FORMAT_VERSION if pixels is None else RAW_FORMAT_VERSION,
            num_samples=self.num_samples,
            num_captions=self.num_captions,
            num_tokens=self._arrays["tokens"].length,
            num_labels=self.num_labels,
            num_quarantined=self.num_quarantined,
            shards=tuple(self._shards),
            tokenizer=tokenizer,
            vocabulary_hash=vocabulary_hash,
            context_length=context_length,
            class_names=tuple(class_names),
            templates=tuple(templates),
            source=tuple(source),
            seed=seed,
            tool_version=tool_version,
            pixels=pixels,
        )
        for array in self._arrays.values():
            array.finish()
        sync_and_close(self._quarantine_file)
        # lone surrogates stand for bytes of a file name; as escapes they are good JSON
        manifest_bytes = manifest.to_json().encode("utf-8", "backslashreplace")
        self._write_checksums(manifest_bytes, pixels)
        with (self.aside / MANIFEST_NAME).open("wb") as file:
            file.write(manifest_bytes)
            sync_and_close(file)
        flush_to_disk(self.aside)
        require_free(self.out)
        self.aside.rename(self.out)
        flush_to_disk(self.out.parent)
        return manifest

    def _write_checksums(self, manifest: bytes, pixels: PixelsInfo | None) -> None:
        """Lists all files of the folder, the manifest that is still to be written among them."""
        known = {shard.name: shard.xxh3 for shard in self._shards}
        if pixels is not None:
            known[PIXELS_NAME] = pixels.xxh3
        known[MANIFEST_NAME] = xxhash.xxh3_64_hexdigest(manifest)
        others = (path for path in self.aside.iterdir() if path.name not in known)
        known |= {path.name: file_checksum(path) for path in others}
        with (self.aside / CHECKSUMS_NAME).open("w", encoding="utf-8") as file:
            file.write(format_checksums(known.items()))
            sync_and_close(file)

    def discard(self) -> None:
        """Removes what has been written; nothing to do after `finish`."""
        if not self.aside.exists():
            return
        if self._shard is not None:
            self._shard.file.close()
        for array in self._arrays.values():
            array.file.close()
        if self._pixels is not None:
            self._pixels.close()
        self._quarantine_file.close()
        shutil.rmtree(self.aside)

    def _shard_for(self, members: list[tuple[str, bytes]]) -> ShardFile:
        needed = sum(BLOCK + padded_bytes(len(data)) for _, data in members)
        full = self._shard_bytes - len(END_OF_TAR) - needed
        if self._shard is not None and self._shard.num_bytes > full:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardFile(self.aside, shard_name(len(self._shards)))
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.finish())
            self._shard = None


def require_free(out: Path) -> None:
    """Refuses a place that holds anything already."""
    if (out / MANIFEST_NAME).exists():
        raise ValueError(f"{out} already holds a packed data set; name another folder or remove it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name another one")


def _describe(sample: PackedSample) -> bytes:
    fields = {
        "captions": list(sample.captions),
        "labels": list(sample.labels),
        "source": sample.source,
        "name": sample.name,
    }
    # a file name that is not UTF-8 reaches us as lone surrogates, which escapes can carry
    return _encode_json(fields).encode("ascii")
