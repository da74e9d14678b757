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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

import unicl_fast
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import QUARANTINE_NAME, DamagedSampleError, PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import Description, SampleReader, equal_images
from unicl_fast.dataset.writer import (
    DEFAULT_SHARD_BYTES,
    DatasetWriter,
    PackedSample,
    read_made_of,
    require_free,
)
from unicl_fast.packing.build import PackedSummary
from unicl_fast.packing.quarantine import (
    DUPLICATE,
    LeaveOut,
    LeftOut,
    duplicate_message,
    read_left_out,
)
from unicl_fast.packing.samples import LabelSpace, place_classes, shuffled_order
from unicl_fast.packing.sources.items import JoinedTexts
from unicl_fast.packing.work_folder import describe_options, require_same_origin
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    compare_checksum,
    file_checksum,
    read_checksums,
)
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import read_templates
from unicl_fast.text.hierarchies import Hierarchy
from unicl_fast.text.tokenizer import Tokenizer

_DAMAGED, _UNWANTED = "damaged", "left out"
_DAMAGED_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class MergeSummary(PackedSummary):
    """The outcome of a merge."""

    out: Path
    num_left_out: int
    """Samples that the list of --leave-out named."""
    num_joined: int
    """Samples that were joined into others with the same image."""
    damaged: tuple[str, ...]
    """The first few samples that were left out because they are damaged, each with its reason."""
    num_damaged: int
    was_complete: bool = False
    """Whether an earlier run of the same merge had written all of it."""


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
    """Writes one data set with the samples of all `folders`; `tools.pack.__main__.Merge` explains.

    One that the same call has written stays as it is.

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
    out = Path(out)
    if read_made_of(out) is None:
        require_free(out)
    unwanted = LeaveOut(leave_out)
    with contextlib.ExitStack() as stack:
        datasets = _open_inputs(folders, stack)
        origin = {
            "options": describe_options(
                folders,
                {"seed": seed, "templates": templates, "leave_out": leave_out}
                | {"duplicates": duplicates, "shard_bytes": shard_bytes},
            ),
            "sources": dict(map(_describe_input, datasets)),
        }
        if (complete := _summarize_complete(out, origin, started=started)) is not None:
            return complete
        manifests = {str(dataset.folder): dataset.manifest for dataset in datasets}
        names, label_maps = join_classes([one.class_names for one in manifests.values()])
        template_list = join_templates(manifests, templates)
        hierarchy = _join_hierarchies(manifests, names)
        context_length = max(manifest.context_length for manifest in manifests.values())
        inputs = []
        for dataset, labels in zip(datasets, label_maps, strict=True):
            inputs.append(_Input(dataset, labels, context_length, progress=progress))
            stack.callback(inputs[-1].close)
        kind: Literal["raw", "encoded"] = "raw" if datasets[0].image_shape else "encoded"
        writer = stack.enter_context(DatasetWriter(out, shard_bytes=shard_bytes, images=kind))
        samples = _Samples(inputs, unwanted=unwanted, join=duplicates == "join")
        counts, damaged = _copy_all(inputs, samples, writer, unwanted, seed=seed, progress=progress)
        if writer.num_samples == 0:
            raise ValueError(
                f"nothing was left to copy: damaged are {count_of(counts[_DAMAGED], 'sample')}, "
                f"to be left out {counts[_UNWANTED]:,}"
            )
        first = datasets[0].manifest
        summary: dict[str, Any] = {
            "num_left_out": counts[_UNWANTED],
            "num_joined": counts[DUPLICATE],
            "damaged": tuple(damaged),
            "num_damaged": counts[_DAMAGED],
        }
        manifest = writer.finish(
            tokenizer=first.tokenizer,
            vocabulary_hash=first.vocabulary_hash,
            context_length=context_length,
            class_names=names,
            templates=template_list,
            hierarchy=hierarchy,
            source=[source for one in manifests.values() for source in one.source],
            seed=seed,
            tool_version=unicl_fast.__version__,
            license=_join_licenses([one.license for one in manifests.values()]),
            made_of={**origin, "summary": summary},
        )
    return MergeSummary(**MergeSummary.values_of(manifest, out=out, started=started), **summary)


def _join_licenses(licenses: Sequence[str]) -> str:
    """All licenses, each once; those of whom nothing was said are named too, unless none was."""
    if not any(licenses):
        return ""
    return "; ".join(dict.fromkeys(license or "not stated for a part" for license in licenses))


def _summarize_complete(
    out: Path, origin: dict[str, dict[str, Any]], *, started: float
) -> MergeSummary | None:
    """The summary of a merge that an earlier run has ended; ValueError if that was another."""
    made_of = read_made_of(out)
    if made_of is None:
        return None
    for what, values in origin.items():
        require_same_origin(out, what, made_of.get(what, {}), values)
    known = MergeSummary.values_of(Manifest.load(out), out=out, started=started)
    outcome = made_of["summary"] | {"damaged": tuple(made_of["summary"]["damaged"])}
    return MergeSummary(**known, **outcome, was_complete=True)


def _describe_input(dataset: PackedDataset) -> tuple[str, str]:
    """An input's path, and a checksum of all of its files."""
    names = (name for name in (CHECKSUMS_NAME, MANIFEST_NAME) if (dataset.folder / name).is_file())
    return str(dataset.folder), " ".join(file_checksum(dataset.folder / name) for name in names)


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

    Returns how many were left out, by kind, and the first few damaged ones in words.
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
) -> list[PackedDataset]:
    """Opens all inputs, and refuses those that cannot become one."""
    named: dict[Path, str] = {}
    datasets: list[PackedDataset] = []
    for folder in folders:
        path = Path(folder).resolve()
        if path in named:
            raise ValueError(f"{folder} is {named[path]} once more; name each data set once")
        named[path] = str(folder)
        datasets.append(stack.enter_context(PackedDataset(folder)))
    first = datasets[0]
    for dataset in datasets[1:]:
        mine, other = first.manifest, dataset.manifest
        if (mine.tokenizer, mine.vocabulary_hash) != (other.tokenizer, other.vocabulary_hash):
            raise ValueError(
                f"{first.folder} was packed with the tokenizer {mine.tokenizer!r}, vocabulary "
                f"{mine.vocabulary_hash[:12]}..., {dataset.folder} with {other.tokenizer!r}, "
                f"{other.vocabulary_hash[:12]}...; their tokens mean different things. Pack one of "
                "them again with the other's version of unicl-pack"
            )
        _require_equal_images(first, dataset)
    return datasets


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


