"""Writes a packed data set: shards, their indexes, the arrays, the quarantine list, the manifest.

Everything is written into a folder beside the final one, which is renamed when complete. The bytes
depend only on the samples and their order.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    ARRAY_DTYPES,
    CHANNELS,
    HEADER_BYTES,
    IN_PLACE_DTYPES,
    NO_FILE,
    PIXEL_DTYPE,
    PIXELS_NAME,
    SAMPLE_DTYPE,
    WEIGHT_DTYPE,
)
from unicl_fast.dataset.growing_files import (
    ArrayFile,
    FinishedShard,
    GrowingFile,
    Kept,
    ListFile,
    ShardFile,
    ShardJournal,
    read_journal,
    sync_and_close,
)
from unicl_fast.dataset.manifest import (
    DEFAULT_SHARD_BYTES,
    FORMAT_VERSION,
    IN_PLACE_FORMAT_VERSION,
    MANIFEST_NAME,
    PPM_FORMAT_VERSION,
    QUARANTINE_COLUMNS,
    QUARANTINE_NAME,
    RAW_FORMAT_VERSION,
    WEBP_FORMAT_VERSION,
    InPlaceInfo,
    Manifest,
    PixelsInfo,
    ShardInfo,
    shard_name,
)
from unicl_fast.dataset.reader import sample_key
from unicl_fast.system.atomic_files import flush_to_disk, make_folder, naming_full_disk
from unicl_fast.system.checked_fields import MOST_CHARACTERS
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    dump_checksummed_json,
    file_checksum,
    format_checksums,
    parse_checksummed_json,
)
from unicl_fast.system.untrusted_files import open_file, read_file

SET_NAME, JOURNAL_NAME = "set", "journal"
"""Names in a work folder: the data set so far, and the journal of its shards."""
MADE_OF_NAME = "made-of.json"
"""Options and sources (with paths and times), by which the packing command recognises its data set;
not part of it, which has the same bytes wherever and whenever it is packed."""

_VERSIONS = {"webp": WEBP_FORMAT_VERSION, "ppm": PPM_FORMAT_VERSION}
"""Format versions needed for such images."""
_SAMPLE_ROW = struct.Struct("<IQIHHQQHQH")
_CAPTION_ROW = struct.Struct("<QB")
_WEIGHT_ROW = struct.Struct("<f")
_PLACE_ROW = struct.Struct("<IQI")
_FILE_ROW = struct.Struct("<QHQQ")
_labels_row = functools.lru_cache(lambda count: struct.Struct(f"<{count}i"))
_quote = json.encoder.encode_basestring_ascii


@dataclass(frozen=True, slots=True)
class SourcePlace:
    """The byte range of an image that stays in its source file."""

    name: str
    """The file's URL, absolute path, or path relative to the data set's folder."""
    num_bytes: int
    version: int
    """When the file was written, in nanoseconds, or XXH3-64 of its object's version."""
    offset: int
    size: int


@dataclass(kw_only=True, slots=True)  # frozen would take three times as long to create
class PackedSample:
    """One sample ready to be written."""

    image: bytes
    """The contents of an image file, or the pixels [h w 3] for a raw data set."""
    extension: str
    """jpg, webp, png or ppm; ignored for a raw data set."""
    height: int
    width: int
    xxh3: int
    """XXH3-64 of `image`."""
    captions: Sequence[str] = ()
    tokens: Sequence[npt.NDArray[np.uint16]] = ()
    """Token ids of each caption, start and end included."""
    labels: Sequence[int] = ()
    source: str = ""
    """The image's origin, and `name` there: for people, not for training."""
    name: str = ""
    weight: float | None = None
    """None if the data set has no weights."""
    group: str = ""
    place: SourcePlace | None = None
    """The image's place in a source file, for a data set in place; `image` is then empty."""


