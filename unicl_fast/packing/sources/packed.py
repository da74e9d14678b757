"""Packed data sets as sources of a build.

Captions have no checksum, so they are tokenized and compared with the stored tokens. If these
differ, the shard's checksum says whether it was damaged, or packed with another version of the
tokenizer's packages.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import DamagedSampleError, PackedDataset, sample_key
from unicl_fast.dataset.stored_samples import Description, SampleReader
from unicl_fast.packing.quarantine import count_left_out
from unicl_fast.packing.sources.entries import Entry, PackedFile, PackedPixels, Problem
from unicl_fast.packing.sources.items import Item, Label, refused, spell_classes
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum
from unicl_fast.system.wording import count_of
from unicl_fast.text.tokenizer import Tokenizer

_READ_TOGETHER = 1024  # samples whose captions the tokenizer's threads share


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedSource(Source):
    """A packed data set as a source."""

    folder: Path
    manifest: Manifest


def image_entry(dataset: PackedDataset, index: int) -> Entry:
    """The entry of a sample's image."""
    row = dataset.samples[index]
    holder = dataset.shard_of(index)
    path = holder if is_url(holder) else os.path.join(dataset.folder, holder)
    offset, xxh3 = dataset.offset_of(index), int(row["xxh3"])
    height, width = int(row["height"]), int(row["width"])
    if dataset.image_shape is not None:
        return PackedPixels(path, offset, height, width, xxh3)
    place = dataset.source_place(index)
    size = int(row["size"]) if place is None else place.size
    return PackedFile(path, offset, size, height, width, xxh3)


def _is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed data set, or the remains of one."""
    names = (MANIFEST_NAME, CHECKSUMS_NAME)
    return (folder / "samples.npy").is_file() or all((folder / name).is_file() for name in names)


def _recognises(place: Place) -> bool:
    """Also recognises a folder that only holds packed data sets, in order to refuse it."""
    folders = [place.path / folder for folder in place.folders]
    return _is_packed(place.path) or (bool(folders) and all(map(_is_packed, folders)))


def _read(place: Place, options: ListOptions, spool: Spool) -> PackedSource:
    """Reads a packed data set; ValueError if an array or its quarantine list is damaged."""
    path = place.path
    if not _is_packed(path):
        every = " ".join(f"{path}/{folder}" for folder in sorted(place.folders))
        raise ValueError(f"{path} holds packed data sets: name one, or each: {every}")
    if options.conditions() or options.scores() or options.group_column or options.weight_column:
        raise ValueError(
            f"{path} is a packed data set, which has no columns: leave --where, --min-score, "
            "--group-column and --weight-column out"
        )
    items = spool.new_items()
    with PackedDataset(path) as dataset, contextlib.closing(SampleReader(dataset)) as reader:
        spool.origins |= {str(path / name): None for name in (MANIFEST_NAME, QUARANTINE_NAME)}
        # a bad list is refused now, before all samples are read
        count_left_out(path / QUARANTINE_NAME, num_rows=dataset.manifest.num_quarantined)
        samples = _Samples(dataset, reader)
        for first in range(0, len(dataset), _READ_TOGETHER):
            items.extend(samples.read(range(first, min(first + _READ_TOGETHER, len(dataset)))))
    spelled = spell_classes(dataset.manifest.class_names)
    columns: dict[str, dict[Label, None]] = {
        column: {spelled[number]: None for number in numbers}
        for column, numbers in dataset.manifest.label_columns.items()
    }
    return PackedSource(
        name=path.resolve().name, items=items, labels_are_names=True, columns=columns,
        folder=path, manifest=dataset.manifest,
    )  # fmt: skip


class _Samples:
    """Makes items from one data set's samples."""

    def __init__(self, dataset: PackedDataset, reader: SampleReader) -> None:
        manifest = dataset.manifest
        self._dataset, self._reader = dataset, reader
        self._labels = spell_classes(manifest.class_names)
        tokenizer = Tokenizer(manifest.context_length)
        is_same = manifest.vocabulary_hash == tokenizer.vocabulary_hash
        self._tokenizer = tokenizer if is_same else None
        """None if another tokenizer made the tokens: they cannot be compared."""
        self._damaged: dict[str, bool] = {}
        """By name of shard, for those that were checked."""

    def read(self, indices: Sequence[int]) -> Iterator[Item]:
        """Yields the item of each sample."""
        found = [self._describe(index) for index in indices]
        texts = [text for one in found if isinstance(one, Description) for text in one.captions]
        tokens = iter(encode_all(self._tokenizer, texts) if self._tokenizer else ())
        for index, text in zip(indices, found, strict=True):
            if isinstance(text, str):
                yield refused(sample_key(index), "damaged", text)
                continue
            own = [next(tokens) for _ in text.captions] if self._tokenizer else None
            fault = self._fault_of(index, text, own)
            yield Item(
                name=text.name,
                entry=image_entry(self._dataset, index),
                captions=list(text.captions),
                labels=[self._labels[label] for label in text.labels] if not fault else [],
                problem=Problem("damaged", fault) if fault else None,
                weights=[] if text.weight is None else [text.weight],
                source=text.source,
                groups=[text.group] if text.group else [],
            )

    def _describe(self, index: int) -> Description | str:
        """A sample's texts and origin, or the fault in them."""
        try:
            return self._reader.read_description(index)
        except DamagedSampleError as error:
            return str(error)

    def _fault_of(
        self, index: int, text: Description, tokens: Sequence[npt.NDArray[np.uint16]] | None
    ) -> str:
        """How the texts differ from the packed ones; empty if they do not."""
        fault = next(iter(text_faults(self._dataset, index, text).values()), "")
        if tokens is not None and not fault:
            stored = (self._dataset.caption_tokens(index, which) for which in range(len(tokens)))
            if not all(map(np.array_equal, tokens, stored)) and self._is_damaged(index):
                fault = "its captions are not those that were packed (tokens)"
        return f"{self._dataset.describe(index, 'members')}: {fault}" if fault else ""

    def _is_damaged(self, index: int) -> bool:
        """Whether a sample's shard has another checksum than the manifest says."""
        shard = self._dataset.manifest.shards[int(self._dataset.samples[index]["shard"])]
        if shard.name not in self._damaged:
            found = file_checksum(self._dataset.folder / shard.name)
            self._damaged[shard.name] = found != shard.xxh3
        return self._damaged[shard.name]


