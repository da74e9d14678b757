"""Packs sources into one data set folder: `unicl-pack build` as a function.

The chapters of a build in their order; the parts are elsewhere. `sources` reads what the user has,
`class_names` joins labels, `pack_workers` checks images in parallel, `unicl_fast.dataset.writer`
writes the folder. The command line is `pack_dataset`.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

import unicl_fast
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.dataset.writer import (
    DEFAULT_SHARD_BYTES,
    DatasetWriter,
    PackedSample,
    require_free,
)
from unicl_fast.images.check import MAX_PIXELS, MAX_SIDE, RESIZE_QUALITY, CheckedImage, ImageFormat
from unicl_fast.packing.build.class_names import (
    LabelSpace,
    collect_label_space,
    read_label_space,
    refuse_numbers,
)
from unicl_fast.packing.build.duplicates import join_duplicates
from unicl_fast.packing.build.ray_engine import Engine, check_on_ray, require_engine
from unicl_fast.packing.build.retry import choose_listed, read_quarantine, require_same_classes
from unicl_fast.packing.build.sample_order import shuffled_order
from unicl_fast.packing.build.sample_views import AllSamples, ChosenSamples, Sample, choose
from unicl_fast.packing.build.survey import describe_options, stamp_all, survey_source
from unicl_fast.packing.build.work_folder import WorkFolder
from unicl_fast.packing.build.worker_pool import Checked, ImageOptions, Task, check_in_order
from unicl_fast.packing.leave_out import LeaveOut
from unicl_fast.packing.quarantine import read_left_out
from unicl_fast.packing.sources.read_sources import (
    Item,
    Label,
    ListOptions,
    Problem,
    Source,
    read_sources,
    split_condition,
)
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.system.machine import usable_cores
from unicl_fast.text.class_lists import read_templates
from unicl_fast.text.tokenizer import Tokenizer

DEFAULT_IMAGE_SECONDS = 30.0
"""A hundred times what the largest ordinary photograph takes."""

_REASONS_SHOWN = 5
_FREE_TO_CHANGE = {"out", "restart", "workers", "engine", "progress"}
"""Arguments that a build which goes on need not repeat: they leave no trace in the data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSummary:
    """What a build did."""

    out: Path | str
    """A folder, or the URL that it was uploaded to."""
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
    image_size: tuple[int, int] | None
    """Height and width of all images of a raw data set."""
    num_bytes: int
    """Bytes of the shards, and of decoded images."""
    seconds: float
    num_taken_over: int = 0
    """Samples that an earlier run of the same build had packed, before it was stopped."""


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
    leave_out: str = "",
    duplicates: Literal["keep", "join"] = "keep",
    retry: str | os.PathLike[str] = "",
    resize: str = "",
    quality: int | None = None,
    format: ImageFormat = "keep",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_pixels: int = MAX_PIXELS,
    image_seconds: float = DEFAULT_IMAGE_SECONDS,
    workers: int = 0,
    engine: Engine = "local",
    restart: bool = False,
    source_names: Sequence[str] = (),
    progress: bool = True,
) -> BuildSummary:
    """Packs sources into one data set folder; `pack_dataset.Build` explains the arguments.

    A build that was stopped or killed goes on behind its last finished shard when it is called with
    the same arguments, and the result is the same as if nothing had happened.
    `source_names` are what the manifest calls the sources, where these are copies.

    Starts worker processes by spawning them, so a script that calls this must guard its main part
    by `if __name__ == "__main__":`.

    Raises:
        ValueError: a source, list, label or argument is not what it should be, nothing at all
            could be packed, or an unfinished build in this place is another one.
        FileNotFoundError: a source or file of names is not there.
    """
    arguments = {name: value for name, value in locals().items() if name not in _FREE_TO_CHANGE}
    started = time.perf_counter()
    out = Path(out)
    if not sources:
        raise ValueError("name at least one source: class folders, a zip of them, a list, ...")
    _require_in("--seed", seed, 0, 2**63 - 1)
    _require_in("--workers", workers, 0, 1024)
    _require_in("--max-pixels", max_pixels, 1, MAX_SIDE**2)
    _require_in("--image-seconds", image_seconds, 0, 86_400)
    require_engine(engine)
    for condition in where:
        split_condition(condition)  # said before any source is read
    short_side, square_side = _parse_resize(resize, max_pixels=max_pixels)
    options = ImageOptions(
        short_side=short_side,
        square_side=square_side,
        quality=_used_quality(quality, format=_known_format(format), resize=resize),
        max_pixels=max_pixels,
        seconds=image_seconds,
        format=format,
    )
    lists = ListOptions(
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
        image_root=image_root,
        where=tuple(where),
    )
    with WorkFolder(out, restart=restart) as work:
        is_done = work.summary is not None and (out / MANIFEST_NAME).is_file()
        if not is_done:
            require_free(out)
        work.require_same("options", describe_options(arguments))
        if not is_done:
            _pack(
                [os.fspath(source) for source in sources],
                out,
                work,
                source_names=list(source_names),
                lists=lists,
                options=options,
                seed=seed,
                class_names=class_names,
                templates=templates,
                leave_out=leave_out,
                join=duplicates == "join",
                retry=retry,
                shard_bytes=shard_bytes,
                workers=workers,
                engine=engine,
                progress=progress,
            )
        assert work.summary is not None, "noted before the data set is renamed"
        manifest = Manifest.load(out)
        summary = BuildSummary(
            out=out,
            num_samples=manifest.num_samples,
            num_captions=manifest.num_captions,
            num_labels=manifest.num_labels,
            class_names=manifest.class_names,
            num_quarantined=manifest.num_quarantined,
            num_bytes=manifest.num_bytes,
            seconds=time.perf_counter() - started,
            **work.summary,
        )
        work.remove()
    return summary


