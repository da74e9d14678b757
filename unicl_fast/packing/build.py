"""Packs sources into one data set folder: `unicl-pack build` as a function.

The chapters: read the sources (`sources`), number their labels, choose and shuffle the samples
(`samples`), check images in workers (`workers`), write (`unicl_fast.dataset.writer`).
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import numpy as np
import xxhash

from unicl_fast.dataset.manifest import QUARANTINE_NAME, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.stored_samples import SampleReader, equal_images
from unicl_fast.dataset.writer import DatasetWriter, PackedSample, require_free
from unicl_fast.packing.build_options import BuildOptions
from unicl_fast.packing.in_place import Places, require_in_place, shuffled_files
from unicl_fast.packing.label_space import (
    LabelSpace,
    collect_label_space,
    name_paths,
    place_classes,
    read_label_space,
    refuse_numbers,
)
from unicl_fast.packing.quarantine import (
    are_wanted,
    describe_left_out,
    read_leave_out,
    read_left_out,
)
from unicl_fast.packing.ray_engine import check_on_ray
from unicl_fast.packing.samples import Samples, shuffled_order
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import PATH, Item, Label
from unicl_fast.packing.sources.packed import (
    PackedSource,
    join_licenses,
    join_parents,
    join_templates,
)
from unicl_fast.packing.sources.read_sources import read_sources
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import require_there
from unicl_fast.packing.sources.urls import require_lasting
from unicl_fast.packing.split import SIDES, plain_key, split_samples
from unicl_fast.packing.staging import StagedSources, default_work_folder
from unicl_fast.packing.upload import require_free_url, upload_command, upload_dataset
from unicl_fast.packing.work_folder import WorkFolder, describe_options, work_folder
from unicl_fast.packing.workers import (
    Checked,
    ImageOptions,
    Task,
    answer_bytes,
    check_in_order,
    require_one_size,
)
from unicl_fast.system.bar import Bar
from unicl_fast.system.checked_fields import require_short
from unicl_fast.system.program import require_utf8_names
from unicl_fast.system.version import __version__
from unicl_fast.system.wording import count_of_kind, without_secrets
from unicl_fast.text.class_lists import read_templates, templates_for
from unicl_fast.text.hierarchies import Hierarchy, read_names, read_parents
from unicl_fast.text.tokenizer import CONTEXT_LENGTH, Tokenizer, vocabulary_hash


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """The outcome of a build, in numbers."""

    out: Path | str
    """A folder, or the URL that it was uploaded to."""
    manifest: Manifest
    seconds: float
    num_reencoded: int
    quarantined: str
    """Counts by kind and the first few reasons, as text."""
    passed_over: dict[str, int]
    """Skipped files and rows, and dropped captions, by reason."""
    notes: dict[str, int]
    """Remarks on rows and images that were read, with their counts."""
    num_copies: int
    """Images whose bytes equal an earlier sample's."""
    first_caption: str
    """The first sample's that has one; empty without captions."""
    num_taken_over: int = 0
    """Samples that an earlier, interrupted run of this build had packed."""
    was_complete: bool = False
    """Whether an earlier run had packed everything."""
    held_out: BuildSummary | None = None
    """The other data set of --split; this one is OUT/train."""


def build_dataset(
    sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], **options: Any
) -> BuildSummary:
    """Packs sources into one data set.

    Called again with the same arguments, an interrupted build resumes after its last finished
    shard, with the same result; a complete one stays as it is.

    Args:
        sources: class folders, lists, archives, ... (docs/sources.md), or their URLs.
        out: folder to make, or URL.
        **options: fields of `BuildOptions`.

    Raises:
        ValueError: a source, list, label or argument is invalid, nothing could be packed, or the
            folder holds another build, unfinished or complete.
        FileNotFoundError: a source or file of names is missing, or a source vanishes meanwhile.
        StorageError: a store cannot be reached.
        RuntimeError: packed, but not uploaded; the message says how to resume.
    """
    chosen = BuildOptions(**options)
    if is_url(out) and chosen.engine == "ray":
        raise ValueError(
            "--engine ray needs a folder as --out, on a file system that all machines of the "
            "cluster see under the same path; unicl-pack upload copies it to a URL"
        )
    chosen.check()
    paths = [os.fspath(source) for source in sources]
    if not paths:
        raise ValueError("name at least one source: class folders, a zip of them, a list, ...")
    require_utf8_names()
    if not is_url(out):
        return _build(paths, Path(out), chosen)
    if chosen.split is not None:
        raise ValueError("--split needs a folder as --out; unicl-pack upload copies both sides")
    url, shown = str(out), without_secrets(str(out)).rstrip("/")
    holder = default_work_folder() / xxhash.xxh3_64_hexdigest(shown.encode())
    folder = holder / shown.rpartition("/")[2]
    require_free_url(url, folder)
    try:
        summary = _build(paths, folder, chosen)
    except BaseException:
        with contextlib.suppress(OSError):  # it holds finished shards, or is not there
            holder.rmdir()
        raise
    try:
        upload_dataset(folder, url, progress=chosen.progress)
    except (RuntimeError, OSError) as error:
        resume = upload_command(folder, without_secrets(url))
        raise RuntimeError(f"packed, but not uploaded: {error}. Resume by: {resume}") from error
    shutil.rmtree(holder)
    return replace(summary, out=without_secrets(url))


