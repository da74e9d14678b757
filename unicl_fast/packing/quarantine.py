"""Lists of samples by source and name: what was left out, is to be left out, or is tried again.

quarantine.csv of a packed data set lists what a build left out, and why
(`unicl_fast.dataset.writer` writes it). `--retry` packs the samples of such a list, `--leave-out`
leaves out those of a list with the same columns. A source is known by its last name alone, so
samples of `a/train` and `b/train` may be called alike; a list that cannot tell them apart is
refused.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.object_store import is_url
from unicl_fast.dataset.reader import QUARANTINE_COLUMNS
from unicl_fast.packing.sources.items import Item, Source
from unicl_fast.system.wording import count_of

DUPLICATE = "duplicate"
"""The kind of images that were joined into equal ones."""
NEAR_DUPLICATE = "near duplicate"
_RANGE = re.compile(r"(.+) (?:from (?:byte|row) (\d+)|rows (\d+) to (\d+))", re.DOTALL)
_ENDLESS = 2**64
_REASONS_SHOWN = 5

Listed = Counter[tuple[str, str]]
"""(source, name) of the samples that a list names, and in how many rows."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row: one sample, or a stretch of a file, that was left out."""

    source: str
    name: str
    kind: str
    message: str


def read_left_out(path: Path, *, num_rows: int | None = None) -> Iterator[LeftOut]:
    """Reads all rows of a quarantine.csv, in order; `num_rows` is what the manifest says.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such list, or has another number of rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the data set again")
    count = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            if tuple(header) != QUARANTINE_COLUMNS:
                raise ValueError(
                    f"{path} is no quarantine.csv of unicl-pack: its first line must be "
                    f"{','.join(QUARANTINE_COLUMNS)}, and is {','.join(header)[:200]!r}"
                )
            for row in reader:
                if len(row) != len(QUARANTINE_COLUMNS):
                    raise ValueError(f"{path}, line {reader.line_num}: {len(row)} fields of 4")
                count += 1
                yield LeftOut(*row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if num_rows is not None and count != num_rows:
        raise ValueError(
            f"{path} is damaged or cut short: {count_of(count, 'row')}, the manifest says "
            f"{num_rows}; "
            "copy the data set again"
        )


def count_left_out(path: Path) -> dict[str, int]:
    """How many samples a quarantine.csv lists by kind, most first."""
    return dict(Counter(row.kind for row in read_left_out(path)).most_common())


def describe_left_out(path: Path) -> str:
    """The counts by kind and the first few reasons, as text."""
    counts = Counter(count_left_out(path))
    first = itertools.islice(read_left_out(path), _REASONS_SHOWN)
    reasons = [f"  {row.name}: {row.message}" for row in first]
    return "\n".join([", ".join(f"{n:,} {kind}" for kind, n in counts.most_common()), *reasons])


def duplicate_message(source: str, name: str) -> str:
    """The message of an image that was joined into an equal one, which is named."""
    return f"the same bytes as {name} of {source}, which has its texts too"


def looks_like(source: str, name: str) -> str:
    """The beginning of the message of an image that looks like another, which is named."""
    return f"it looks like {name} of {source}"


def as_listed(name: str) -> str:
    """A name as a list has it, which is UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class LeaveOut:
    """The samples that `--leave-out FILE` names; `take` is asked once for each sample.

    Where the list names fewer than there are, nobody can say which ones it means, and to drop them
    all would drop those that it leaves: that is refused.
    """

    def __init__(self, path: str) -> None:
        """Reads the list, which has the columns `source` and `name`; with "" names nothing.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is not such a list.
        """
        self._path = path
        self._listed = _read_names(path) if path else Counter()
        self._taken: Listed = Counter()

    def __bool__(self) -> bool:
        """Whether anything is named."""
        return bool(self._listed)

    def names(self, source: str, name: str) -> bool:
        """Whether the list names a sample of this source, as it is called there."""
        return (as_listed(source), as_listed(name)) in self._listed

    def take(self, source: str, name: str) -> bool:
        """Like `names`; counts the sample, and refuses more of them than the list names."""
        key = as_listed(source), as_listed(name)
        if key not in self._listed:
            return False
        self._taken[key] += 1
        if self._taken[key] > (rows := self._listed[key]):
            raise ValueError(
                f"--leave-out: {self._path} names {key[1]} of {key[0]} in "
                f"{count_of(rows, 'row')}, and more samples are called so: "
                f"several sources are called {key[0]}, so which is meant cannot be told, and "
                "leaving all out would drop the one that is to stay. Pack sources under names of "
                "their own (links to them will do) and list copies anew; equal files need no list, "
                "--duplicates join makes one sample of them. If all are to go, give the row as "
                "many times as there are samples"
            )
        return True


def _require_file(option: str, path: str | os.PathLike[str], beside: str = "") -> None:
    if is_url(path):
        raise ValueError(f"{option} takes a file on this machine, not {path}: copy it here{beside}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option}: there is no file {path}")