class DatasetWriter:
    """Writes one data set folder; a context manager, with `finish` called at the end.

    Leaving the context without `finish` removes the output, unless there is a `work` folder.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        images: Literal["encoded", "raw", "in place"] = "encoded",
        has_weights: bool = False,
        work: Path | None = None,
    ) -> None:
        """Creates the folder that is renamed at the end, or continues one.

        Args:
            out: the final folder; must not exist, or be empty.
            shard_bytes: largest size of a shard.
            images: encoded: files as they are; raw: decoded pixels of one size (format version 2);
                in place: images with a `place` stay there (format version 4).
            has_weights: store each sample's weight.
            work: a folder beside the final one that survives a crash, with the finished shards of
                an earlier writer. The caller must pass the same samples and options, skip the
                first `num_places` samples, and remove the folder at the end.
        """
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self.out = Path(out)
        require_free(self.out)
        make_folder(self.out.parent)
        self._work = work
        unique = self.out.with_name(f"{self.out.name}.partial-{secrets.token_hex(4)}")
        self.aside = unique if work is None else work / SET_NAME
        self.aside.mkdir(parents=work is not None, exist_ok=work is not None)
        self.num_samples = 0
        self.num_quarantined = 0
        self.notes: dict[str, Any] = {}
        """The caller's values, saved with each finished shard and restored from the last one."""
        self._shard_bytes = shard_bytes
        self._shards: list[ShardInfo] = []
        self._shard: ShardFile | None = None
        self._is_raw, self._is_in_place = images == "raw", images == "in place"
        self._dtypes = ARRAY_DTYPES | (IN_PLACE_DTYPES if self._is_in_place else {})
        self.has_weights = has_weights
        if has_weights:
            self._dtypes = {**self._dtypes, "weights": WEIGHT_DTYPE}
        self._image_size: tuple[int, int] | None = None
        self._pixels: ArrayFile | None = None
        self._version = FORMAT_VERSION
        self._journal: ShardJournal | None = None
        finished = [] if work is None else _whole_shards(self.aside, work)
        while finished and not self._take_over(finished):
            finished.pop()
        if not finished:
            self._open_files(None)
        shards = {shard.name for shard in self._shards}
        own = {*shards, *map(_index_name, shards), *self._files()}
        for path in self.aside.iterdir():
            if path.name not in own:  # left unfinished by a crash
                path.unlink()
        if work is not None:
            self._journal = ShardJournal(work / JOURNAL_NAME, finished)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.discard()
        if isinstance(error, OSError):
            with naming_full_disk(self.aside):
                raise error

    @property
    def num_places(self) -> int:
        """Samples so far, packed or quarantined."""
        return self.num_samples + self.num_quarantined

    def add(self, sample: PackedSample) -> None:
        """Appends a sample; its number is the count of earlier samples."""
        if len(sample.tokens) != len(sample.captions):
            raise ValueError("each caption needs its tokens")
        if not 0 < max(len(sample.captions), len(sample.labels)) < 2**16:
            raise ValueError("a sample needs 1 to 65,535 captions or labels")
        members = [("json", _describe(sample))]
        if not self._is_raw and sample.place is None:
            members.insert(0, (sample.extension, sample.image))
        # before anything else, since a journal line must count nothing of this sample
        shard = self._shard_for(members)
        self._version = max(self._version, _VERSIONS.get(members[0][0], FORMAT_VERSION))
        if self._is_raw:
            self._add_pixels(sample)
        offset = shard.add(sample_key(self.num_samples), members)
        arrays = self._arrays
        captions, labels, tokens = arrays["captions"], arrays["labels"], arrays["tokens"]
        place = (len(self._shards), offset, len(members[0][1]))
        image = (sample.height, sample.width, sample.xxh3)
        texts = (captions.length, len(sample.captions), labels.length, len(sample.labels))
        arrays["samples"].append(_SAMPLE_ROW.pack(*place, *image, *texts))
        for ids in sample.tokens:
            captions.append(_CAPTION_ROW.pack(tokens.length, len(ids)))
            tokens.append(ids.astype("<u2").tobytes())
        if sample.labels:
            labels.append(_labels_row(len(sample.labels)).pack(*sample.labels))
        if self.has_weights:
            arrays["weights"].append(_WEIGHT_ROW.pack(sample.weight))
        if self._is_in_place:
            self._add_place(sample.place)
        self.num_samples += 1

    def _add_place(self, place: SourcePlace | None) -> None:
        """Records where an image stays; consecutive images of a source file share its row."""
        files, names, row = self._arrays["files"], self._arrays["names"], (NO_FILE, 0, 0)
        if place is not None:
            key = [place.name, place.num_bytes, place.version]
            if self.notes.get("source_file") != key:
                name = os.fsencode(place.name)
                files.append(_FILE_ROW.pack(names.length, len(name), *key[1:]))
                names.append(name)
                self.notes["source_file"] = key
            row = files.length - 1, place.offset, place.size
            self.notes["in_place_bytes"] = self.notes.get("in_place_bytes", 0) + place.size
        self._arrays["places"].append(_PLACE_ROW.pack(*row))

    def _add_pixels(self, sample: PackedSample) -> None:
        """Appends a decoded image; the first one determines everyone's size."""
        size = sample.height, sample.width
        if self._image_size is None or self._pixels is None:
            self._image_size, self._pixels = size, self._open_pixels(size)
        height, width = self._image_size
        if size != (height, width) or len(sample.image) != CHANNELS * height * width:
            raise ValueError(
                f"a raw data set has images of one size, {width} x {height} pixels of three bytes "
                f"here, not {sample.width} x {sample.height} in {len(sample.image)} bytes"
            )
        self._pixels.append(sample.image)

    def quarantine(self, *, source: str, name: str, kind: str, message: str) -> None:
        """Lists a sample that was left out, and why; texts are cut, since csv reads 131,072."""
        self._quarantine.write_row([one[:MOST_CHARACTERS] for one in (source, name, kind, message)])
        self.num_quarantined += 1

    def finish(self, *, made_of: Mapping[str, Any] | None = None, **facts: Any) -> Manifest:
        """Syncs and closes all files, writes the manifest and renames the folder into place.

        `facts` are the fields of `Manifest` that the writer does not know, `made_of` JSON values
        for `read_made_of`.
        """
        if self.num_samples == 0:
            raise ValueError("a data set needs at least one sample")
        self._close_shard()
        pixels = None
        if self._pixels is not None and self._image_size is not None:
            self._pixels.finish()
            height, width = self._image_size
            # read again, since its header is written last
            found, num_bytes = file_checksum(self.aside / PIXELS_NAME), self._pixels.num_bytes
            pixels = PixelsInfo(height=height, width=width, num_bytes=num_bytes, xxh3=found)
        for array in self._arrays.values():
            array.finish()
        version = RAW_FORMAT_VERSION if self._is_raw else self._version
        plain: Any = {k: tuple(one) if isinstance(one, list) else one for k, one in facts.items()}
        manifest = Manifest(
            version=IN_PLACE_FORMAT_VERSION if self._is_in_place else version,
            num_samples=self.num_samples,
            num_captions=self._arrays["captions"].length,
            num_tokens=self._arrays["tokens"].length,
            num_labels=self._arrays["labels"].length,
            num_weights=self.num_samples if self.has_weights else 0,
            num_quarantined=self.num_quarantined,
            shards=tuple(self._shards),
            pixels=pixels,
            in_place=self._describe_places() if self._is_in_place else None,
            **plain,
        )
        self._quarantine.finish()
        # lone surrogates stand for bytes of file names; escaped, they are valid JSON
        manifest_bytes = manifest.to_json().encode("utf-8", "backslashreplace")
        self._write_checksums(manifest_bytes, pixels)
        if made_of is not None:
            note = dump_checksummed_json({**made_of, MANIFEST_NAME: _checksum_of(manifest_bytes)})
            with open_file(self.aside / MADE_OF_NAME, "w", encoding="utf-8") as text:
                text.write(note)
                sync_and_close(text)
        with open_file(self.aside / MANIFEST_NAME, "wb") as file:
            file.write(manifest_bytes)
            sync_and_close(file)
        flush_to_disk(self.aside)
        require_free(self.out)
        self.aside.rename(self.out)
        flush_to_disk(self.out.parent)
        if self._journal is not None:
            self._journal.close()
        return manifest

    def _describe_places(self) -> InPlaceInfo:
        """Describes source files for the manifest, after the arrays are written."""
        path, shape = self.aside / "samples.npy", (self.num_samples,)
        rows = np.memmap(path, SAMPLE_DTYPE, mode="r", offset=HEADER_BYTES, shape=shape)
        digest = xxhash.xxh3_64()
        for start in range(0, len(rows), 1 << 16):
            digest.update(rows["xxh3"][start : start + (1 << 16)].tobytes())
        return InPlaceInfo(
            num_files=self._arrays["files"].length,
            num_name_bytes=self._arrays["names"].length,
            num_bytes=self.notes.get("in_place_bytes", 0),
            xxh3=digest.hexdigest(),
        )

    def _write_checksums(self, manifest: bytes, pixels: PixelsInfo | None) -> None:
        """Lists the checksums of all files, including the manifest to be written next."""
        known = {shard.name: shard.xxh3 for shard in self._shards}
        if pixels is not None:
            known[PIXELS_NAME] = pixels.xxh3
        known[MANIFEST_NAME] = _checksum_of(manifest)
        others = (path for path in self.aside.iterdir() if path.name not in known)
        known |= {path.name: file_checksum(path) for path in others}
        with open_file(self.aside / CHECKSUMS_NAME, "w", encoding="utf-8") as file:
            file.write(format_checksums(known.items()))
            sync_and_close(file)

    def discard(self) -> None:
        """Removes the output, or only closes it in a `work` folder; not after `finish`."""
        if not self.aside.exists():
            return
        for file in (self._shard, *self._files().values()):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk, already reported
                    file.close()
        if self._journal is not None:
            self._journal.close()
        if self._work is None:
            shutil.rmtree(self.aside)

    def _open_files(self, last: FinishedShard | None) -> None:
        """Opens the growing files; ValueError or OSError if they differ from `last`."""
        kept = {} if last is None else last.files
        self._arrays = {
            name: ArrayFile(self.aside, name, dtype=dtype, kept=kept.get(f"{name}.npy"))
            for name, dtype in self._dtypes.items()
        }
        self._quarantine = ListFile(
            self.aside / QUARANTINE_NAME, QUARANTINE_COLUMNS, kept=kept.get(QUARANTINE_NAME)
        )
        self._image_size = None if last is None else last.image_size
        self._pixels = None
        if self._image_size is not None:
            self._pixels = self._open_pixels(self._image_size, kept[PIXELS_NAME])

    def _open_pixels(self, size: tuple[int, int], kept: Kept | None = None) -> ArrayFile:
        name, shape = PIXELS_NAME.removesuffix(".npy"), (*size, CHANNELS)
        return ArrayFile(self.aside, name, dtype=PIXEL_DTYPE, row_shape=shape, kept=kept)

    def _take_over(self, finished: list[FinishedShard]) -> bool:
        """Continues after the last finished shard; False if its files have changed."""
        last = finished[-1]
        try:
            self._open_files(last)
        except (ValueError, OSError):
            return False
        self.num_samples, self.num_quarantined = last.num_samples, last.num_quarantined
        self._version = last.version
        self.notes = dict(last.notes)
        self._shards = [each.shard for each in finished]
        return True

    def _files(self) -> dict[str, GrowingFile]:
        """The files that grow across shards, by name."""
        files: dict[str, GrowingFile] = {f"{name}.npy": file for name, file in self._arrays.items()}
        files[QUARANTINE_NAME] = self._quarantine
        if self._pixels is not None:
            files[PIXELS_NAME] = self._pixels
        return files

    def _shard_for(self, members: list[tuple[str, bytes]]) -> ShardFile:
        if self._shard is not None and self._shard.size_with(members) > self._shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardFile(self.aside, shard_name(len(self._shards)))
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        shard, self._shard = self._shard.finish_shard(), None
        self._shards.append(shard)
        if self._journal is None:
            return
        for file in self._files().values():
            file.sync()
        flush_to_disk(self.aside)
        self._journal.append(
            FinishedShard(
                shard=shard,
                index_xxh3=file_checksum(self.aside / _index_name(shard.name)),
                num_samples=self.num_samples,
                num_quarantined=self.num_quarantined,
                files={name: file.kept() for name, file in self._files().items()},
                image_size=self._image_size,
                version=self._version,
                notes=self.notes,
            )
        )