def _build(sources: list[str], out: Path, options: BuildOptions) -> BuildSummary:
    """Packs sources into a folder, or into one for each side of a split."""
    started = time.perf_counter()
    outs = [out] if options.split is None else [out / side for side in SIDES]
    if options.split is not None and out.is_dir():
        known = {name for side in outs for name in (side.name, f"{side.name}.partial")}
        if others := sorted(set(os.listdir(out)) - known):
            raise ValueError(f"{out} holds {others[0]}: name another --out for --split")
    try:
        with contextlib.ExitStack() as stack:
            gc.freeze()  # what exists needs no collection, which saves a tenth of the time
            stack.callback(gc.unfreeze)
            works = [stack.enter_context(work_folder(one, restart=options.restart)) for one in outs]
            summaries = [
                _summarize(work, outcome, started=started)
                for work, outcome in zip(works, _pack_all(sources, works, options), strict=True)
            ]
            for work in works:
                work.remove()
    finally:
        if options.split is not None:
            with contextlib.suppress(OSError):  # not empty, unless nothing was packed
                out.rmdir()
    if options.split is None:
        return summaries[0]
    return replace(summaries[0], held_out=summaries[1])


def _pack_all(
    sources: list[str], works: Sequence[WorkFolder], options: BuildOptions
) -> list[dict[str, Any]]:
    """Reads the sources once and packs each side; returns what the data sets do not record."""
    if options.in_place:
        require_lasting(sources)
    # copies and unpacked files stay with the finished shards of the side being packed
    place = next((work for work in works if not work.is_complete), works[0])
    staged = StagedSources(sources, options.image_root, place.copies)
    paths = sources if options.in_place else staged.paths
    for work in works:
        if not work.is_complete:
            require_free(work.out)
        work.require_same("options", describe_options(sources, options.repeated()))
        if staged.versions:
            work.require_same("sources under URLs", staged.versions)
    if not (staged.are_known and all(work.is_complete for work in works)):
        if not options.in_place:
            staged.fetch()
            options = replace(options, image_root=staged.image_root)
        with Spool(place.spool) as spool:
            contents = _read(paths, options, spool, works)
            return [_pack(contents, side, work, options) for side, work in enumerate(works)]
    return [dict(work.record["summary"]) for work in works]


