"""`unicl-pack`: images with labels, captions or both -> a packed, verified, shuffled data set.

Each sub-command is a dataclass of its arguments; `run` returns its report and the exit code, and
imports what does the work: --help comes before numpy.
"""

import dataclasses
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro

from unicl_fast.dataset.manifest import QUARANTINE_NAME
from unicl_fast.distributed.signals import EXIT_FAULT
from unicl_fast.packing.build_options import BuildOptions
from unicl_fast.system.atomic_files import FULL_DISK, write_text_atomically
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of, count_of_kind, print_text, shorten, shorten_message
from unicl_fast.text.class_lists import fill_template

from ..numbers import plain_numbers
from .inspect import Inspect, contents_of
from .verify import Verify

if TYPE_CHECKING:
    from unicl_fast.packing.build import BuildSummary

_KEY = re.compile(r"n\d{8}|\d+")  # a number, or WordNet's
_HELD_OUT = {"val", "valid", "validation", "dev", "test", "testing", "held", "heldout", "holdout"}
"""Words in names of data for evaluation."""


@dataclass(frozen=True, kw_only=True)
class _SourcesAndOut:
    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")
    ]
    """Class folders, lists, archives, packed data sets. Data under URLs are first copied into
    OUT.partial."""
    out: str
    """New or empty folder, or URL (s3://bucket/folder). It appears when it is complete."""


@dataclass(frozen=True, kw_only=True)
class Build(BuildOptions, _SourcesAndOut):
    """Pack images with labels, captions or both into one data set folder.

    A SOURCE is a folder of class folders, or a zip of them; a list (CSV, TSV, JSON lines, Parquet)
    with an image a row and columns for its path, or itself, captions and labels; images with x.txt
    beside x.jpg; tars; a packed data set; or another kind that docs/sources.md names. Several
    become one data set, in which equal class names are one class.

    Every image is decoded once and strictly. OUT/quarantine.csv lists damaged images with the
    reason; the others are packed. Plain JPEGs and PNGs keep their bytes. An interrupted build keeps
    its finished shards in OUT.partial: the same command resumes after them.

    Examples:
      unicl-pack build photos/ --split 0.9 --out packed/photos

      unicl-pack build imagenet/train --class-names imagenet --resize short:256 --out packed/in

      unicl-pack build shop.parquet --caption-column title --label-column category --out packed/shop

      unicl-pack build captions_val2017.json instances_val2017.json --image-root val2017 --out coco

      unicl-pack build packed/photos new-photos/ --out s3://bucket/packed/all

      unicl-pack build --in-place laion/shards --out index
    """

    where: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="COLUMN=VALUE")
    ] = ()
    min_score: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="COLUMN=NUMBER")
    ] = ()
    takes_loose: tyro.conf.Suppress[bool] = False
    progress: tyro.conf.Suppress[bool] = True
    json: Path | None = None
    """Write the outcome, in numbers, into this file."""

    def run(self) -> tuple[str, int]:
        from unicl_fast.packing.build import build_dataset

        options = dict(vars(self))
        path = options.pop("json")
        summary = build_dataset(**options)
        if path is not None:
            text = json.dumps(dataclasses.asdict(summary), indent=1, default=str)  # a folder's path
            write_text_atomically(path, text + "\n")
        words = {word for each in (*self.sources, self.out, *self.where) for word in _words(each)}
        is_held_out = self.split is None and bool(words & _HELD_OUT) and "train" not in words
        return _report_build(summary, encoding=self.encoding, is_held_out=is_held_out), 0


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Copy a packed data set to a URL, such as s3://bucket/packed/photos.

    Each file is read back and compared with its checksum; the manifest is written last, so the data
    set appears when it is complete. The same command resumes an interrupted upload.

    Exit code: 0 done, 2 not done; uploaded files stay.

    Example:
      unicl-pack upload packed/photos --out s3://bucket/packed/photos
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The data set."""
    out: str
    """URL to make; it must hold nothing else."""

    def run(self) -> tuple[str, int]:
        from unicl_fast.packing.upload import upload_dataset

        return upload_dataset(self.folder, self.out), 0


@dataclass(frozen=True, kw_only=True)
class Croissant:
    """Write croissant.json beside the manifest: metadata that hubs and data searches read.

    Reads the shards once for their SHA-256, and refuses one that is not as it was packed.

    Example:
      unicl-pack croissant packed/photos --url https://example.org/photos
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The data set."""
    url: str = ""
    """Address that its folder has, or will have; by default shards are named without one."""
    description: str = ""
    """Describes the data; by default by the numbers of images and captions."""

    def run(self) -> tuple[str, int]:
        from unicl_fast.packing.croissant import write_croissant

        return f"written to {write_croissant(**vars(self))}", 0


COMMANDS: dict[str, Callable[..., Any]] = {
    "build": Build,
    "verify": Verify,
    "inspect": Inspect,
    "upload": Upload,
    "croissant": Croissant,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; 0 when done, 1 for faults found or a full disk, 2 for wrong input."""
    arguments = begin_program() if arguments is None else arguments
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and clean up
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=arguments, prog="unicl-pack", registry=plain_numbers()
    )
    try:
        report, code = command.run()
    except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, SIGTERM
        code = int(stop.code or 0) if isinstance(stop, SystemExit) else 130
        notes = getattr(stop, "__notes__", ["this run has written nothing"])
        _fail("stopped", *notes, code=code, between="; ")
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        notes = getattr(error, "__notes__", [])  # how to resume
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            advice = "make room there, then give the same command again"
            _fail(str(error), advice, *notes, code=EXIT_FAULT)
        _fail(str(error), *(notes if isinstance(error, (OSError, RuntimeError)) else ()), code=2)
    print_text(report, sys.stdout)
    if code:
        raise SystemExit(code)


