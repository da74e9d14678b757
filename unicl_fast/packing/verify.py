"""Finds all faults of a packed data set: `unicl-pack verify` as a function.

`folder_check` compares the files; this file compares each sample's part of its shard with
samples.npy, captions with their tokens, labels, and the index for DALI. Images are decoded as
strictly as when they were packed. Checking continues after a fault.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import PIXELS_NAME
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import SampleReader, StoredSample
from unicl_fast.images.limits import MAX_PIXELS
from unicl_fast.packing.build_options import DEFAULT_IMAGE_SECONDS
from unicl_fast.packing.folder_check import Fault, FaultLog, check_folder
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.packed import encode_all, image_entry, text_faults
from unicl_fast.packing.workers import Checked, ImageOptions, Task, check_in_order, make_tokenizer
from unicl_fast.system.bar import Bar
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.text.tokenizer import Tokenizer

_TOKENISE_TOGETHER = 1024  # captions that the tokenizer's threads share


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySummary:
    """The outcome of a verification."""

    folder: Path | str
    manifest: Manifest | None
    """None if the samples could not be checked, which needs it and all arrays."""
    num_bytes: int
    """Bytes of all files."""
    num_decoded: int
    faults: dict[str, int]
    """How many faults of each kind."""
    seconds: float

    @property
    def num_faults(self) -> int:
        return sum(self.faults.values())


def verify_dataset(
    folder: str | os.PathLike[str],
    *,
    note: Callable[[Fault], None],
    decode: bool = True,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    image_seconds: float = DEFAULT_IMAGE_SECONDS,
    progress: bool = True,
) -> VerifySummary:
    """Checks every byte of a data set; `tools.pack.verify.Verify` explains the arguments.

    Calls `note` with each fault as soon as it is found. With `decode` it spawns worker processes.
    Raises FileNotFoundError if the folder is no data set.
    """
    started = time.perf_counter()
    folder = Path(folder)
    faults = FaultLog(note)
    dataset = check_folder(folder, faults=faults, progress=progress)
    is_raw = dataset is not None and dataset.image_shape is not None
    num_decoded = 0
    if dataset is not None:
        options = ImageOptions(
            max_pixels=max_pixels, seconds=image_seconds, format="packed", return_images=False
        )
        with dataset:
            if is_raw:
                _check_pixels(dataset, faults=faults, progress=progress)
            num_decoded = _check_samples(
                dataset,
                faults=faults,
                options=options if decode and not is_raw else None,
                workers=workers,
                progress=progress,
            )
    return VerifySummary(
        folder=folder,
        manifest=None if dataset is None else dataset.manifest,
        num_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        num_decoded=num_decoded,
        faults=dict(faults.counts),
        seconds=time.perf_counter() - started,
    )


def _check_pixels(dataset: PackedDataset, *, faults: FaultLog, progress: bool) -> None:
    """Compares each image of a raw data set with its checksum."""
    if not (dataset.folder / PIXELS_NAME).is_file():  # noted already
        return
    bar = Bar(range(len(dataset)), desc="pixels", unit=" images", shown=progress)
    for index in bar:
        try:
            dataset.image_bytes(index, verify=True)
        except DamagedSampleError as error:
            faults.add(PIXELS_NAME, "checksum", _without_name(error), sample=index)


def _check_samples(
    dataset: PackedDataset,
    *,
    faults: FaultLog,
    options: ImageOptions | None,
    workers: int,
    progress: bool,
) -> int:
    """Checks all samples; returns how many images were decoded, 0 without `options`."""
    checks = _SampleChecks(dataset, faults=faults, tokenizer=_tokenizer_of(dataset, faults=faults))
    walk = Bar(checks.walk(), total=len(dataset), desc="verifying", unit=" images", shown=progress)
    sound = checks.compare_tokens(walk)
    if options is None:
        deque(sound, maxlen=0)
        return 0
    ahead, behind = itertools.tee(sound)
    tasks = (Task(sample_key(one.index), image_entry(dataset, one.index)) for one in ahead)
    num_decoded = 0
    results = check_in_order(tasks, options=options, workers=workers)
    with contextlib.closing(results):
        for result, sample in zip(results, behind, strict=False):  # results come first
            if isinstance(result, Problem):
                checks.fault(sample.index, "image", f"{result.kind}: {result.message}")
            else:
                checks.compare_image(sample.index, result, extension=sample.extension)
                num_decoded += 1
    return num_decoded


def _tokenizer_of(dataset: PackedDataset, *, faults: FaultLog) -> Tokenizer | None:
    """The tokenizer that made the tokens; notes a fault and returns None if it is another one."""
    length = dataset.manifest.context_length
    if not 2 <= length <= 255:
        message = f"context_length is {length}; expected is 2 to 255"
        faults.add(MANIFEST_NAME, "manifest", message)
        return None
    tokenizer = make_tokenizer(length)
    ours = tokenizer.name, tokenizer.vocabulary_hash
    theirs = dataset.manifest.tokenizer, dataset.manifest.vocabulary_hash
    if theirs == ours:
        return tokenizer
    message = (
        f"packed with the tokenizer {theirs[0]!r}, vocabulary {theirs[1][:12]}..., this program "
        f"has {ours[0]!r}, {ours[1][:12]}...; its tokens mean nothing here, and were not compared "
        "with the captions"
    )
    faults.add(MANIFEST_NAME, "tokens", message)
    return None


@dataclass(frozen=True, slots=True)
class _Sound:
    """A sample whose bytes are as packed."""

    index: int
    captions: tuple[str, ...]
    extension: str
    """The extension of the image's member; empty if the image is not in the shard."""