def join_classes(
    lists: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[npt.NDArray[np.int64]]]:
    """Joins the class names of several data sets; classes with equal names become one.

    Those of the first list keep their numbers, new ones follow. A list may hold a name twice (the
    built-in names of ImageNet have 'missile' and 'sunglasses' twice): only names of different lists
    are joined, the first with the first and the second with the second.

    Returns:
        All names, and for each list an array that gives the new number of each of its labels.
    """
    numbers: dict[tuple[str, int], int] = {}
    maps = []
    for names in lists:
        new = [numbers.setdefault(one, len(numbers)) for one in _occurrences(names)]
        maps.append(np.array(new, dtype=np.int64))
    return tuple(name for name, _ in numbers), maps


def _occurrences(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Each name, and how often it came before."""
    seen: Counter[str] = Counter()
    for name in names:
        yield name, seen[name]
        seen[name] += 1


def _keys_of(names: Sequence[str]) -> list[str]:
    """A text for each class that no other has: its name, but for later ones of the same name."""
    return [f"{name}\0{before}" if before else name for name, before in _occurrences(names)]


def join_templates(manifests: dict[str, Manifest], given: str) -> tuple[str, ...]:
    """The templates of all data sets that have classes, by their names; or those `given` for all.

    Raises:
        ValueError: they differ, and none were given.
    """
    with_classes = {name: one for name, one in manifests.items() if one.class_names}
    if not with_classes:
        return ()
    if given:
        return read_templates(given)
    first_name, first = next(iter(with_classes.items()))
    for name, manifest in with_classes.items():
        if manifest.templates != first.templates:
            raise ValueError(
                f"{first_name} has {len(first.templates)} prompt templates "
                f"({first.templates[0]!r}, ...) and {name} has {len(manifest.templates)} others "
                f"({manifest.templates[0]!r}, ...); say by --templates which to take: a file, "
                "imagenet or simple"
            )
    return first.templates


def _join_hierarchies(manifests: dict[str, Manifest], names: tuple[str, ...]) -> Hierarchy | None:
    """The hierarchies of all data sets as one of the joined classes; None where none has any.

    Raises:
        ValueError: they put a class under different ones.
    """
    parents: dict[str, str] = {}
    for origin, one in manifests.items():
        if one.hierarchy is None:
            continue
        own = (*_keys_of(one.class_names), *one.hierarchy.names)
        for key, number in zip(own, one.hierarchy.parents, strict=True):
            parent = own[number]
            if number >= 0 and parents.setdefault(key, parent) != parent:
                name, above, other = (
                    each.partition("\0")[0] for each in (key, parent, parents[key])
                )
                raise ValueError(
                    f"{origin} puts the class {name!r} under {above!r}, another data set under "
                    f"{other!r}: pack one of them again with the other's --hierarchy"
                )
    space = LabelSpace(names, keys=tuple(_keys_of(names)))
    return place_classes(space, parents, {}, origin="the merge") if parents else None


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
        texts = JoinedTexts(copied.captions, copied.labels)
        for other_number in (one for one in equal if one not in self._written):
            other = self._copy(other_number)
            if not isinstance(other, PackedSample) or other.image != copied.image:
                continue
            if texts.add(other.captions, other.labels):  # else it becomes a sample of its own
                tokens |= dict(zip(other.captions, other.tokens, strict=True))
                self._written[other_number] = message
        return dataclasses.replace(
            copied,
            captions=list(texts.captions),
            tokens=[tokens[caption] for caption in texts.captions],
            labels=list(texts.labels),
        )

    def _copy(self, number: int) -> PackedSample | LeftOut:
        which = bisect_right(self._starts, number) - 1
        copied = self._inputs[which].copy(number - self._starts[which])
        if self._unwanted.names(copied.source, copied.name):
            return LeftOut(copied.source, copied.name, _UNWANTED, message="")
        return copied


class _Input:
    """One data set that is copied from."""

    def __init__(
        self,
        dataset: PackedDataset,
        labels: npt.NDArray[np.int64],
        context_length: int,
        *,
        progress: bool,
    ) -> None:
        """Takes the new numbers of labels, and looks which shards are not what they were.

        Reading all shards from end to end costs little beside copying them: it is what brings them
        into the cache. Only so is it known that texts, which have no checksums of their own, are
        whole.
        """
        self.dataset = dataset
        self._reader = SampleReader(dataset)
        self._labels = labels
        self._changed_shards: set[int] = set()
        shards, folder = dataset.manifest.shards, dataset.folder
        total, desc = sum(shard.num_bytes for shard in shards), f"checking {folder.name}"
        with tqdm(total=total, desc=desc, unit="B", unit_scale=True, disable=not progress) as bar:
            for number, shard in enumerate(shards):
                if file_checksum(folder / shard.name) != shard.xxh3:
                    self._changed_shards.add(number)
                bar.update(shard.num_bytes)
        old_length = dataset.manifest.context_length
        self._old_tokenizer = Tokenizer(old_length) if self._changed_shards else None
        """Tokenises texts that must be compared with their tokens."""
        self._new_tokenizer = Tokenizer(context_length) if context_length > old_length else None
        """Tokenises captions that were cut shorter than they will be."""

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
            if sample.image is not None:
                image = bytes(sample.image.data)
            else:  # pixels [h w 3]
                image = self.dataset.pixels_of(self.dataset.image_bytes(index)).tobytes()
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
            fault = (
                f"{count_of(len(text.captions), 'caption')} in its JSON, {len(tokens)} in "
                "the arrays"
            )
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