def _read_names(path: str) -> Listed:
    _require_file("--leave-out", path)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"source", "name"} <= set(rows.fieldnames or ()):
                raise ValueError(f"it has the columns {rows.fieldnames}")
            return Counter((row["source"] or "", row["name"] or "") for row in rows)
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"--leave-out: {path} should be a CSV file with the columns source and name: {error}"
        ) from error


def read_retry(path: str | os.PathLike[str]) -> Listed:
    """Reads the quarantine.csv whose samples are packed again.

    Duplicates are taken only if the image that they were joined into was left out itself: else they
    are packed, with their texts, in the first build. So are images that look like one that was left
    out.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none, or names nothing.
    """
    beside = f", and {MANIFEST_NAME} beside it, whose class numbers are kept"
    _require_file("--retry", path, beside)
    rows = list(read_left_out(Path(path)))
    others = (DUPLICATE, NEAR_DUPLICATE)
    found: Listed = Counter((row.source, row.name) for row in rows if row.kind not in others)
    like_left_out = {message(*key) for key in found for message in (duplicate_message, looks_like)}
    found.update(
        (row.source, row.name)
        for row in rows
        if (row.kind == DUPLICATE and row.message in like_left_out)
        or (row.kind == NEAR_DUPLICATE and row.message.rpartition(" (")[0] in like_left_out)
    )
    if not found:
        only = ", only duplicates of what it packed" if rows else ""
        raise ValueError(f"{path} names nothing to pack: that build left nothing out{only}")
    return found


def require_same_classes(quarantine: Path, class_names: Sequence[str]) -> None:
    """Refuses other class names than those of the build that the list is of, if that lies there."""
    if not (quarantine.parent / MANIFEST_NAME).is_file():
        return
    before = Manifest.load(quarantine.parent).class_names
    if tuple(class_names) != before:
        new = sorted(set(class_names) - set(before)) or ["the same in another order"]
        raise ValueError(
            f"{quarantine.parent} has {count_of(len(before), 'class name')}, and now there are "
            f"{len(class_names):,} (new: {', '.join(new[:3])}), so labels would be numbered "
            "otherwise. Give the --class-names of that build; if there were none, correct the "
            "labels, or pack all anew"
        )


def choose_listed(
    listed: Listed, sources: Sequence[Source], passed_over: Counter[str]
) -> list[tuple[str, Item]]:
    """The samples that a list names, with their source's name, in the order of the sources.

    Where the list names the rest of a file that was cut or damaged, these are all samples from
    there on; where it names a line of a list, the image of that line. `passed_over` gets the number
    of names that fit nothing any more.

    Raises:
        ValueError: the sources have nothing that is named, or have it more often.
    """
    stretches: dict[str, list[_Stretch]] = {}
    for source, name in listed:
        if (stretch := _stretch_of(name)) is not None:
            stretches.setdefault(source, []).append(stretch)
    chosen: list[tuple[str, Item]] = []
    met: Listed = Counter()
    for read in sources:
        for item in read.items:
            source = as_listed(item.source or read.name)
            names = [each.name for each in stretches.get(source, ()) if each.holds(source, item)]
            own = as_listed(item.name)
            # a set: a line that is still broken is called by its number, and counts once
            exact = {name for name in (own, f"line {item.position}") if (source, name) in listed}
            if names or exact:
                chosen.append((item.source or read.name, item))
                met.update((source, name) for name in exact)
                met |= Counter({(source, name): 1 for name in names})
    if not chosen:
        raise ValueError(
            "nothing that --retry names is in the sources; give those of the build it is of"
        )
    for key, count in met.items():
        if count > listed[key]:
            raise ValueError(
                f"--retry names {key[1]} of {key[0]} {count_of(listed[key], 'time')}, and the "
                f"sources have it {count_of(count, 'time')}: several sources are called {key[0]}, "
                "give one of them at a time"
            )
    if gone := len(listed.keys() - met.keys()):
        passed_over["names of --retry that the sources no longer have"] += gone
    return chosen


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Part of a file of a source, as a list names it."""

    name: str
    file: str
    low: int
    high: int

    def holds(self, source: str, item: Item) -> bool:
        """Whether the sample lies in it, or replaces the stretch since."""
        own = _stretch_of(item.name) if item.problem is not None else None
        if own is not None:
            return own.file == self.file and own.name != self.name
        in_file = item.name.startswith((f"{self.file}/", f"{self.file}:")) or source == self.file
        return in_file and self.low <= item.position <= self.high


def _stretch_of(name: str) -> _Stretch | None:
    match = _RANGE.fullmatch(name)
    if match is None:
        return None
    file, start, first, last = match.groups()
    low, high = (int(start), _ENDLESS) if start else (int(first), int(last))
    return _Stretch(name, file, low, high)