def _report_build(summary: "BuildSummary", *, encoding: str, is_held_out: bool) -> str:
    """The report, with the next command; `encoding` describes re-encoded images."""
    sides = [summary] if summary.held_out is None else [summary, summary.held_out]
    manifest, manifests = summary.manifest, [one.manifest for one in sides]
    num_samples = sum(one.num_samples for one in manifests)
    num_reencoded = sum(one.num_reencoded for one in sides)
    if manifest.in_place is not None:
        lying = [one.in_place for one in manifests if one.in_place is not None]
        files = count_of(sum(one.num_files for one in lying), "source file")
        megabytes = sum(one.num_bytes for one in lying) / 1e6
        treatment = f"{megabytes:,.1f} MB of images stay in {files}"
        if num_reencoded:
            treatment += f", {num_reencoded:,} are kept here as {encoding}"
    elif manifest.pixels is None:
        how = f" as {encoding}" if num_reencoded else ""
        kept = num_samples - num_reencoded
        treatment = f"{num_reencoded:,} re-encoded{how}, {kept:,} copied unchanged"
    else:
        pixels = manifest.pixels
        treatment = f"decoded, {pixels.width} x {pixels.height} pixels each"
    num_taken_over = sum(one.num_taken_over for one in sides)
    rate = (num_samples - num_taken_over) / summary.seconds
    lines = [f"{one.out}: {contents_of(one.manifest)}" for one in sides]
    if all(one.was_complete for one in sides):
        lines.append("complete already: an earlier run of this command has written all of it")
    else:
        megabytes = sum(one.num_bytes for one in manifests) / 1e6
        seconds = f"{summary.seconds:,.1f} s"
        lines.append(f"{megabytes:,.1f} MB in {seconds}, {rate:,.0f} images/s; {treatment}")
        if num_taken_over:
            lines.append(f"{count_of(num_taken_over, 'image')} had been packed before this run")
    if summary.passed_over:
        parts = (count_of_kind(count, kind) for kind, count in summary.passed_over.items())
        lines.append(f"passed over: {', '.join(parts)}")
    lines += [f"note: {count_of_kind(count, kind)}" for kind, count in summary.notes.items()]
    for one in sides:
        if num_left_out := one.manifest.num_quarantined:
            listed = f"{one.out}/{QUARANTINE_NAME}"
            lines.append(f"left out: {num_left_out:,}, listed in {listed} - {one.quarantined}")
        if one.num_copies:
            lines.append(
                f"note: {count_of(one.num_copies, 'image')} of {one.out} that an earlier sample "
                f"has too, byte for byte: unicl-pack inspect {one.out} --duplicates-list FILE "
                "lists them for --leave-out"
            )
    if manifest.hierarchy is not None:
        lines.append(f"hierarchy: {manifest.hierarchy.describe()}")
    if manifest.templates:
        count = count_of(len(manifest.templates), "template")
        prompt = fill_template(manifest.templates[0], manifest.class_names[0])
        lines.append(f"prompts: {count} for each class; the first: {shorten(prompt)}")
    if summary.first_caption:
        lines.append(f"first caption: {shorten(summary.first_caption)}")
    names = manifest.class_names
    if names and all(map(_KEY.fullmatch, names)):
        more = ", ..." if len(names) > 3 else ""
        lines.append(
            f"WARNING: the class names are keys ({', '.join(names[:3])}{more}), from "
            "which no text encoder learns much; --class-names FILE, with lines KEY<TAB>NAME whose "
            "keys are the folders' names, gives them words; imagenet has those of WordNet's ids"
        )
    train, evaluate = "TRAIN" if is_held_out else shlex.quote(str(summary.out)), ""
    if is_held_out or len(sides) > 1:
        evaluate = f" --data.evaluate {shlex.quote(str(sides[-1].out))}"
    lines.append(
        f"next: unicl-pretrain --preset auto --data.train {train}{evaluate} --out runs/first"
    )
    return "\n".join(lines)


def _words(place: str) -> list[str]:
    """The words in the last part of a path, or in a condition."""
    return re.findall(r"[a-z]+", place.rstrip("/").rpartition("/")[2].lower())


def _fail(*messages: str, code: int, between: str = "\n") -> NoReturn:
    print_text(shorten_message(f"unicl-pack: {between.join(messages)}"), sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