def _summarize(work: WorkFolder, outcome: dict[str, Any], *, started: float) -> BuildSummary:
    """The summary of a finished data set; `outcome` has the fields that are not in it."""
    out, manifest = work.out, Manifest.load(work.out)
    if work.is_complete:
        outcome = outcome | {"num_taken_over": manifest.num_samples, "was_complete": True}
    with PackedDataset(out, verify=False) as dataset:
        num_copies = sum(len(group) - 1 for group in equal_images(dataset))
        captioned = np.flatnonzero(dataset.samples["captions_count"])[:1].tolist()
        with contextlib.closing(SampleReader(dataset)) as reader:
            shown = [reader.read(sample).description.captions[0] for sample in captioned]
    return BuildSummary(
        out=out,
        manifest=manifest,
        seconds=time.perf_counter() - started,
        quarantined=describe_left_out(out / QUARANTINE_NAME),
        num_copies=num_copies,
        first_caption="".join(shown),
        **outcome,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Contents:
    """The contents of the data set to pack, or of both sides of a split."""

    sides: Sequence[Samples]
    """In the order of the sources."""
    numbers: dict[Label, int]
    """The class of each label, as its source spells it."""
    facts: dict[str, Any]
    """Fields of the manifests."""
    has_weights: bool
    packed: Sequence[PackedSource]
    passed_over: Counter[str]
    notes: Counter[str]


def _pack(
    contents: _Contents, side: int, work: WorkFolder, options: BuildOptions
) -> dict[str, Any]:
    """Writes a data set, or the rest of one; returns what it does not record."""
    if work.is_complete:
        return dict(work.record["summary"])
    images = options.check()
    places = Places(work.out) if options.in_place else None
    # samples that were left out before cannot be packed now; the first side lists them
    packed = contents.packed if side == 0 else ()
    with DatasetWriter(
        work.out, shard_bytes=options.shard_bytes, images=options.kept_as, work=work.path,
        has_weights=contents.has_weights,
    ) as writer:  # fmt: skip
        num_taken_over, num_done = writer.num_samples, writer.num_places
        if num_taken_over:
            num_done -= sum(one.manifest.num_quarantined for one in packed)
        else:
            lists = (read_left_out(one.folder / QUARANTINE_NAME) for one in packed)
            for row in itertools.chain.from_iterable(lists):
                writer.quarantine(**asdict(row))
        samples, seed = contents.sides[side], options.seed
        order = (
            shuffled_files(samples, seed=seed)
            if options.in_place
            else shuffled_order(len(samples), seed=seed)
        )
        left = samples.at(order[num_done:])
        # closed here: an error keeps it, and the exit of the program would meet its closed pipes
        with contextlib.closing(_check(left, images, writer.notes, options)) as checked:
            bar = Bar(
                checked, total=len(order), initial=num_done, desc="packing", unit=" images",
                shown=options.progress,
            )  # fmt: skip
            _write(bar, writer, contents.numbers, places, is_raw=options.format == "raw")
        if writer.num_samples:
            summary = {
                "num_reencoded": writer.notes.get("num_reencoded", 0),
                "passed_over": dict(contents.passed_over),
                "notes": dict(contents.notes),
            }
            writer.finish(
                tokenizer=Tokenizer.name,
                vocabulary_hash=vocabulary_hash(),
                context_length=CONTEXT_LENGTH,
                source=work.record["options"]["sources"],
                seed=options.seed,
                tool_version=__version__,
                **contents.facts,
                made_of={**work.record, "summary": summary},
            )
            return summary | {"num_taken_over": num_taken_over}
    parts = [count_of_kind(count, kind) for kind, count in contents.passed_over.items()]
    passed = f"\npassed over: {', '.join(parts)}" if parts else ""
    left_out = describe_left_out(writer.aside / QUARANTINE_NAME)
    raise ValueError(f"nothing could be packed: {left_out}{passed}")


def _read(
    paths: list[str], options: BuildOptions, spool: Spool, works: Sequence[WorkFolder]
) -> _Contents:
    """Reads all sources, numbers their labels, chooses the samples and splits them."""
    unwanted = read_leave_out(options.leave_out) if options.leave_out else None
    read = read_sources(paths, options, spool)
    if options.in_place:
        require_in_place(read, spool)
    has_weights = any(source.items.has_weights for source in read)
    if options.weight_column and not has_weights:
        raise ValueError(
            f"no SOURCE has a sample with a weight, a positive number, in {options.weight_column!r}"
            " (--weight-column)"
        )
    packed = [source for source in read if isinstance(source, PackedSource)]
    space, numbers = _number_labels(read, options.class_names, spool, works)
    templates: tuple[str, ...] = ()
    if space.names and options.templates:
        templates = read_templates(options.templates)
    elif space.names:
        templates = join_templates(packed) or templates_for(space.names)
    hierarchy = _choose_hierarchy(options, space, packed, numbers)
    columns = _join_columns(read, space, numbers, are_named=bool(options.label_column))
    passed_over = sum((source.passed_over for source in read), Counter[str]())
    notes = sum((source.notes + source.items.notes() for source in read), Counter[str]())
    uses = Counter(itertools.chain(*columns.values()))
    if shared := [space.names[number] for number, count in uses.items() if count > 1]:
        what = f"classes of several label columns, counted in each, such as {shared[0]}"
        notes[what] = len(shared)
    samples = Samples(read)
    if unwanted:
        wanted = are_wanted(samples, unwanted, options.leave_out)
        passed_over[f"images named in {options.leave_out}"] = int((~wanted).sum())
        samples = samples.at(np.flatnonzero(wanted))
    sides: Sequence[Samples] = [samples]
    if options.split is not None:
        *sides, counts = split_samples(samples, numbers, options)
        notes += counts
        # which images are too slow to compare can differ between two starts
        for work in works if not all(work.is_complete for work in works) else ():
            work.require_same("split", {"held out": sides[1].checksum()})
    facts = {
        "class_names": space.names, "label_columns": columns, "hierarchy": hierarchy,
        "templates": templates, "license": options.license or join_licenses(read),
    }  # fmt: skip
    for name, value in facts.items():
        require_short(value.names if isinstance(value, Hierarchy) else value, name=name)
    return _Contents(
        sides=sides, numbers=numbers, facts=facts, has_weights=has_weights, packed=packed,
        passed_over=+passed_over, notes=+notes,  # `+` drops the zeros
    )  # fmt: skip


def _choose_hierarchy(
    options: BuildOptions,
    space: LabelSpace,
    packed: Sequence[PackedSource],
    labels: Iterable[Label],
) -> Hierarchy | None:
    """The hierarchy that --hierarchy gives, or the packed sources and labels that are paths."""
    if options.hierarchy:
        path, words = Path(options.hierarchy), options.hierarchy_names
        parents = read_parents(path, columns=options.hierarchy_columns)
        known = read_names(Path(words)) if words else {}
        return place_classes(space, parents, known, origin=str(path))
    names, parents = name_paths(labels), join_parents(packed)
    parents |= {path: path.rpartition(PATH)[0] for path in names if PATH in path}
    return place_classes(space, parents, names, origin="the sources") if parents else None


def _join_columns(
    read: Sequence[Source], space: LabelSpace, numbers: dict[Label, int], *, are_named: bool
) -> dict[str, tuple[int, ...]]:
    """The classes of the label columns that options or packed data sets name, if several."""
    found: dict[str, set[int]] = {}
    for source in read:
        if not (are_named or isinstance(source, PackedSource)):
            continue  # `label` and `labels` are one column
        for column, labels in source.columns.items():
            each = (numbers.get(label, space.find(str(label))) for label in labels)
            if own := {number for number in each if number is not None}:
                found.setdefault(column, set()).update(own)
    several = found if len(found) > 1 else {}
    return {column: tuple(sorted(own)) for column, own in several.items()}


def _number_labels(
    read: Sequence[Source], class_names: str, spool: Spool, works: Sequence[WorkFolder]
) -> tuple[LabelSpace, dict[Label, int]]:
    """One label space for all sources, and the class number of each of their labels."""
    labels: dict[Label, None] = {}
    checksums = {"what else was read": spool.checksum_origins()}
    for number, source in enumerate(read, start=1):
        own = source.items.labels()
        checksums[f"source {number}, {source.name}"] = source.items.checksum()
        if not class_names and not source.labels_are_names:
            refuse_numbers(own, source.name)
        labels |= own
    for work in works:
        work.require_same("sources", checksums)
    packed = [one.manifest.class_names for one in read if isinstance(one, PackedSource)]
    names = name_paths(labels)
    spelled = {label: names.get(str(label), label) for label in labels}
    if class_names:
        space = read_label_space(class_names)
    else:
        space = collect_label_space(spelled.values(), packed)
    return space, {label: space.number_of(name) for label, name in spelled.items()}


def _check(
    samples: Samples, images: ImageOptions, notes: Mapping[str, Any], options: BuildOptions
) -> Generator[tuple[str, Item, Checked | Problem], None, None]:
    """Each sample with its result, in order; raises FileNotFoundError if a source has vanished."""
    check = check_on_ray if options.engine == "ray" else check_in_order
    # Samples under way are kept, since making them again costs as much as writing them.
    ahead, behind = itertools.tee(samples)
    # Tasks are made as they are handed out: the size of the first image can be known by then.
    results = check(
        (
            Task(item.name, item.entry, item.captions, answer_bytes(images, notes))
            for _, item in ahead
            if item.problem is None and item.entry is not None
        ),
        options=images,
        workers=options.workers,
    )
    with contextlib.closing(results):
        for source, item in behind:
            result = next(results) if item.problem is None else item.problem
            if isinstance(result, Problem) and item.entry is not None and item.problem is None:
                require_there(item.entry, source, result)
            yield source, item, result


def _write(
    checked: Iterator[tuple[str, Item, Checked | Problem]],
    writer: DatasetWriter,
    numbers: dict[Label, int],
    places: Places | None,
    *,
    is_raw: bool,
) -> None:
    """Writes sound samples, and lists the others in quarantine.csv."""
    for source, item, result in checked:
        if isinstance(result, Problem):
            writer.quarantine(source=source, name=item.name, **msgspec.structs.asdict(result))
            continue
        place = None
        if places is not None and not result.data:
            assert item.entry is not None
            place = places.of(item.entry)
        if is_raw:
            require_one_size(result, item.name, writer.notes)
        labels = [numbers[label] for label in item.labels]
        writer.add(
            PackedSample(
                image=result.data,
                extension=result.extension,
                height=result.height,
                width=result.width,
                xxh3=result.xxh3,
                captions=item.captions,
                tokens=[np.frombuffer(ids, np.uint16) for ids in result.tokens],
                labels=labels if len(labels) < 2 else list(dict.fromkeys(labels)),
                source=source,
                name=item.name,
                place=place,
                weight=fmean(item.weights or [1.0]) if writer.has_weights else None,
                group=next(filter(None, map(plain_key, item.groups)), ""),
            )
        )
        if result.reencoded:
            writer.notes["num_reencoded"] = writer.notes.get("num_reencoded", 0) + 1