def text_faults(dataset: PackedDataset, index: int, text: Description) -> dict[str, str]:
    """How labels, captions and weight in a sample's JSON contradict the arrays, by kind."""
    labels = tuple(dataset.labels_of(index).tolist())
    found, count = len(text.captions), int(dataset.samples[index]["captions_count"])
    faults = {}
    if text.labels != labels:
        faults["labels"] = f"labels are {text.labels[:9]} in its JSON, {labels[:9]} in labels.npy"
    if found != count:
        faults["captions"] = f"{count_of(found, 'caption')} in its JSON, {count} in samples.npy"
    weight = None if dataset.weights is None else dataset.weights[index]
    if weight != (None if text.weight is None else np.float32(text.weight)):
        faults["weight"] = f"the weight is {text.weight} in its JSON, {weight} in weights.npy"
    return faults


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
    """Tokenizes texts in all threads; invalid text, such as a lone surrogate, has no tokens."""
    try:
        return tokenizer.encode(texts)
    except (UnicodeError, TypeError):
        if len(texts) == 1:
            return [np.empty(0, np.uint16)]
        return [ids for text in texts for ids in encode_all(tokenizer, [text])]


def join_templates(sources: Sequence[PackedSource]) -> tuple[str, ...]:
    """The prompt templates of all sources with classes, which must agree; () without classes."""
    found = [source for source in sources if source.manifest.class_names]
    for source in found:
        if source.manifest.templates != found[0].manifest.templates:
            first, other = (
                f"{one.folder} has {count_of(len(one.manifest.templates), 'prompt template')} "
                f"({one.manifest.templates[0]!r}, ...)"
                for one in (found[0], source)
            )
            raise ValueError(
                f"{first} and {other}: say by --templates which to use: a file, imagenet or simple"
            )
    return found[0].manifest.templates if found else ()


def join_parents(sources: Sequence[PackedSource]) -> dict[str, str]:
    """The parent of each class in the hierarchies of packed data sets, which must agree."""
    parents: dict[str, str] = {}
    for source in sources:
        if (hierarchy := source.manifest.hierarchy) is None:
            continue
        own = (*spell_classes(source.manifest.class_names), *hierarchy.names)
        for label, number in zip(own, hierarchy.parents, strict=True):
            if number >= 0 and parents.setdefault(label, own[number]) != own[number]:
                name, above, other = (
                    each.partition("\0")[0] for each in (label, own[number], parents[label])
                )
                raise ValueError(
                    f"{source.folder} puts the class {name!r} under {above!r}, another data set "
                    f"under {other!r}: say by --hierarchy which is right"
                )
    return parents


def join_licenses(sources: Sequence[Source]) -> str:
    """All licenses, each once; "not stated for a part" if only some sources have one."""
    licenses = [one.manifest.license if isinstance(one, PackedSource) else "" for one in sources]
    if not any(licenses):
        return ""
    return "; ".join(dict.fromkeys(license or "not stated for a part" for license in licenses))


KIND = SourceKind(recognises=_recognises, read=_read)
