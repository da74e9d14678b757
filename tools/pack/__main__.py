"""`unicl-pack`: images with labels, captions or both -> a packed, verified, shuffled data set.

This module reads arguments and prints; what it does is `build_dataset`, which other programs call
directly. The other sub-commands have modules of their own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn, TextIO

import tyro

from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.dataset.writer import DEFAULT_SHARD_BYTES
from unicl_fast.images.check import MAX_PIXELS, ImageFormat
from unicl_fast.packing.build import DEFAULT_IMAGE_SECONDS
from unicl_fast.packing.build import BuildSummary as BuildSummary
from unicl_fast.packing.build import build_dataset as build_dataset
from unicl_fast.packing.ray_engine import Engine
from unicl_fast.packing.staging import DEFAULT_STAGING_BYTES
from unicl_fast.packing.upload import build_anywhere
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.wording import count_of

from .inspect import Inspect
from .merge import Merge
from .upload import Upload
from .verify import Verify

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class Build:
    """Pack images with labels, captions or both into one data set folder.

    Each SOURCE is a folder of class folders (the class is the name of the folder that directly
    holds the image), a zip of one (FILE.zip, or FILE.zip/FOLDER for a part of it), or a list with
    one image a row (.csv, .tsv, .jsonl, .json or .parquet) and columns for its path, or itself,
    captions and labels. Or what others have made: WebDataset tars (FILE.tar, a folder of them,
    {000..123}.tar), img2dataset's folders, data sets of Hugging Face (a folder of save_to_disk or
    of Parquet files), COCO's captions and instances (.json, both together), a map of a zip
    (train_map.txt beside train.zip), TSV files with images in base64, CIFAR (folder or .tar.gz),
    and IDX files as of MNIST. docs/sources.md says how each is read. Several sources become one
    data set; equal class names become one class.

    Every image is decoded once and strictly. What is damaged goes to OUT/quarantine.csv with the
    reason, and packing goes on. Plain JPEGs and PNGs keep their bytes.

    A build that was stopped or killed keeps its finished shards in OUT.partial: the same command
    goes on behind them, and the data set becomes what it would have been without the break.

    Examples:
      unicl-pack build photos/ --out packed/photos

      unicl-pack build captions.csv --out packed/captions --where split=train

      unicl-pack build imagenet/train --out packed/imagenet --class-names imagenet

      unicl-pack build images.zip/train --out packed/small --resize short:256

      unicl-pack build photos/ --out packed/webp --resize short:256 --format webp --quality 80

      unicl-pack build cifar10-train.zip --out packed/cifar10 --format raw

      unicl-pack build captions_val2017.json instances_val2017.json --image-root val2017 --out coco

      unicl-pack build photos/ --out packed/rest --retry packed/photos/quarantine.csv

      unicl-pack build s3://bucket/pairs/{000..099}.tar --out s3://bucket/packed/pairs
    """

    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")
    ]
    """Class folders, lists, archives, data sets of others; URLs of them are copied first."""
    out: str
    """Folder to make, or URL (s3://bucket/folder). It must not exist yet, or be empty; it appears
    when it is whole."""
    seed: int = 0
    """Decides the order of the samples, shuffled over all sources."""
    class_names: str = ""
    """What labels stand for: a file with one name a line in label order, or with KEY<TAB>NAME lines
    (KEY being a folder name, say), or the built-in imagenet (keys are WordNet ids such as
    n01440764). By default the labels found are the names, sorted, blanks for underscores."""
    templates: str = ""
    """Prompts for class names: a file with one a line, {} for the name, or the built-in imagenet
    (80 prompts) or simple (1). By default imagenet where there are labels."""
    image_column: str = ""
    """Column with image paths, or images, if it is not called image, file or path."""
    caption_column: str = ""
    """Column with captions, if it is not called caption or captions; in tars, field of KEY.json."""
    label_column: str = ""
    """Column with labels, if it is not called label or labels. Labels are names, keys, or numbers
    into --class-names. For CIFAR-100, coarse_labels."""
    image_root: str = ""
    """Folder or zip that image paths in lists are relative to; by default the list's folder, and
    for COCO's files the one that is called as they are (val2017) or images."""
    where: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="COLUMN=VALUE")
    ] = ()
    """COLUMN=VALUE: take only the rows of lists with this value; may be given several times, and
    then all must hold."""
    leave_out: str = ""
    """A CSV file with the columns source and name: images to leave out, such as inspect's
    --duplicates-list writes."""
    duplicates: Literal["keep", "join"] = "keep"
    """What to do with files that are equal byte for byte: keep them all, or join them into one
    sample with the captions and labels of all. Those that went into another are listed in
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
    """Where images are read and checked: in processes of this machine, or on a Ray cluster
    (pip install 'unicl_fast[ray]'), whose machines must see sources, --out and --work under the
    same paths. The data set is the same."""
    restart: bool = False
    """Begin anew, and throw away what an unfinished build has left in OUT.partial."""
    json: Path | None = None
    """Write what was done, in numbers, into this file."""
    work: str = ""
    """Folder for copies of sources under URLs, and for what is packed for a URL, until it is there;
    by default one in ~/.cache/unicl_fast. With --engine ray and URLs it must be given."""
    staging_bytes: int = DEFAULT_STAGING_BYTES
    """Most that copies of sources under URLs may take there."""

    def run(self) -> tuple[str, int]:
        """What there is to say at the end, and the exit code."""
        options = dict(vars(self))
        path = options.pop("json")
        summary = build_anywhere(**options)
        if path is not None:
            values = dataclasses.asdict(summary) | {"out": str(summary.out)}
            write_text_atomically(path, json.dumps(values, indent=1) + "\n")
        return _report(summary), 0


@dataclass(frozen=True, kw_only=True)
class Show:
    """Draw images of a packed data set, and what an augmentation does to them, as a PNG.

    With --augment each of its steps has a row of its own, on the images' centres, with the
    numbers that were drawn; the last rows show all together, as training would.

    Examples:
      unicl-pack show packed/photos --out photos.png

      unicl-pack show packed/photos --augment unicl,blur=0.5 --out unicl.png
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Packed data set."""
    out: Path = Path("contact-sheet.png")
    """File to write."""
    augment: str = ""
    """As an entry of unicl-pretrain's --data.augment: none, clip, unicl or supcon, and changes."""
    samples: int = 8
    """Images to show, evenly spread over the data set."""
    image_size: int = 224
    """Side of the square that the model would see, in pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter for resizing."""
    seed: int = 0
    """Decides what is drawn."""

    def run(self) -> tuple[str, int]:
        """What there is to say at the end, and the exit code."""
        # matplotlib, torch and DALI, which packing can do without
        from .show import show_dataset

        return f"{show_dataset(**vars(self))}: look at it", 0


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 0 when done, 1 for faults found, 2 for wrong input or usage."""
    signal.signal(signal.SIGTERM, _stop)
    command = tyro.extras.subcommand_cli_from_dict(
        {"build": Build, "verify": Verify, "inspect": Inspect, "merge": Merge, "show": Show}
        | {"upload": Upload},
        args=arguments,
        prog="unicl-pack",
    )
    try:
        report, code = command.run()
    except (KeyboardInterrupt, SystemExit) as stop:  # Ctrl-C, SIGTERM
        code = int(stop.code or 0) if isinstance(stop, SystemExit) else 130
        _fail(f"stopped; {_what_is_left(stop) or 'this run has written nothing'}", code=code)
    except (OSError, RuntimeError) as error:
        _fail("\n".join(filter(None, [str(error), _what_is_left(error)])), code=2)
    except ValueError as error:
        _fail(str(error), code=2)
    _print(report, sys.stdout)
    if code:
        raise SystemExit(code)


def _what_is_left(error: BaseException) -> str:
    """What the same command can go on with, as a build or upload that was ended has noted it."""
    return "\n".join(getattr(error, "__notes__", ()))


def _report(summary: BuildSummary) -> str:
    """The closing summary, and what to do next."""
    captions = count_of(summary.num_captions, "caption")
    labels = count_of(summary.num_labels, "label")
    classes = f" of {count_of(len(summary.class_names), 'class')}" if summary.class_names else ""
    rate = (summary.num_samples - summary.num_taken_over) / summary.seconds
    lines = [
        f"{summary.out}: {count_of(summary.num_samples, 'image')}, {captions}, {labels}{classes}",
        f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s, {rate:,.0f} images/s; "
        + _treatment(summary),
    ]
    if summary.num_taken_over:
        taken_over = count_of(summary.num_taken_over, "image")
        lines.append(f"{taken_over} had been packed before this run")
    if summary.passed_over:
        parts = ", ".join(f"{count:,} {what}" for what, count in summary.passed_over.items())
        lines.append(f"passed over: {parts}")
    if summary.num_quarantined:
        lines.append(
            f"left out: {summary.num_quarantined:,}, listed in {summary.out}/{QUARANTINE_NAME} - "
            + summary.quarantined
        )
    if summary.class_names and all(map(_WORDNET_ID.fullmatch, summary.class_names)):
        lines.append(
            "note: the class names are WordNet ids, from which no text encoder learns much; "
            "--class-names imagenet, or a file of KEY<TAB>NAME lines, gives them words"
        )
    lines.append(f"next: unicl-pretrain --preset NAME --data.train {summary.out} --out RUN")
    return "\n".join(lines)


def _treatment(summary: BuildSummary) -> str:
    """What became of the images."""
    if summary.image_size is None:
        kept = summary.num_samples - summary.num_reencoded
        return f"{summary.num_reencoded:,} encoded anew, {kept:,} byte for byte"
    height, width = summary.image_size
    return f"decoded, {width} x {height} pixels each"


def _print(text: str, file: TextIO) -> None:
    """Prints names from anywhere: what the terminal cannot show, or would obey, is escaped."""
    encoding = file.encoding or "utf-8"
    shown = "".join(
        character
        if character == "\n" or unicodedata.category(character) != "Cc"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=file)


def _fail(message: str, *, code: int) -> NoReturn:
    _print(f"unicl-pack: {message}", sys.stderr)
    raise SystemExit(code)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Turns SIGTERM into an exit that cleans up."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
