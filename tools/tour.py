"""`make tour`: everything in the test data packed, verified, inspected and merged.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.images.check import ImageFormat
from unicl_fast.packing.quarantine import read_left_out

from .pack import __main__ as pack_dataset
from .pack.inspect import align_columns

_ALL = "everything"


@dataclass(frozen=True, slots=True)
class _Set:
    """How one of the data sets is packed; paths are relative to the data."""

    name: str
    source: str
    options: tuple[str, ...] = ()
    image_root: str = ""


DATA_SETS = (
    _Set("cifar10-train", "cifar10/cifar10-train.zip"),
    _Set("cifar10-test", "cifar10/cifar10-test.zip"),
    _Set(
        "tiny-imagenet",
        "tiny-imagenet/labels.csv",
        ("--label-column", "words"),
        "tiny-imagenet/tiny-imagenet-200-subset.zip",
    ),
    _Set(
        "imagenet",
        "decode/labels.csv",
        ("--label-column", "wnid", "--class-names", "imagenet"),
    ),
    _Set("flickr8k", "captions/flickr8k/captions.jsonl"),
    _Set("coco", "captions/coco/captions.jsonl"),
    _Set(
        "textures",
        "transfer/dtd10/labels.csv",
        ("--label-column", "class"),
        "transfer/dtd10/dtd10.zip",
    ),
    _Set("hostile", "hostile/files"),
)


@dataclass(frozen=True, kw_only=True)
class PackEverything:
    """Pack, verify, inspect and merge all data sets of the test data."""

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


@dataclass(slots=True)
class _Row:
    """The outcome of one data set."""

    name: str
    num_samples: int = 0
    num_bytes: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    build_seconds: float = 0.0
    verify_seconds: float = 0.0
    inspect_seconds: float = 0.0
    num_faults: int = 0

    @property
    def verdict(self) -> str:
        return "sound" if not self.num_faults else f"{self.num_faults:,} faults"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 1 if a data set is not what was packed, 2 if there is no data."""
    tour = tyro.cli(PackEverything, args=arguments, prog="pack_everything")
    known = {one.name for one in DATA_SETS}
    if unknown := set(tour.sets) - known:
        raise SystemExit(f"--sets takes {', '.join(sorted(known))}, not {', '.join(unknown)}")
    wanted = [one for one in DATA_SETS if not tour.sets or one.name in tour.sets]
    there = [one for one in wanted if (tour.data / one.source).exists()]
    for one in wanted:
        if one not in there:
            print(f"passed over: {one.name}, {tour.data / one.source} is not there")
    if not there:
        print(f"no test data in {tour.data}: name its folder, or set UNICL_TEST_DATA")
        raise SystemExit(2)
    if tour.out.exists() and any(tour.out.iterdir()):
        print(f"{tour.out} is not empty: name another --out, or remove it")
        raise SystemExit(2)
    tour.out.mkdir(parents=True, exist_ok=True)
    rows = [_pack(one, tour) for one in there]
    rows.append(_merge([row.name for row in rows], tour))
    table = [asdict(row) | {"verify": row.verdict} for row in rows]
    (tour.out / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"\n{_table(rows)}\n\nlook at {tour.out / f'{_ALL}.html'}")
    if any(row.num_faults for row in rows):
        raise SystemExit(1)


def _pack(one: _Set, tour: PackEverything) -> _Row:
    out = tour.out / one.name
    words: list[str | Path] = ["build", tour.data / one.source, "--out", out, *one.options]
    if one.image_root:
        words += ["--image-root", tour.data / one.image_root]
    if tour.format != "keep":
        words += ["--format", tour.format]
    if tour.resize:
        words += ["--resize", tour.resize]
    build = _run_with_json(words, tour, out)
    row = _Row(one.name, build_seconds=build["seconds"])
    _look(row, tour)
    return row


def _merge(names: Sequence[str], tour: PackEverything) -> _Row:
    """All of them as one; classes of the same name meet."""
    started = time.perf_counter()
    _run(["merge", *(tour.out / name for name in names), "--out", tour.out / _ALL])
    row = _Row(_ALL, build_seconds=time.perf_counter() - started)
    _look(row, tour)
    return row


def _look(row: _Row, tour: PackEverything) -> None:
    """Verifies and inspects what was packed."""
    folder = tour.out / row.name
    manifest = Manifest.load(folder)
    row.num_samples, row.num_bytes = manifest.num_samples, manifest.num_bytes
    kinds = (one.kind for one in read_left_out(folder / QUARANTINE_NAME))
    row.refused = dict(Counter(kinds).most_common())
    verified = _run_with_json(["verify", folder], tour, folder)
    row.verify_seconds = verified["seconds"]
    row.num_faults = sum(verified["faults"].values())
    words: list[str | Path] = ["inspect", folder, "--html", tour.out / f"{row.name}.html"]
    started = time.perf_counter()
    _run_with_json(words + ([] if tour.near else ["--no-near"]), tour, folder)
    row.inspect_seconds = time.perf_counter() - started


def _run_with_json(
    words: Sequence[str | Path], tour: PackEverything, folder: Path
) -> dict[str, Any]:
    """Runs a sub-command that decodes; returns its JSON file."""
    path = folder.with_name(f"{folder.name}.json")
    workers = ["--workers", str(tour.workers)] if tour.workers else []
    _run([*words, *workers], "--json", path)
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def _run(words: Sequence[str | Path], *unsaid: str | Path) -> None:
    """Runs `unicl-pack`, and prints the command without `unsaid`; faults do not end the tour."""
    print(f"\n$ {shlex.join(['unicl-pack', *map(str, words)])}", flush=True)
    try:
        pack_dataset.main([*map(str, words), *map(str, unsaid)])
    except SystemExit as stop:
        if stop.code != 1:
            raise


def _table(rows: Sequence[_Row]) -> str:
    head = ("", "samples", "MB", "build s", "verify s", "inspect s", "refused", "verify")
    lines = [head] + [
        (
            row.name,
            f"{row.num_samples:,}",
            f"{row.num_bytes / 1e6:,.1f}",
            f"{row.build_seconds:,.1f}",
            f"{row.verify_seconds:,.1f}",
            f"{row.inspect_seconds:,.1f}",
            f"{sum(row.refused.values()):,}",
            row.verdict,
        )
        for row in rows
    ]
    table = align_columns(lines)
    if kinds := rows[-1].refused:
        table.append(f"refused: {', '.join(f'{count:,} {kind}' for kind, count in kinds.items())}")
    return "\n".join(table)


if __name__ == "__main__":
    main()