def _pack(
    places: list[str],
    out: Path,
    work: WorkFolder,
    *,
    source_names: list[str],
    lists: ListOptions,
    options: ImageOptions,
    seed: int,
    class_names: str,
    templates: str,
    leave_out: str,
    join: bool,
    retry: str | os.PathLike[str],
    shard_bytes: int,
    workers: int,
    engine: Engine,
    progress: bool,
) -> None:
    """Reads the sources and writes the data set, from its beginning or from where it stands."""
    unwanted = LeaveOut(leave_out)
    listed = read_quarantine(retry) if retry else None
    spool = Spool(out, folder=work.spool)
    read = read_sources(places, lists, spool)
    space, numbers = _number_labels(read, class_names, spool, work)
    template_list = read_templates(templates or "imagenet") if space.names else ()
    tokenizer = Tokenizer()
    passed_over = sum((source.passed_over for source in read), Counter[str]())
    found: Sequence[Sample]
    if listed is None:
        found = AllSamples(read)
    else:  # labels keep the numbers that they have in the build of all
        require_same_classes(Path(retry), space.names)
        found = choose_listed(listed, read, passed_over)
    if unwanted:
        wanted = choose(found, lambda sample: not unwanted.take(sample[0], sample[1].name))
        passed_over[f"images named in {leave_out}"] = len(found) - len(wanted)
        found = wanted
    problems = _Problems()
    one_size = _OneSize(options.square_side) if options.format == "raw" else None
    images: Literal["encoded", "raw"] = "encoded" if one_size is None else "raw"
    with (
        spool,
        DatasetWriter(out, shard_bytes=shard_bytes, images=images, work=work.path) as writer,
    ):
        num_taken_over = writer.num_samples
        num_reencoded: int = writer.notes.get("num_reencoded", 0)
        if writer.num_quarantined:
            for row in read_left_out(writer.aside / QUARANTINE_NAME):
                problems.note(row.name, Problem(kind=row.kind, message=row.message))
        if one_size is not None and "first_image" in writer.notes:
            one_size.restore(*writer.notes["first_image"])
        if join:
            found = join_duplicates(
                found,
                spool.new_items(),
                max_file_bytes=options.max_file_bytes,
                workers=workers or usable_cores(),
                progress=progress,
            )
        order = shuffled_order(len(found), seed=seed)[writer.num_places :]
        samples = ChosenSamples(found, order)
        checked = _check(
            samples,
            options=options,
            one_size=one_size,
            context_length=tokenizer.context_length,
            workers=workers,
            engine=engine,
        )
        for source, item, result in tqdm(
            checked,
            total=len(found),
            initial=writer.num_places,
            desc="packing",
            unit=" images",
            disable=not progress,
            smoothing=0.1,
        ):
            if isinstance(result, Problem):
                writer.quarantine(
                    source=source, name=item.name, kind=result.kind, message=result.message
                )
                problems.note(item.name, result)
            else:
                if one_size is not None:
                    one_size.require(result.image, item.name)
                    writer.notes["first_image"] = one_size.first
                writer.add(_packed_sample(source, item, result, numbers))
                num_reencoded += result.image.reencoded
                writer.notes["num_reencoded"] = num_reencoded
        if writer.num_samples == 0:
            parts = [f"{count:,} {what}" for what, count in passed_over.items()]
            passed = f"\npassed over: {', '.join(parts)}" if parts else ""
            raise ValueError(f"nothing could be packed: {problems.describe()}{passed}")
        work.note_summary(
            {
                "num_reencoded": num_reencoded,
                "quarantined": problems.describe(),
                "passed_over": dict(passed_over),
                "image_size": None if one_size is None else one_size.size,
                "num_taken_over": num_taken_over,
            }
        )
        writer.finish(
            tokenizer=tokenizer.name,
            vocabulary_hash=tokenizer.vocabulary_hash,
            context_length=tokenizer.context_length,
            class_names=space.names,
            templates=template_list,
            source=source_names or places,
            seed=seed,
            tool_version=unicl_fast.__version__,
        )


