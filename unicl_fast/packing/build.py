"""Packs sources into one data set folder: `unicl-pack build` as a function.

The chapters: read the sources (`sources`), number their labels, choose and shuffle the samples
(`samples`), check images in workers (`workers`), write (`unicl_fast.dataset.writer`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

import unicl_fast
from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.dataset.writer import DEFAULT_SHARD_BYTES, DatasetWriter, PackedSample, require_free
from unicl_fast.images.check import MAX_PIXELS, MAX_SIDE, RESIZE_QUALITY, ImageFormat
from unicl_fast.packing.quarantine import (
    LeaveOut,
    choose_listed,
    describe_left_out,
    read_retry,
    require_same_classes,
)
from unicl_fast.packing.ray_engine import Engine, check_on_ray, require_engine
from unicl_fast.packing.samples import (
    LabelSpace,
    Samples,
    all_samples,
    choose,
    collect_label_space,
    join_duplicates,
    place_classes,
    read_label_space,
    refuse_numbers,
    reorder,
    shuffled_order,
)
from unicl_fast.packing.sources.items import Item, Label, ListOptions, Problem, Source
from unicl_fast.packing.sources.read_sources import read_sources
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.trees import require_there
from unicl_fast.packing.work_folder import WorkFolder, describe_options, stamp_all, survey_source
from unicl_fast.packing.workers import Checked, ImageOptions, OneSize, Task, check_in_order
from unicl_fast.system.machine import usable_cores
from unicl_fast.system.program import require_utf8_names
from unicl_fast.system.wording import count_of_kind
from unicl_fast.text.class_lists import read_templates
from unicl_fast.text.hierarchies import Hierarchy, read_names, read_parents
from unicl_fast.text.tokenizer import Tokenizer

DEFAULT_IMAGE_SECONDS = 30.0
"""A hundred times what the largest ordinary photograph takes."""

_FREE_TO_CHANGE = {"restart", "workers", "engine"}
"""Options that a build need not repeat to resume: they leave no trace in the data set."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of a build; the texts below are the help of `unicl-pack build`."""

    seed: int = 0
    """Decides the order of the samples, shuffled over all sources."""
    class_names: str = ""
    """Names for the labels: a file with one name a line in label order, or with KEY<TAB>NAME lines
    (KEY being a folder name, say), or the built-in imagenet (keys are WordNet ids such as
    n01440764). By default the labels found are the names, sorted, blanks for underscores."""
    hierarchy: str = ""
    """A file that says which class is above which, by their names or keys: .json with
    {"child": "parent", ...}, .csv or .tsv with names from the top down to a class in each row, or
    lines PARENT CHILD as in WordNet's wordnet.is_a.txt. See docs/objectives.md."""
    hierarchy_columns: Sequence[str] = ()
    """Columns of a .csv or .tsv --hierarchy, from the top down; by default all. The list of images
    itself may be given if it has such columns."""
    hierarchy_names: str = ""
    """Names for keys in --hierarchy that are not those of labels: a file with lines KEY<TAB>NAME,
    as WordNet's words.txt."""
    templates: str = ""
    """Prompts for class names: a file with one a line, {} for the name, or the built-in imagenet
    (80 prompts) or simple (1). By default imagenet where there are labels."""
    image_column: str = ""
    """Column with image paths, or images, if it is not called image, file, path or
    file_name."""
    caption_column: str = ""
    """Column with captions, if it is not called caption, captions or text; in tars, field of
    KEY.json."""
    label_column: str = ""
    """Column with labels, if it is not called label or labels. Labels are names, keys, or numbers
    into --class-names. For CIFAR-100, coarse_labels."""
    image_root: str = ""
    """Folder or zip that image paths in lists are relative to; by default the list's folder, and
    for COCO's files the one that is called as they are (val2017) or images."""
    where: Sequence[str] = ()
    """COLUMN=VALUE: take only the rows of lists with this value; may be given several times, and
    then all must hold."""
    leave_out: str = ""
    """A CSV file with the columns source and name: images to leave out, such as inspect's
    --duplicates-list writes."""
    duplicates: Literal["keep", "join"] = "keep"
    """Files that are equal byte for byte: keep them all, or join them into one sample with the
    captions and labels of all. Those that were joined into another are listed in
    OUT/quarantine.csv. Files that share their size with another are then read twice."""
    retry: str = ""
    """The quarantine.csv of an earlier build from the same sources: packs only what it names, with
    labels numbered as in that build, so that both can be trained on together."""
    resize: str = ""
    """short:PIXELS scales images down until their shorter side has so many pixels, and encodes
    them anew. Smaller ones keep their bytes. 256 is usual for training at 224. square:PIXELS scales
    down or up until the shorter side has so many, and cuts the longer one at both ends."""
    quality: int | None = None
    """1 to 100, by default 90: of images that become JPEG or WebP with --format, or were scaled
    with --resize. Refused where nothing would be encoded with it."""
    format: ImageFormat = "keep"
    """keep: images stay files, byte for byte where they are plain JPEGs and PNGs. jpeg, webp,
    png: all become files of that format; plain ones that are already, and need no scaling, stay
    byte for byte. raw: they are decoded for good, which for small ones (32 pixels a side, say)
    makes training's input several times as fast; all must be of one size, and take 3 bytes a
    pixel. docs/data.md compares them."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Largest size of a shard, in bytes."""
    max_pixels: int = MAX_PIXELS
    """An image with more pixels is left out by what its header says, before it is decoded. A
    worker's memory is limited to what so many pixels may need: 5 GB by default."""
    image_seconds: float = DEFAULT_IMAGE_SECONDS
    """An image that takes longer to read and check is left out, as is one that crashes a decoder;
    both are tried twice. 0 waits for ever."""
    workers: int = 0
    """Processes that read and check images; 0 takes one for each core, here or of the cluster."""
    engine: Engine = "local"
    """Read and check images in processes of this machine, or on a Ray cluster (pip install
    'unicl_fast[ray]'), whose machines must see sources, --out and --work under the same paths. The
    data set is the same."""
    restart: bool = False
    """Begin anew, and throw away what an unfinished build has left in OUT.partial."""

    def check(self) -> ImageOptions:
        """Refuses what cannot work, by a ValueError that names it; returns the workers' options."""
        _require_in("--seed", self.seed, 0, 2**63 - 1)
        _require_in("--workers", self.workers, 0, 1024)
        _require_in("--max-pixels", self.max_pixels, 1, MAX_SIDE**2)
        _require_in("--image-seconds", self.image_seconds, 0, 86_400)
        require_engine(self.engine)
        self.lists.conditions()
        if (self.hierarchy_columns or self.hierarchy_names) and not self.hierarchy:
            raise ValueError(
                "--hierarchy-columns and --hierarchy-names say how --hierarchy FILE is read: give "
                "that too"
            )
        short_side, square_side = self._resized_to()
        return ImageOptions(
            short_side=short_side,
            square_side=square_side,
            quality=self._used_quality(),
            max_pixels=self.max_pixels,
            seconds=self.image_seconds,
            format=self.format,
        )

    @property
    def lists(self) -> ListOptions:
        """The options of lists."""
        return ListOptions(
            image_column=self.image_column,
            caption_column=self.caption_column,
            label_column=self.label_column,
            image_root=self.image_root,
            where=tuple(self.where),
        )

    def _resized_to(self) -> tuple[int, int]:
        """`short:256` -> (256, 0), `square:32` -> (0, 32), nothing -> (0, 0)."""
        if not self.resize:
            return 0, 0
        kind, _, number = self.resize.partition(":")
        if kind not in ("short", "square") or not number.isdecimal() or not int(number) >= 1:
            raise ValueError(
                "--resize takes short:PIXELS, such as short:256, or square:PIXELS, such as "
                f"square:32, not {self.resize!r}"
            )
        pixels = int(number)
        if kind == "short":
            return pixels, 0
        if pixels > MAX_SIDE or pixels**2 > self.max_pixels:
            raise ValueError(
                f"--resize {self.resize} would make images of {pixels**2:,} pixels; at most "
                f"{self.max_pixels:,} (--max-pixels) and {MAX_SIDE:,} a side are taken"
            )
        return 0, pixels

    def _used_quality(self) -> int:
        """The quality of what is encoded; one that nothing would be encoded with is refused."""
        known = get_args(ImageFormat)
        if self.format not in known:
            raise ValueError(
                f"--format takes {', '.join(known[:-1])} or {known[-1]}, not {self.format!r}"
            )
        if self.quality is None:
            return RESIZE_QUALITY
        _require_in("--quality", self.quality, 1, 100)
        if self.format in ("png", "raw"):
            raise ValueError(
                f"--quality has no meaning with --format {self.format}, which keeps every pixel as "
                "it is: leave it out, or take --format jpeg or webp"
            )
        if self.format == "keep" and not self.resize:
            raise ValueError(
                "--quality would change nothing: without --resize, --format keep encodes only what "
                "no decoder should meet, at 95; leave it out, or add --resize or --format jpeg or "
                "webp"
            )
        return self.quality


