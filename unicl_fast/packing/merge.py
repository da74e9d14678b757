"""Joins several packed data sets into one: `unicl-pack merge` as a function.

Nothing is decoded or encoded: images and tokens are copied, shuffled anew over all inputs by the
seed as a build does, labels get the numbers of the joined classes. So raw data sets, whose images
are pixels of one size, go together with others of that size only. What is copied is compared with
its checksums on the way; a damaged sample is left out and listed, as a build does with a damaged
image, since all others are sound. Memory holds some numbers for each sample, and no texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

import unicl_fast
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import QUARANTINE_NAME, DamagedSampleError, PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import (
    Description,
    SampleReader,
    StoredSample,
    equal_images,
)
from unicl_fast.dataset.writer import (
    DEFAULT_SHARD_BYTES,
    DatasetWriter,
    PackedSample,
    require_free,
)
from unicl_fast.packing.class_names import join_classes, join_templates
from unicl_fast.packing.quarantine import (
    DUPLICATE,
    LeaveOut,
    LeftOut,
    duplicate_message,
    read_left_out,
)
from unicl_fast.packing.samples import shuffled_order
from unicl_fast.packing.sources.items import join_texts
from unicl_fast.system.checksums import compare_checksum, file_checksum, read_checksums
from unicl_fast.text.tokenizer import Tokenizer

_DAMAGED, _UNWANTED = "damaged", "left out"
_DAMAGED_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeSummary:
    """The outcome of a merge, in numbers."""

    out: Path
    num_samples: int
    num_captions: int
    num_labels: int
    num_quarantined: int
    """Rows of the new quarantine.csv, those of the inputs included."""
    class_names: tuple[str, ...]
    num_left_out: int
    """Samples that the list of --leave-out named."""
    num_joined: int
    """Samples that were joined into others with the same image."""
    damaged: tuple[str, ...]
    """The first few samples that were left out because they are damaged, each with its reason."""
    num_damaged: int
    num_bytes: int
    """Bytes of the shards, and of decoded images."""
    seconds: float


def merge_datasets(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    templates: str = "",
    leave_out: str = "",
    duplicates: Literal["keep", "join"] = "keep",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> MergeSummary:
    """Writes one data set with the samples of all `folders`; `tools.pack.merge.Merge` explains.

    Raises:
        FileNotFoundError: an input is no data set, or lacks a file.
        ValueError: inputs that do not go together, a damaged array or quarantine list, or nothing
            that could be copied.
    """
    started = time.perf_counter()
    if not folders:
        raise ValueError("name at least one packed data set to merge")
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must lie in 0 to {2**63 - 1:,}, not {seed:,}")
    _refuse_urls(folders, out)
    require_free(Path(out))
    unwanted = LeaveOut(leave_out)
    with contextlib.ExitStack() as stack:
        inputs = _open_inputs(folders, stack)
        manifests = {str(one.dataset.folder): one.dataset.manifest for one in inputs}
        names, label_maps = join_classes([one.class_names for one in manifests.values()])
        template_list = join_templates(manifests, templates)
        context_length = max(manifest.context_length for manifest in manifests.values())
        for one, labels in zip(inputs, label_maps, strict=True):
            one.prepare(labels, context_length=context_length, progress=progress)
        is_raw = inputs[0].dataset.image_shape is not None
        writer = stack.enter_context(
            DatasetWriter(out, shard_bytes=shard_bytes, images="raw" if is_raw else "encoded")
        )
        samples = _Samples(inputs, unwanted=unwanted, join=duplicates == "join")
        counts, damaged = _copy_all(inputs, samples, writer, unwanted, seed=seed, progress=progress)
        if writer.num_samples == 0:
            raise ValueError(
                f"nothing was left to copy: {counts[_DAMAGED]} samples are damaged, "
                f"{counts[_UNWANTED]} were to be left out"
            )
        first = inputs[0].dataset.manifest
        manifest = writer.finish(
            tokenizer=first.tokenizer,
            vocabulary_hash=first.vocabulary_hash,
            context_length=context_length,
            class_names=names,
            templates=template_list,
            source=[source for one in manifests.values() for source in one.source],
            seed=seed,
            tool_version=unicl_fast.__version__,
        )
    return MergeSummary(
        out=Path(out),
        num_samples=manifest.num_samples,
        num_captions=manifest.num_captions,
        num_labels=manifest.num_labels,
        num_quarantined=manifest.num_quarantined,
        class_names=manifest.class_names,
        num_left_out=counts[_UNWANTED],
        num_joined=counts[DUPLICATE],
        damaged=tuple(damaged),
        num_damaged=counts[_DAMAGED],
        num_bytes=manifest.num_bytes,
        seconds=time.perf_counter() - started,
    )


def _copy_all(
    inputs: Sequence[_Input],
    samples: _Samples,
    writer: DatasetWriter,
    unwanted: LeaveOut,
    *,
    seed: int,
    progress: bool,
) -> tuple[Counter[str], list[str]]:
    """Writes all samples in the new order, and lists of them and of the inputs what was left out.

    Returns:
        How many samples were left out, by kind, and the first few damaged ones in words.
    """
    counts: Counter[str] = Counter()
    damaged: list[str] = []
    for row in (row for one in inputs for row in one.left_out()):
        writer.quarantine(**dataclasses.asdict(row))
    order = shuffled_order(len(samples), seed=seed)
    for number in tqdm(order, desc="merging", unit=" images", disable=not progress, smoothing=0.1):
        copied = samples.copy(int(number))
        if isinstance(copied, PackedSample):
            writer.add(copied)
            continue
        counts[copied.kind] += 1
        if copied.kind == _UNWANTED:
            unwanted.take(copied.source, copied.name)
            continue
        writer.quarantine(**dataclasses.asdict(copied))
        if copied.kind == _DAMAGED and len(damaged) < _DAMAGED_SHOWN:
            damaged.append(copied.message)
    return counts, damaged


def _refuse_urls(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> None:
    """Refuses URLs: a merge reads its inputs in shuffled order, and cannot resume."""
    for folder in filter(is_url, folders):
        raise ValueError(
            f"{folder} is a URL, and merge reads folders: copy the data set into a folder with the "
            "store's own program (aws s3 cp --recursive, say), then merge that; training takes "
            "several data sets, also under URLs, without a merge"
        )
    if is_url(out):
        raise ValueError(
            f"--out {out} is a URL, and merge writes folders: merge into a folder DIR, then "
            f"unicl-pack upload DIR --out {out}"
        )


def _open_inputs(
    folders: Sequence[str | os.PathLike[str]], stack: contextlib.ExitStack
) -> list[_Input]:
    """Opens all inputs, and refuses those that cannot become one."""
    named: dict[Path, str] = {}
    inputs: list[_Input] = []
    for folder in folders:
        path = Path(folder).resolve()
        if path in named:
            raise ValueError(f"{folder} is {named[path]} once more; name each data set once")
        named[path] = str(folder)
        one = _Input(stack.enter_context(PackedDataset(folder)))
        stack.callback(one.close)
        inputs.append(one)
    first = inputs[0].dataset
    for one in inputs[1:]:
        mine, other = first.manifest, one.dataset.manifest
        if (mine.tokenizer, mine.vocabulary_hash) != (other.tokenizer, other.vocabulary_hash):
            raise ValueError(
                f"{first.folder} was packed with the tokenizer {mine.tokenizer!r}, vocabulary "
                f"{mine.vocabulary_hash[:12]}..., {one.dataset.folder} with {other.tokenizer!r}, "
                f"{other.vocabulary_hash[:12]}...; their tokens mean different things. Pack one of "
                "them again with the other's version of unicl-pack"
            )
        _require_equal_images(first, one.dataset)
    return inputs


def _require_equal_images(first: PackedDataset, other: PackedDataset) -> None:
    """Refuses raw with another size, or with files, which would take decoding or encoding."""
    if first.image_shape == other.image_shape:
        return
    kinds = [
        "image files"
        if dataset.image_shape is None
        else f"pixels, {dataset.image_shape[1]} x {dataset.image_shape[0]} an image"
        for dataset in (first, other)
    ]
    if first.image_shape is None or other.image_shape is None:
        again = "both with --format raw or both without"
    else:
        again = "both with --format raw and the same --resize square:PIXELS"
    raise ValueError(
        f"{first.folder} holds {kinds[0]}, {other.folder} {kinds[1]}: a merge copies images as "
        f"they are. Build their sources again, {again}, or do not merge: --data.train takes "
        "several data sets, of any kinds"
    )


class _Samples:
    """The samples of all inputs, numbered through."""

    def __init__(self, inputs: Sequence[_Input], *, unwanted: LeaveOut, join: bool) -> None:
        self._inputs = inputs
        self._unwanted = unwanted
        self._starts = [0, *accumulate(len(one.dataset) for one in inputs)]
        self._equal: dict[int, list[int]] = {}
        """For each sample whose image others have too: all of them, in one list."""
        self._written: dict[int, str] = {}
        """For each of them whose texts have been written, the sample that has them."""
        for group in equal_images([one.dataset for one in inputs]) if join else ():
            numbers = group.tolist()
            self._equal |= dict.fromkeys(numbers, numbers)

    def __len__(self) -> int:
        return self._starts[-1]

    def copy(self, number: int) -> PackedSample | LeftOut:
        """A sample as it is to be written, with what others with the same image add to it."""
        copied = self._copy(number)
        equal = self._equal.get(number)
        if equal is None or isinstance(copied, LeftOut):
            return copied
        if number in self._written:
            return LeftOut(copied.source, copied.name, DUPLICATE, message=self._written[number])
        self._written[number] = message = duplicate_message(copied.source, copied.name)
        tokens = dict(zip(copied.captions, copied.tokens, strict=True))
        captions, labels = list(tokens), list(dict.fromkeys(copied.labels))
        for other_number in (one for one in equal if one not in self._written):
            other = self._copy(other_number)
            if not isinstance(other, PackedSample) or other.image != copied.image:
                continue
            joined = join_texts(captions, labels, other.captions, other.labels)
            if joined is None:  # it becomes a sample of its own
                continue
            captions, labels = joined
            tokens |= dict(zip(other.captions, other.tokens, strict=True))
            self._written[other_number] = message
        return dataclasses.replace(
            copied,
            captions=captions,
            tokens=[tokens[caption] for caption in captions],
            labels=labels,
        )

    def _copy(self, number: int) -> PackedSample | LeftOut:
        which = bisect_right(self._starts, number) - 1
        copied = self._inputs[which].copy(number - self._starts[which])
        if self._unwanted.names(copied.source, copied.name):
            return LeftOut(copied.source, copied.name, _UNWANTED, message="")
        return copied


class _Input:
    """One data set that is copied from."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self._reader = SampleReader(dataset)
        self._labels: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._changed_shards: set[int] = set()
        self._old_tokenizer: Tokenizer | None = None
        """Tokenises texts that must be compared with their tokens."""
        self._new_tokenizer: Tokenizer | None = None
        """Tokenises captions that were cut shorter than they will be."""

    def prepare(
        self, labels: npt.NDArray[np.int64], *, context_length: int, progress: bool
    ) -> None:
        """Notes the new numbers of labels, and which shards are not what they were.

        Reading all shards from end to end costs little beside copying them: it is what brings them
        into the cache. Only so is it known that texts, which have no checksums of their own, are
        whole.
        """
        self._labels = labels
        shards = self.dataset.manifest.shards
        with tqdm(
            total=sum(shard.num_bytes for shard in shards),
            desc=f"checking {self.dataset.folder.name}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            for number, shard in enumerate(shards):
                if file_checksum(self.dataset.folder / shard.name) != shard.xxh3:
                    self._changed_shards.add(number)
                bar.update(shard.num_bytes)
        old_length = self.dataset.manifest.context_length
        if self._changed_shards:
            self._old_tokenizer = Tokenizer(old_length)
        if context_length > old_length:
            self._new_tokenizer = Tokenizer(context_length)

    def left_out(self) -> Iterator[LeftOut]:
        """The samples that were left out when this data set was packed."""
        path = self.dataset.folder / QUARANTINE_NAME
        checksums = read_checksums(self.dataset.folder)
        if checksums is not None and path.is_file():
            compare_checksum(path, file_checksum(path), checksums)
        return read_left_out(path)

    def copy(self, index: int) -> PackedSample | LeftOut:
        """A sample as it is written into the new data set, or what is wrong with it."""
        try:
            sample = self._reader.read(index)
            image = self._image_of(index, sample)
        except DamagedSampleError as error:
            folder = str(self.dataset.folder)
            return LeftOut(folder, sample_key(index), _DAMAGED, message=str(error))
        tokens = [
            self.dataset.caption_tokens(index, which)
            for which in range(int(self.dataset.samples[index]["captions_count"]))
        ]
        text = sample.description
        if fault := self._fault_of(index, text, image, tokens):
            return LeftOut(text.source, text.name, _DAMAGED, message=fault)
        row = self.dataset.samples[index]
        return PackedSample(
            image=image,
            extension=sample.members[0].extension,
            height=int(row["height"]),
            width=int(row["width"]),
            xxh3=int(row["xxh3"]),
            captions=text.captions,
            tokens=self._lengthen(text.captions, tokens),
            labels=self._labels[self.dataset.labels_of(index)].tolist(),
            source=text.source,
            name=text.name,
        )

    def close(self) -> None:
        self._reader.close()

    def _image_of(self, index: int, sample: StoredSample) -> bytes:
        """The image as it is stored: a file, or pixels [h w 3]."""
        if sample.image is not None:
            return bytes(sample.image.data)
        return self.dataset.pixels_of(self.dataset.image_bytes(index)).tobytes()

    def _fault_of(
        self, index: int, text: Description, image: bytes, tokens: Sequence[npt.NDArray[np.uint16]]
    ) -> str:
        """Why a sample is not what was packed; empty if it is."""
        row = self.dataset.samples[index]
        if xxhash.xxh3_64_intdigest(image) != int(row["xxh3"]):
            return (
                f"{self.dataset.describe(index)}: the image's bytes are not those that were "
                "packed (checksum)"
            )
        fault = ""
        if text.labels != tuple(self.dataset.labels_of(index).tolist()):
            fault = "its JSON has other labels than labels.npy"
        elif len(text.captions) != len(tokens):
            fault = f"{len(text.captions)} captions in its JSON, {len(tokens)} in the arrays"
        elif self._old_tokenizer is not None and int(row["shard"]) in self._changed_shards:
            again = self._old_tokenizer.encode(text.captions)
            if not all(map(np.array_equal, again, tokens)):
                fault = "its captions are not those that were packed (tokens)"
        return f"{self.dataset.describe(index, 'members')}: {fault}" if fault else ""

    def _lengthen(
        self, captions: Sequence[str], tokens: list[npt.NDArray[np.uint16]]
    ) -> list[npt.NDArray[np.uint16]]:
        """Tokens as the new context length has them: captions that were cut are cut later."""
        if self._new_tokenizer is None:
            return tokens
        return [
            self._new_tokenizer.encode([caption])[0]
            if len(ids) == self.dataset.manifest.context_length
            else ids
            for ids, caption in zip(tokens, captions, strict=True)
        ]