class _SampleChecks:
    """Compares samples with the arrays and the index; notes differences."""

    def __init__(
        self, dataset: PackedDataset, *, faults: FaultLog, tokenizer: Tokenizer | None
    ) -> None:
        self._dataset = dataset
        self._faults = faults
        self._tokenizer = tokenizer

    def fault(self, index: int, kind: str, message: str) -> None:
        """Notes a sample's fault."""
        shard = self._dataset.shard_of(index, "members")
        self._faults.add(shard, kind, message, sample=index)

    def walk(self) -> Iterator[_Sound]:
        """Yields sound samples in order, and notes the faults of the others."""
        first = 0
        with contextlib.closing(SampleReader(self._dataset)) as reader:
            for number, shard in enumerate(self._dataset.manifest.shards):
                path = self._dataset.folder / shard.name
                numbers = range(first, first + shard.num_samples)
                first += shard.num_samples
                if not path.is_file():  # noted already
                    continue
                lines: list[str] = []
                for index in numbers:
                    sample = self._read(reader, index, number, is_first=index == numbers[0])
                    if sample is None:
                        continue
                    lines.append(sample.index_line(index))
                    extension = "" if sample.image is None else sample.image.extension
                    yield _Sound(index, sample.description.captions, extension)
                if len(lines) == shard.num_samples:
                    expected = "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines])
                    file = path.with_suffix(".idx")
                    with self._faults.catch(file.name, "index", known=OSError):
                        if read_file(file, most_bytes=1 << 30) != expected.encode("ascii"):
                            raise ValueError(f"it does not locate the members of {path.name}")

    def _read(
        self, reader: SampleReader, index: int, shard: int, *, is_first: bool
    ) -> StoredSample | None:
        """A sample; notes its faults and returns None if it has any."""
        try:
            found, start, _ = reader.span(index)
            if found != shard or (is_first and start):
                raise DamagedSampleError(
                    f"samples.npy places it in shard {found} from byte {start} on; by the "
                    f"manifest's counts it belongs to shard {shard}"
                    + (", at its beginning" if is_first else "")
                )
            sample = reader.read(index)
        except DamagedSampleError as error:
            self.fault(index, "shard", _without_name(error))
            return None
        faults: dict[str, str] = {}
        if self._dataset.sources is not None:
            try:
                self._dataset.image_bytes(index, verify=True)
            except DamagedSampleError as error:
                faults["source"] = _without_name(error)
        # a raw data set's image was compared already
        xxh3 = int(self._dataset.samples[index]["xxh3"])
        if sample.image and xxhash.xxh3_64_intdigest(sample.image.data) != xxh3:
            faults["checksum"] = "the image's bytes are not those that were packed"
        faults |= text_faults(self._dataset, index, sample.description)
        for kind, message in faults.items():
            self.fault(index, kind, message)
        return None if faults else sample

    def compare_tokens(self, samples: Iterable[_Sound]) -> Iterator[_Sound]:
        """Compares tokens made anew with the stored ones, and yields the samples.

        In groups, for the tokenizer's threads.
        """
        left = iter(samples)
        while group := list(itertools.islice(left, _TOKENISE_TOGETHER)):
            if self._tokenizer is not None:
                texts = [text for sample in group for text in sample.captions]
                rows = iter(encode_all(self._tokenizer, texts))
                for sample in group:
                    for which, _ in enumerate(sample.captions):
                        self._compare_caption(sample.index, which, next(rows))
            yield from group

    def _compare_caption(self, index: int, which: int, tokens: npt.NDArray[np.uint16]) -> None:
        try:
            stored = self._dataset.caption_tokens(index, which)
        except (IndexError, OverflowError):  # a damaged array
            stored = np.empty(0, np.uint16)
        if not np.array_equal(tokens, stored):
            message = (
                f"caption {which} gives other tokens than tokens.npy has: one of them was "
                "changed, or they were made with another version of ftfy or regex"
            )
            self.fault(index, "tokens", message)

    def compare_image(self, index: int, checked: Checked, *, extension: str) -> None:
        """Compares a strictly decoded image with its row and its member's name."""
        row, image = self._dataset.samples[index], checked
        if image.reencoded:
            message = (
                "it can be read, but is no plain, upright 8-bit JPEG, WebP or PNG in grey or RGB; "
                "a build would have encoded it again"
            )
            self.fault(index, "image", message)
        elif image.extension != extension and extension:  # source files can have any names
            message = f"its bytes are those of a .{image.extension}, not of a .{extension}"
            self.fault(index, "image", message)
        found, stored = f"{image.height} x {image.width}", f"{row['height']} x {row['width']}"
        if found != stored:
            message = f"it has {found} pixels, samples.npy says {stored} (height x width)"
            self.fault(index, "image", message)


def _without_name(error: DamagedSampleError) -> str:
    """The message without the sample's name, which the report shows anyway."""
    return str(error).partition("): ")[2] or str(error)