def _require_in(name: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:,} to {high:,}, not {value:,}")


@dataclass(frozen=True, kw_only=True)
class PackedSummary:
    """The data set that a build or merge has written, in numbers."""

    out: Path | str
    """A folder, or the URL that it was uploaded to."""
    num_samples: int
    num_captions: int
    num_labels: int
    num_quarantined: int
    """Rows of its quarantine.csv; a merge includes those of its inputs."""
    class_names: tuple[str, ...]
    hierarchy: str
    """How many classes have a place in a hierarchy, in words; empty where there is none."""
    num_bytes: int
    """Bytes of the shards, and of decoded images."""
    seconds: float

    @staticmethod
    def values_of(manifest: Manifest, *, out: Path, started: float) -> dict[str, Any]:
        """The fields above; `started` is a time of `perf_counter`."""
        names = ("samples", "captions", "labels", "quarantined", "bytes")
        numbers = {f"num_{name}": getattr(manifest, f"num_{name}") for name in names}
        seconds = time.perf_counter() - started
        return numbers | {
            "out": out,
            "class_names": manifest.class_names,
            "hierarchy": "" if manifest.hierarchy is None else manifest.hierarchy.describe(),
            "seconds": seconds,
        }


@dataclass(frozen=True, kw_only=True)
class BuildSummary(PackedSummary):
    """The outcome of a build."""

    num_reencoded: int
    quarantined: str
    """Counts by kind and the first few reasons, as text."""
    passed_over: dict[str, int]
    """Files and rows that were not tried, by reason."""
    image_size: tuple[int, int] | None = None
    """Height and width of all images of a raw data set."""
    num_taken_over: int = 0
    """Samples that an earlier run of the same build had packed, before it was stopped."""
    was_complete: bool = False
    """Whether an earlier run had packed them all, and this one had nothing to do."""