def _index_name(shard: str) -> str:
    return str(Path(shard).with_suffix(".idx"))


def _whole_shards(folder: Path, work: Path) -> list[FinishedShard]:
    """The journal's shards up to the first damaged one: by sizes, indexes, the last checksum."""
    whole: list[FinishedShard] = []
    for finished in read_journal(work / JOURNAL_NAME):
        path = folder / finished.shard.name
        index = folder / _index_name(finished.shard.name)
        if not path.is_file() or path.stat().st_size != finished.shard.num_bytes:
            break
        if not index.is_file() or file_checksum(index) != finished.index_xxh3:
            break
        whole.append(finished)
    while whole and file_checksum(folder / whole[-1].shard.name) != whole[-1].shard.xxh3:
        whole.pop()
    return whole


def read_made_of(out: Path) -> dict[str, Any] | None:
    """Reads `finish`'s `made_of`; None if the data set has none."""
    try:
        found = parse_checksummed_json(read_file(out / MADE_OF_NAME))
        manifest = read_file(out / MANIFEST_NAME)
    except (ValueError, OSError):
        return None
    # another data set may have been copied over this one
    return found if found.pop(MANIFEST_NAME, "") == _checksum_of(manifest) else None


def _checksum_of(manifest: bytes) -> str:
    return str(xxhash.xxh3_64_hexdigest(manifest))


def require_free(out: Path) -> None:
    """Raises ValueError for a folder that is not empty."""
    if (out / MANIFEST_NAME).exists():
        raise ValueError(f"{out} already holds a packed data set; name another folder or remove it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name another one")


def _describe(sample: PackedSample) -> bytes:
    """The sample's JSON, built by hand, since an encoder takes three times as long."""
    captions, labels = ",".join(map(_quote, sample.captions)), ",".join(map(str, sample.labels))
    # names that are not UTF-8 arrive as lone surrogates, which escapes can express
    source, name = _quote(sample.source), _quote(sample.name)
    more = "" if sample.weight is None else f',"weight":{sample.weight!r}'
    more += f',"group":{_quote(sample.group)}' if sample.group else ""
    text = f'{{"captions":[{captions}],"labels":[{labels}],"source":{source},"name":{name}{more}}}'
    return text.encode("ascii")
