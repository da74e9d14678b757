"""`make tour`: everything in the test data packed, verified, inspected and joined.

For each data set the command that packs it stands in `DATA_SETS`, is shown, and is run; what was
packed is verified to the last byte and described on a page. Then all become one, which is verified
too. The hostile files go the same way: what is refused of them is counted. A table at the end has
it all. The data is the folder that CONTRIBUTING.md names; sets that it lacks are passed over.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.images.check import ImageFormat
from unicl_fast.packing.quarantine import read_left_out
from unicl_fast.system.atomic_files import make_folder
from unicl_fast.system.program import begin_program
from unicl_fast.system.wording import count_of

from .pack import __main__ as pack_dataset
from .pack.inspect import align_columns

_ALL = "everything"
_Words = list[str | Path]
"""Arguments of a program."""


# name -> source and options of unicl-pack build; paths are relative to the data
DATA_SETS: dict[str, tuple[str, ...]] = {
    "cifar10-train": ("cifar10/cifar10-train.zip",),
    "cifar10-test": ("cifar10/cifar10-test.zip",),
    "tiny-imagenet": (
        *("tiny-imagenet/labels.csv", "--label-column", "words"),
        *("--image-root", "{data}/tiny-imagenet/tiny-imagenet-200-subset.zip"),
    ),
    "imagenet": (
        *("decode/labels.csv", "--label-column", "wnid"),
        *("--class-names", "imagenet"),
    ),
    "flickr8k": ("captions/flickr8k/captions.jsonl",),
    "coco": ("captions/coco/captions.jsonl",),
    "textures": (
        *("transfer/dtd10/labels.csv", "--label-column", "class"),
        *("--image-root", "{data}/transfer/dtd10/dtd10.zip"),
    ),
    "hostile": ("hostile/files",),
}


@dataclass(frozen=True, kw_only=True)
class PackEverything:
    """Pack, verify, inspect and join all data sets of the test data."""

    data: Annotated[Path, tyro.conf.Positional] = Path(
        os.environ.get("UNICL_TEST_DATA", "../shared/data")
    )
    """The test data; by default where UNICL_TEST_DATA says."""
    out: Path = Path("tour-run")
    """Folder to make: of each, and of all together, a data set, a page, and its numbers in JSON."""
    sets: tuple[str, ...] = ()
    """Take only these, such as coco hostile; by default all that are there."""
    format: ImageFormat = "keep"
    """As --format of unicl-pack build."""
    resize: str = ""
    """As --resize of unicl-pack build."""
    near: bool = True
    """Look for images that look alike, which takes decoding all once more."""
    workers: int = 0
    """Processes that decode; 0 takes one for each core."""

    @property
    def worker_options(self) -> list[str]:
        return ["--workers", str(self.workers)] if self.workers else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 if a data set is not what was packed, 2 on wrong input."""
    arguments = begin_program() if arguments is None else arguments
    tour = tyro.cli(PackEverything, args=arguments, prog="python -m unicl_fast.tools.tour")
    if unknown := set(tour.sets) - set(DATA_SETS):
        known = ", ".join(sorted(DATA_SETS))
        print(f"--sets takes {known}, not {', '.join(sorted(unknown))}")
        raise SystemExit(2)
    there = []
    for name in (name for name in DATA_SETS if not tour.sets or name in tour.sets):
        if (source := tour.data / DATA_SETS[name][0]).exists():
            there.append(name)
        else:
            print(f"passed over: {name}, {source} is not there")
    if not there:
        print(f"no test data in {tour.data}: name its folder, or set UNICL_TEST_DATA")
        raise SystemExit(2)
    if tour.out.exists() and (not tour.out.is_dir() or any(tour.out.iterdir())):
        print(f"{tour.out} is no empty folder: name another --out, or remove it")
        raise SystemExit(2)
    make_folder(tour.out)
    rows = [_make(name, _build_command(name, tour), tour) for name in there]
    command: _Words = ["build", *(tour.out / name for name in there), *tour.worker_options]
    if tour.format == "raw":
        command += ["--format", "raw"]
    rows.append(_make(_ALL, command, tour))
    (tour.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"\n{_table(rows)}\n\nlook at {tour.out / f'{_ALL}.html'}")
    if any(row["num_faults"] for row in rows):
        raise SystemExit(1)


def _build_command(name: str, tour: PackEverything) -> _Words:
    source, *options = DATA_SETS[name]
    words: _Words = ["build", tour.data / source]
    words += [option.format(data=tour.data) for option in options]
    if tour.format != "keep":
        words += ["--format", tour.format]
    if tour.resize:
        words += ["--resize", tour.resize]
    return words + tour.worker_options


def _make(name: str, command: _Words, tour: PackEverything) -> dict[str, Any]:
    """Makes one data set, verifies and inspects it; returns its row of the table."""
    out, numbers = tour.out / name, tour.out / f"{name}.json"
    build_seconds = _run([*command, "--out", out])
    manifest = Manifest.load(out)
    refused = Counter(one.kind for one in read_left_out(out / QUARANTINE_NAME))
    verify_seconds = _run(["verify", out, *tour.worker_options], "--json", numbers)
    num_faults = sum(json.loads(numbers.read_text(encoding="utf-8"))["faults"].values())
    look: _Words = ["inspect", out, "--html", tour.out / f"{name}.html", *tour.worker_options]
    inspect_seconds = _run(look + ([] if tour.near else ["--no-near"]), "--json", numbers)
    return {
        "name": name,
        "num_samples": manifest.num_samples,
        "num_bytes": manifest.num_bytes,
        "refused": dict(refused.most_common()),
        "build_seconds": build_seconds,
        "verify_seconds": verify_seconds,
        "inspect_seconds": inspect_seconds,
        "num_faults": num_faults,
        "verify": f"{count_of(num_faults, 'fault')}" if num_faults else "sound",
    }


def _run(words: _Words, *unsaid: str | Path) -> float:
    """Runs `unicl-pack`, prints all words but `unsaid`, continues after faults; returns seconds."""
    print(f"\n$ {shlex.join(['unicl-pack', *map(str, words)])}", flush=True)
    started = time.perf_counter()
    try:
        pack_dataset.main([*map(str, words), *map(str, unsaid)])
    except SystemExit as stop:
        if stop.code != 1:
            raise
    return time.perf_counter() - started


def _table(rows: Sequence[dict[str, Any]]) -> str:
    seconds = ("build", "verify", "inspect")
    lines = [("", "samples", "MB", *(f"{what} s" for what in seconds), "refused", "verify")]
    for row in rows:
        sizes = (f"{row['num_samples']:,}", f"{row['num_bytes'] / 1e6:,.1f}")
        times = (f"{row[f'{what}_seconds']:,.1f}" for what in seconds)
        refused = f"{sum(row['refused'].values()):,}"
        lines.append((row["name"], *sizes, *times, refused, row["verify"]))
    table = align_columns(lines)
    if kinds := rows[-1]["refused"]:
        table.append(f"refused: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}")
    return "\n".join(table)


if __name__ == "__main__":
    main()