def build_dataset(
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    source_names: Sequence[str] = (),
    stored: Mapping[str, str] | None = None,
    stage: Callable[[], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> BuildSummary:
    """Packs sources into one data set folder.

    A build that was stopped or killed resumes after its last finished shard when it is called with
    the same arguments, and the result is the same as if nothing had happened. One that is complete
    stays as it is.

    Starts worker processes by spawning them, so a script that calls this must guard its main part
    by `if __name__ == "__main__":`.

    Args:
        sources: class folders, lists, archives, ... (docs/sources.md).
        out: folder to make.
        source_names: names of the sources for the manifest, where these are copies.
        stored: for each URL that they are copies of, a text that changes with what lies there,
            where this decides all of their contents. A complete build is then known by it, and
            nothing is read.
        stage: makes these copies; called before the sources are read.
        progress: show progress bars.
        **options: fields of `BuildOptions`.

    Raises:
        ValueError: a source, list, label or argument is not what it should be, nothing at all
            could be packed, or the build of this folder, unfinished or complete, is another one.
        FileNotFoundError: a source or file of names is not there, or a source vanishes while it is
            packed.
    """
    started = time.perf_counter()
    chosen = BuildOptions(**options)
    out, paths = Path(out), [os.fspath(source) for source in sources]
    if not paths:
        raise ValueError("name at least one source: class folders, a zip of them, a list, ...")
    images = chosen.check()
    require_utf8_names()
    with WorkFolder(out, restart=chosen.restart) as work:
        if not work.is_complete:
            require_free(out)
        repeated = {k: v for k, v in asdict(chosen).items() if k not in _FREE_TO_CHANGE}
        repeated["source_names"] = list(source_names)
        work.require_same("options", describe_options(paths, repeated))
        if stored:
            work.require_same("sources under URLs", stored)
        if stored and work.is_complete:
            outcome = dict(work.record["summary"])
        else:
            if stage is not None:
                stage()
            outcome = _pack(
                paths, out, work, chosen, images, source_names=source_names, progress=progress
            )
        manifest = Manifest.load(out)
        values = BuildSummary.values_of(manifest, out=out, started=started)
        if (pixels := manifest.pixels) is not None:
            values["image_size"] = (pixels.height, pixels.width)
        if work.is_complete:
            outcome |= {"num_taken_over": values["num_samples"], "was_complete": True}
        quarantined = describe_left_out(out / QUARANTINE_NAME)
        summary = BuildSummary(**values, **outcome, quarantined=quarantined)
        work.remove()
    return summary


def _pack(
    paths: list[str],
    out: Path,
    work: WorkFolder,
    options: BuildOptions,
    images: ImageOptions,
    *,
    source_names: Sequence[str],
    progress: bool,
) -> dict[str, Any]:
    """Reads the sources and writes the data set, from its beginning or from where it stands.

    Returns the fields of the summary that the data set does not tell.
    """
    tokenizer = Tokenizer()
    is_raw = options.format == "raw"
    kind: Literal["raw", "encoded"] = "raw" if is_raw else "encoded"
    with Spool(work.spool) as spool:
        samples, space, numbers, templates, passed_over = _read(
            paths, options, images, spool, work, progress=progress
        )
        hierarchy = _read_hierarchy(options, space)
        if work.is_complete:
            return dict(work.record["summary"])
        with DatasetWriter(
            out, shard_bytes=options.shard_bytes, images=kind, work=work.path
        ) as writer:
            one_size = OneSize(images.square_side, writer.notes) if is_raw else None
            num_taken_over = writer.num_samples
            order = shuffled_order(len(samples), seed=options.seed)
            checked = _check(
                reorder(samples, order[writer.num_places :]),
                images=images,
                one_size=one_size,
                context_length=tokenizer.context_length,
                options=options,
            )
            bar = tqdm(
                checked,
                total=len(order),
                initial=writer.num_places,
                desc="packing",
                unit=" images",
                disable=not progress,
                smoothing=0.1,
            )
            _write(bar, writer, numbers, one_size)
            if writer.num_samples:
                summary = {
                    "num_reencoded": writer.notes.get("num_reencoded", 0),
                    "passed_over": dict(passed_over),
                }
                writer.finish(
                    tokenizer=tokenizer.name,
                    vocabulary_hash=tokenizer.vocabulary_hash,
                    context_length=tokenizer.context_length,
                    class_names=space.names,
                    templates=templates,
                    hierarchy=hierarchy,
                    source=list(source_names) or paths,
                    seed=options.seed,
                    tool_version=unicl_fast.__version__,
                    made_of={**work.record, "summary": summary},
                )
                return summary | {"num_taken_over": num_taken_over}
    parts = [count_of_kind(count, kind) for kind, count in passed_over.items()]
    passed = f"\npassed over: {', '.join(parts)}" if parts else ""
    left_out = describe_left_out(writer.aside / QUARANTINE_NAME)
    raise ValueError(f"nothing could be packed: {left_out}{passed}")


def _read(
    paths: list[str],
    options: BuildOptions,
    images: ImageOptions,
    spool: Spool,
    work: WorkFolder,
    *,
    progress: bool,
) -> tuple[Samples, LabelSpace, dict[Label, int], tuple[str, ...], Counter[str]]:
    """Reads all sources, numbers their labels, and chooses and joins samples.

    Returns the samples in the order of the sources, the label space, the class number of each
    label, the templates, and how many files and rows were passed over, by reason.
    """
    unwanted = LeaveOut(options.leave_out)
    listed = read_retry(options.retry) if options.retry else None
    read = read_sources(paths, options.lists, spool)
    space, numbers = _number_labels(read, options.class_names, spool, work)
    templates = read_templates(options.templates or "imagenet") if space.names else ()
    passed_over = sum((source.passed_over for source in read), Counter[str]())
    samples = all_samples(read)
    if listed is not None:  # labels keep the numbers that they have in the build of all
        require_same_classes(Path(options.retry), space.names)
        chosen = choose_listed(listed, read, passed_over)
        samples = Samples(len(chosen), lambda numbers: [chosen[number] for number in numbers])
    if unwanted:
        wanted = choose(samples, lambda sample: not unwanted.take(sample[0], sample[1].name))
        passed_over[f"images named in {options.leave_out}"] = len(samples) - len(wanted)
        samples = wanted
    if options.duplicates == "join":
        samples = join_duplicates(
            samples,
            spool.new_items(),
            max_file_bytes=images.max_file_bytes,
            workers=options.workers or usable_cores(),
            progress=progress,
        )
    return samples, space, numbers, templates, passed_over


def _number_labels(
    read: Sequence[Source], class_names: str, spool: Spool, work: WorkFolder
) -> tuple[LabelSpace, dict[Label, int]]:
    """One label space for all sources, and the class number of each label found in them."""
    labels: dict[Label, None] = {}
    checksums = {}
    for number, source in enumerate(read, start=1):
        own, checksums[f"source {number}, {source.name}"] = survey_source(source)
        if not class_names and not source.labels_are_names:
            refuse_numbers(own, source.name)
        labels |= own
    checksums["what was unpacked"] = stamp_all(spool.origins)
    work.require_same("sources", checksums)
    space = read_label_space(class_names) if class_names else collect_label_space(labels)
    return space, {label: space.number_of(label) for label in labels}


def _read_hierarchy(options: BuildOptions, space: LabelSpace) -> Hierarchy | None:
    """The places of the classes, where --hierarchy says what they are."""
    if not options.hierarchy:
        return None
    path, names = Path(options.hierarchy), options.hierarchy_names
    parents = read_parents(path, columns=options.hierarchy_columns)
    return place_classes(space, parents, read_names(Path(names)) if names else {}, origin=str(path))


def _check(
    samples: Samples,
    *,
    images: ImageOptions,
    one_size: OneSize | None,
    context_length: int,
    options: BuildOptions,
) -> Iterator[tuple[str, Item, Checked | Problem]]:
    """Each sample with its result, in order; samples with a problem never reach a worker.

    Raises:
        FileNotFoundError: a source has vanished.
    """
    check = check_on_ray if options.engine == "ray" else check_in_order
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
                answer_bytes=0 if one_size is None else one_size.answer_bytes(images),
            )
            for _, item in ahead
            if item.problem is None and item.entry is not None
        ),
        options=images,
        context_length=context_length,
        workers=options.workers,
    )
    for source, item in behind:
        result = next(results) if item.problem is None else item.problem
        if item.problem is None and isinstance(result, Problem) and result.kind == "unreadable":
            require_there(item.entry, source)
        yield source, item, result


def _write(
    checked: Iterator[tuple[str, Item, Checked | Problem]],
    writer: DatasetWriter,
    numbers: dict[Label, int],
    one_size: OneSize | None,
) -> None:
    """Writes sound samples, and lists the others."""
    num_reencoded: int = writer.notes.get("num_reencoded", 0)
    for source, item, result in checked:
        if isinstance(result, Problem):
            writer.quarantine(source=source, name=item.name, **asdict(result))
            continue
        image = result.image
        if one_size is not None:
            one_size.require(image, item.name)
        writer.add(
            PackedSample(
                image=image.data,
                extension=image.extension,
                height=image.height,
                width=image.width,
                xxh3=result.xxh3,
                captions=item.captions,
                tokens=result.tokens,
                labels=tuple(dict.fromkeys(numbers[label] for label in item.labels)),
                source=source,
                name=item.name,
            )
        )
        if image.reencoded:
            num_reencoded += 1
            writer.notes["num_reencoded"] = num_reencoded
