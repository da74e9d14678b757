"""Packs sources into one data set folder: `unicl-pack build` as a function.

The chapters of a build in their order; the parts are elsewhere. `sources` reads what the user has,
`class_names` joins labels, `pack_workers` checks pictures in parallel, `unicl_fast.shard_writer`
writes the folder. The command line is `pack_dataset`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import unicl_fast
from unicl_fast.images import MAX_PIXELS, MAX_SIDE, RESIZE_QUALITY
from unicl_fast.prompts import read_templates
from unicl_fast.shard_writer import (
    DEFAULT_SHARD_BYTES,
    DatasetWriter,
    PackedSample,
    require_free,
)
from unicl_fast.tokenizer import Tokenizer
from unicl_fast.tools.class_names import (
    LabelSpace,
    collect_label_space,
    read_label_space,
    refuse_numbers,
)
from unicl_fast.tools.pack_workers import Checked, PictureOptions, Task, check_in_order
from unicl_fast.tools.retry import choose_listed, read_quarantine, require_same_classes
from unicl_fast.tools.sources import (
    Item,
    Label,
    ListOptions,
    Problem,
    Source,
    read_sources,
    split_condition,
)
from unicl_fast.tools.spool import Spool

DEFAULT_PICTURE_SECONDS = 30.0
"""A hundred times what the largest ordinary photograph takes."""

_REASONS_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary:
    """What a build did."""

    out: Path
    num_samples: int
    num_captions: int
    num_labels: int
    num_reencoded: int
    num_quarantined: int
    class_names: tuple[str, ...]
    quarantined: str
    """Counts by kind and the first few reasons, as text."""
    passed_over: dict[str, int]
    """Files and rows that were not tried, by reason."""
    num_bytes: int
    """Bytes of the shards."""
    seconds: float


def build_dataset(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    class_names: str = "",
    templates: str = "",
    image_column: str = "",
    caption_column: str = "",
    label_column: str = "",
    image_root: str = "",
    where: Sequence[str] = (),
    retry: str | os.PathLike[str] = "",
    resize: str = "",
    quality: int = RESIZE_QUALITY,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_pixels: int = MAX_PIXELS,
    picture_seconds: float = DEFAULT_PICTURE_SECONDS,
    workers: int = 0,
    progress: bool = True,
) -> BuildSummary:
    """Packs sources into one data set folder; `pack_dataset.Build` explains the arguments.

    Starts worker processes by spawning them, so a script that calls this must guard its main part
    by `if __name__ == "__main__":`.

    Raises:
        ValueError: a source, list, label or argument is not what it should be, or nothing at all
            could be packed.
        FileNotFoundError: a source or file of names is not there.
    """
    started = time.perf_counter()
    out = Path(out)
    if not sources:
        raise ValueError("name at least one source: class folders, a zip of them, a list, ...")
    _require_in("--seed", seed, 0, 2**63 - 1)
    _require_in("--quality", quality, 1, 100)
    _require_in("--workers", workers, 0, 1024)
    _require_in("--max-pixels", max_pixels, 1, MAX_SIDE**2)
    _require_in("--picture-seconds", picture_seconds, 0, 86_400)
    for condition in where:
        split_condition(condition)  # said before any source is read
    options = PictureOptions(
        short_side=_parse_resize(resize),
        quality=quality,
        max_pixels=max_pixels,
        seconds=picture_seconds,
    )
    require_free(out)
    lists = ListOptions(
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        image_root=image_root,
        where=tuple(where),
    )
    places = [os.fspath(source) for source in sources]
    listed = read_quarantine(Path(retry)) if retry else None
    spool = Spool(out)
    read = read_sources(places, lists, spool)
    space, numbers = _number_labels(read, class_names)
    template_list = read_templates(templates or "imagenet") if space.names else ()
    tokenizer = Tokenizer()
    passed_over = sum((source.passed_over for source in read), Counter[str]())
    if listed is None:
        found = [(source.name, item) for source in read for item in source.items]
    else:  # labels keep the numbers that they have in the build of all
        require_same_classes(Path(retry), space.names)
        found = choose_listed(listed, read, passed_over)
    samples = _shuffle(found, seed=seed)
    problems = _Problems()
    num_reencoded = 0
    with spool, DatasetWriter(out, shard_bytes=shard_bytes) as writer:
        results = _check(
            samples,
            options=options,
            context_length=tokenizer.context_length,
            workers=workers or len(os.sched_getaffinity(0)),
        )
        for (source, item), result in tqdm(
            zip(samples, results, strict=True),
            total=len(samples),
            desc="packing",
            unit=" pictures",
            disable=not progress,
            smoothing=0.1,
        ):
            if isinstance(result, Problem):
                writer.quarantine(
                    source=source, name=item.name, kind=result.kind, message=result.message
                )
                problems.note(item.name, result)
            else:
                writer.add(_packed_sample(source, item, result, numbers))
                num_reencoded += result.picture.reencoded
        if writer.num_samples == 0:
            raise ValueError(f"nothing could be packed: {problems.describe()}")
        manifest = writer.finish(
            tokenizer=tokenizer.name,
            vocabulary_hash=tokenizer.vocabulary_hash,
            context_length=tokenizer.context_length,
            class_names=space.names,
            templates=template_list,
            source=places,
            seed=seed,
            tool_version=unicl_fast.__version__,
        )
    return BuildSummary(
        out=out,
        num_samples=manifest.num_samples,
        num_captions=manifest.num_captions,
        num_labels=manifest.num_labels,
        class_names=manifest.class_names,
        num_reencoded=num_reencoded,
        num_quarantined=manifest.num_quarantined,
        quarantined=problems.describe(),
        passed_over=dict(passed_over),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        seconds=time.perf_counter() - started,
    )


class _Problems:
    """Counts refusals by kind and keeps the first few for the closing summary."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: list[str] = []

    def note(self, name: str, problem: Problem) -> None:
        self._counts[problem.kind] += 1
        if len(self._first) < _REASONS_SHOWN:
            self._first.append(f"{name}: {problem.message}")

    def describe(self) -> str:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self._counts.most_common())
        return "\n".join([counts, *(f"  {reason}" for reason in self._first)])


