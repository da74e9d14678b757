"""`unicl-pack`: images with labels, captions or both -> a packed, verified, shuffled data set.

This module reads arguments and prints; `unicl_fast.packing` does the work. Each sub-command is a
dataclass of its arguments whose `run` returns the closing report and the exit code.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import tyro

from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.distributed.signals import EXIT_FAULT
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.build_options import BuildOptions
from unicl_fast.packing.upload import upload_dataset
from unicl_fast.system.atomic_files import FULL_DISK, write_text_atomically
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of, count_of_kind, print_text

from .inspect import Inspect, contents_of
from .verify import Verify

_COMPLETE = "complete already: an earlier run of this command has written all of it"
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class _SourcesAndOut:
    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")
    ]
    """Class folders, lists, archives, data sets of others; URLs of them are copied first,
    into OUT.partial."""
    out: str
    """Folder to make, or URL (s3://bucket/folder). It must not exist yet, or be empty; it appears
    when it is whole."""


@dataclass(frozen=True, kw_only=True)
class Build(BuildOptions, _SourcesAndOut):
    """Pack images with labels, captions or both into one data set folder.

    Each SOURCE is a folder of class folders (the class is the name of the folder that directly
    holds the image), a zip of one (FILE.zip, or FILE.zip/FOLDER for a part of it), or a list with
    one image a row (.csv, .tsv, .jsonl, .json or .parquet) and columns for its path, or itself,
    captions and labels; metadata.jsonl in a folder is one, and in a flat folder x.txt is the
    caption of x.jpg. Or what others have made: WebDataset tars (FILE.tar, a folder of them,
    {000..123}.tar), img2dataset's folders, folders of Parquet files as on Hugging
    Face's hub, COCO's captions and instances (.json, both together), and a map of a zip
    (train_map.txt next to train.zip). docs/sources.md says how each is read. Several sources become
    one data set; equal class names become one class.

    A packed data set is a source too: images keep their bytes and texts, and its class names,
    templates, hierarchy, license and list of what was left out are taken over. What is damaged in
    it is left out by name.

    Every image is decoded once and strictly. What is damaged goes to OUT/quarantine.csv with the
    reason, and the others are packed. Plain JPEGs and PNGs keep their bytes.

    A build that was stopped or killed keeps its finished shards in OUT.partial: the same command
    resumes after them, and the data set becomes what it would have been without the break.

    Examples:
      unicl-pack build photos/ --out packed/photos

      unicl-pack build captions.csv --out packed/captions --where split=train

      unicl-pack build imagenet/train --out packed/imagenet --class-names imagenet

      unicl-pack build images.zip/train --out packed/small --resize short:256

      unicl-pack build photos/ --out packed/webp --resize short:256 --format webp --quality 80

      unicl-pack build cifar10-train.zip --out packed/cifar10 --format raw

      unicl-pack build captions_val2017.json instances_val2017.json --image-root val2017 --out coco

      unicl-pack build packed/photos packed/pairs new-photos/ --out packed/all

      unicl-pack build s3://bucket/pairs/{000..099}.tar --out s3://bucket/packed/pairs
    """

    where: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="COLUMN=VALUE")
    ] = ()
    """COLUMN=VALUE: take only the rows of lists with this value; may be given several times, and
    then all must hold."""
    min_score: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="COLUMN=NUMBER")
    ] = ()
    """COLUMN=NUMBER: leave out rows of lists with less there, or without a number; may be given
    several times."""
    json: Path | None = None
    """Write the outcome, in numbers, into this file."""
    work: str = ""
    """Folder for what is packed for a URL, until it is there; by default one in
    ~/.cache/unicl_fast. With --engine ray it must be given."""

    def run(self) -> tuple[str, int]:
        options = dict(vars(self))
        path = options.pop("json")
        summary = build_dataset(**options)
        if path is not None:
            values = dataclasses.asdict(summary) | {"out": str(summary.out)}
            write_text_atomically(path, json.dumps(values, indent=1) + "\n")
        return _report_build(summary, encoding=self.encoding), 0


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Copy a packed data set to a URL, such as s3://bucket/packed/photos.

    Each file is read back and compared with its checksum; the manifest is written last, so that the
    data set appears when it is whole. Given again, an upload that was cut off resumes.

    Exit code: 0 done, 2 not done; what was uploaded stays.

    Example:
      unicl-pack upload packed/photos --out s3://bucket/packed/photos
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The data set."""
    out: str
    """URL to make. Nothing else may lie there."""

    def run(self) -> tuple[str, int]:
        return upload_dataset(self.folder, self.out), 0


COMMANDS: dict[str, Callable[..., Any]] = {
    "build": Build,
    "verify": Verify,
    "inspect": Inspect,
    "upload": Upload,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; 0 when done, 1 for faults found or a full disk, 2 for wrong input."""
    arguments = begin_program() if arguments is None else arguments
    signal.signal(signal.SIGTERM, _stop)
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="unicl-pack")
    try:
        report, code = command.run()
    except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, SIGTERM
        code = int(stop.code or 0) if isinstance(stop, SystemExit) else 130
        _fail(f"stopped; {_how_to_resume(stop) or 'this run has written nothing'}", code=code)
    except (OSError, RuntimeError) as error:
        is_full = isinstance(error, OSError) and error.errno in FULL_DISK
        advice = "make room there, then give the same command again" if is_full else ""
        lines = [str(error), advice, _how_to_resume(error)]
        _fail("\n".join(filter(None, lines)), code=EXIT_FAULT if is_full else 2)
    except (ValueError, ModuleNotFoundError) as error:
        _fail(str(error), code=2)
    print_text(report, sys.stdout)
    if code:
        raise SystemExit(code)


def _how_to_resume(error: BaseException) -> str:
    """Says how to resume, as a build or upload that was ended has noted it."""
    return "\n".join(getattr(error, "__notes__", ()))


def _report_build(summary: BuildSummary, *, encoding: str) -> str:
    """The closing summary, and what to do next; `encoding` is that of re-encoded images."""
    if summary.image_size is None:
        kept = summary.num_samples - summary.num_reencoded
        how = f" as {encoding}" if summary.num_reencoded else ""
        treatment = f"{summary.num_reencoded:,} re-encoded{how}, {kept:,} copied unchanged"
    else:
        height, width = summary.image_size
        treatment = f"decoded, {width} x {height} pixels each"
    rate = (summary.num_samples - summary.num_taken_over) / summary.seconds
    lines = [
        f"{summary.out}: {contents_of(summary, num_classes=len(summary.class_names))}",
        f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s, {rate:,.0f} images/s; "
        + treatment,
    ]
    if summary.was_complete:
        lines[1:] = [_COMPLETE]
    elif summary.num_taken_over:
        taken_over = count_of(summary.num_taken_over, "image")
        lines.append(f"{taken_over} had been packed before this run")
    if summary.passed_over:
        parts = (count_of_kind(count, kind) for kind, count in summary.passed_over.items())
        lines.append(f"passed over: {', '.join(parts)}")
    if summary.num_quarantined:
        lines.append(
            f"left out: {summary.num_quarantined:,}, listed in {summary.out}/{QUARANTINE_NAME} - "
            + summary.quarantined
        )
    if summary.hierarchy:
        lines.append(f"hierarchy: {summary.hierarchy}")
    if summary.class_names and all(map(_WORDNET_ID.fullmatch, summary.class_names)):
        lines.append(
            "note: the class names are WordNet ids, from which no text encoder learns much; "
            "--class-names imagenet, or a file of KEY<TAB>NAME lines, gives them words"
        )
    if summary.class_names and all(map(str.isdecimal, summary.class_names)):
        more = ", ..." if len(summary.class_names) > 3 else ""
        lines.append(
            f"WARNING: the class names are numbers ({', '.join(summary.class_names[:3])}{more}), "
            "of which prompts would be made; --class-names FILE, with lines KEY<TAB>NAME whose "
            "keys are the folders' names, gives them words"
        )
    lines.append(f"next: unicl-pretrain --preset auto --data.train {summary.out} --out runs/first")
    return "\n".join(lines)


def _fail(message: str, *, code: int) -> NoReturn:
    print_text(f"unicl-pack: {message}", sys.stderr)
    raise SystemExit(code)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Turns SIGTERM into an exit that cleans up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