class _OneSize:
    """The size of all images of a raw data set, once it is known."""

    def __init__(self, square_side: int) -> None:
        """`square_side`: what they are scaled to; 0 where the first image decides."""
        self.size = (square_side, square_side) if square_side else None
        self._first = ""

    @property
    def first(self) -> list[Any]:
        """The size and the name of the first image, as JSON values for `restore`."""
        return [self.size, self._first]

    def restore(self, size: list[int] | None, name: str) -> None:
        """Sets what another run has found out."""
        self.size = None if size is None else (size[0], size[1])
        self._first = name

    def require(self, image: CheckedImage, name: str) -> None:
        """Refuses an image of another size than the first one.

        Raises:
            ValueError: names both.
        """
        size = image.height, image.width
        if self.size is None:
            self.size, self._first = size, name
        elif size != self.size:
            height, width = self.size
            raise ValueError(
                f"--format raw takes images of one size, but {self._first} has {width} x "
                f"{height} pixels and {name} has {size[1]} x {size[0]}: add --resize "
                f"square:PIXELS, such as square:{min(self.size)}, which scales and cuts all"
            )

    def answer_bytes(self, options: ImageOptions) -> int:
        """Most that a checked image can take."""
        return 3 * (math.prod(self.size) if self.size else options.max_pixels)


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


def _number_labels(
    read: Sequence[Source], class_names: str, spool: Spool, work: WorkFolder
) -> tuple[LabelSpace, dict[Label, int]]:
    """One label space for all sources, and the class number of each label found in them.

    Raises:
        ValueError: labels that cannot be numbered, or sources that have changed since an earlier
            run of this build.
    """
    labels: dict[Label, None] = {}
    checksums = {}
    for number, source in enumerate(read, start=1):
        survey = survey_source(source, spool)
        checksums[f"source {number}, {source.name}"] = survey.checksum
        if not class_names and not source.labels_are_names:
            refuse_numbers(survey.labels, source.name)
        labels |= survey.labels
    checksums["what was unpacked"] = stamp_all(spool.origins)
    work.require_same("sources", checksums)
    space = read_label_space(class_names) if class_names else collect_label_space(labels)
    return space, {label: space.number_of(label) for label in labels}