def _number_labels(read: Sequence[Source], class_names: str) -> tuple[LabelSpace, dict[Label, int]]:
    """One label space for all sources, and the class number of each label found in them."""
    labels: dict[Label, None] = {}
    for source in read:
        found = dict.fromkeys(label for item in source.items for label in item.labels)
        if not class_names and not source.labels_are_names:
            refuse_numbers(found, source.name)
        labels |= found
    space = read_label_space(class_names) if class_names else collect_label_space(labels)
    return space, {label: space.number_of(label) for label in labels}


def _shuffle(samples: list[tuple[str, Item]], *, seed: int) -> list[tuple[str, Item]]:
    """The same order for the same seed, on any machine and with any NumPy.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the samples are sorted by raw 64-bit numbers.
    """
    numbers = np.random.PCG64(seed).random_raw(len(samples))
    return [samples[place] for place in np.argsort(numbers, kind="stable")]


def _check(
    samples: Sequence[tuple[str, Item]],
    *,
    options: PictureOptions,
    context_length: int,
    workers: int,
) -> Iterator[Checked | Problem]:
    """One result for each sample, in order; samples with a problem never reach a worker."""
    results = check_in_order(
        (
            Task(name=item.name, entry=item.entry, captions=tuple(item.captions))
            for _, item in samples
            if item.problem is None and item.entry is not None
        ),
        options=options,
        context_length=context_length,
        workers=workers,
    )
    for _, item in samples:
        yield next(results) if item.problem is None else item.problem


def _packed_sample(
    source: str, item: Item, checked: Checked, numbers: dict[Label, int]
) -> PackedSample:
    picture = checked.picture
    return PackedSample(
        image=picture.data,
        extension=picture.extension,
        height=picture.height,
        width=picture.width,
        xxh3=checked.xxh3,
        captions=item.captions,
        tokens=checked.tokens,
        labels=tuple(dict.fromkeys(numbers[label] for label in item.labels)),
        source=source,
        name=item.name,
    )


def _parse_resize(resize: str) -> int:
    """`short:256` -> 256; nothing -> 0."""
    if not resize:
        return 0
    kind, _, pixels = resize.partition(":")
    if kind != "short" or not pixels.isdecimal() or int(pixels) < 1:
        raise ValueError(f"--resize takes short:PIXELS, such as short:256, not {resize!r}")
    return int(pixels)


def _require_in(name: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:,} to {high:,}, not {value:,}")