def _check(
    samples: Sequence[Sample],
    *,
    options: ImageOptions,
    one_size: _OneSize | None,
    context_length: int,
    workers: int,
    engine: Engine,
) -> Iterator[tuple[str, Item, Checked | Problem]]:
    """Each sample with its result, in order; samples with a problem never reach a worker."""
    check = check_on_ray if engine == "ray" else check_in_order
    # Made once, and kept while they are under way: making them takes as long as writing them.
    ahead, behind = itertools.tee(samples)
    # Tasks are made when they are handed out: by then the first images may have told the size.
    results = check(
        (
            Task(
                name=item.name,
                entry=item.entry,
                captions=tuple(item.captions),
                size=None if one_size is None else one_size.size,
                answer_bytes=0 if one_size is None else one_size.answer_bytes(options),
            )
            for _, item in ahead
            if item.problem is None and item.entry is not None
        ),
        options=options,
        context_length=context_length,
        workers=workers,
    )
    for source, item in behind:
        yield source, item, next(results) if item.problem is None else item.problem


def _packed_sample(
    source: str, item: Item, checked: Checked, numbers: dict[Label, int]
) -> PackedSample:
    image = checked.image
    return PackedSample(
        image=image.data,
        extension=image.extension,
        height=image.height,
        width=image.width,
        xxh3=checked.xxh3,
        captions=item.captions,
        tokens=checked.tokens,
        labels=tuple(dict.fromkeys(numbers[label] for label in item.labels)),
        source=source,
        name=item.name,
    )


def _parse_resize(resize: str, *, max_pixels: int) -> tuple[int, int]:
    """`short:256` -> (256, 0), `square:32` -> (0, 32), nothing -> (0, 0)."""
    if not resize:
        return 0, 0
    kind, _, number = resize.partition(":")
    if kind not in ("short", "square") or not number.isdecimal() or not int(number) >= 1:
        raise ValueError(
            "--resize takes short:PIXELS, such as short:256, or square:PIXELS, such as square:32, "
            f"not {resize!r}"
        )
    pixels = int(number)
    if kind == "short":
        return pixels, 0
    if pixels > MAX_SIDE or pixels**2 > max_pixels:
        raise ValueError(
            f"--resize {resize} would make images of {pixels**2:,} pixels; at most "
            f"{max_pixels:,} (--max-pixels) and {MAX_SIDE:,} a side are taken"
        )
    return 0, pixels


def _known_format(format: ImageFormat) -> ImageFormat:
    known = typing.get_args(ImageFormat)
    if format not in known:
        raise ValueError(f"--format takes {', '.join(known[:-1])} or {known[-1]}, not {format!r}")
    return format


def _used_quality(quality: int | None, *, format: ImageFormat, resize: str) -> int:
    """The quality of what is encoded; one that nothing would be encoded with is refused."""
    if quality is None:
        return RESIZE_QUALITY
    _require_in("--quality", quality, 1, 100)
    if format in ("png", "raw"):
        raise ValueError(
            f"--quality has no meaning with --format {format}, which keeps every pixel as it is: "
            "leave it out, or take --format jpeg or webp"
        )
    if format == "keep" and not resize:
        raise ValueError(
            "--quality would change nothing: without --resize, --format keep encodes only what no "
            "decoder should meet, at 95; leave it out, or add --resize or --format jpeg or webp"
        )
    return quality


def _require_in(name: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:,} to {high:,}, not {value:,}")
