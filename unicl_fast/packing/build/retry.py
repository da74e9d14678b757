"""`--retry quarantine.csv`: what a build left out, once more.

The same sources are read again, and what is packed are the samples that the list names. Where it
names the rest of a file that was cut or damaged, these are all samples from there on; where it
names a line of a list, the image of that line.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.remote.object_store import is_url
from unicl_fast.packing.quarantine import (
    DUPLICATE,
    as_listed,
    duplicate_message,
    read_left_out,
)
from unicl_fast.packing.sources.items import Item, Source
from unicl_fast.system.wording import count_of

_RANGE = re.compile(r"(.+) (?:from (?:byte|row) (\d+)|rows (\d+) to (\d+))", re.DOTALL)
_ENDLESS = 2**64

Listed = Counter[tuple[str, str]]
"""(source, name) of what a quarantine.csv names, and how often it does."""


def read_quarantine(path: str | os.PathLike[str]) -> Listed:
    """Reads the quarantine.csv of a build.

    Duplicates are taken only if what they went into was left out itself: else they are packed, with
    their texts, in the first build.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is none, or names nothing.
    """
    if is_url(path):
        raise ValueError(
            f"--retry takes a file on this machine, not {path}: copy it here, and "
            f"{MANIFEST_NAME} beside it, whose class numbers are kept"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"--retry: there is no file {path}")
    rows = list(read_left_out(Path(path)))
    found: Listed = Counter((row.source, row.name) for row in rows if row.kind != DUPLICATE)
    into_left_out = {duplicate_message(*key) for key in found}
    found.update(
        (row.source, row.name)
        for row in rows
        if row.kind == DUPLICATE and row.message in into_left_out
    )
    if not found:
        only = ", only duplicates of what it packed" if rows else ""
        raise ValueError(f"{path} names nothing to pack: that build left nothing out{only}")
    return found


def require_same_classes(quarantine: Path, class_names: Sequence[str]) -> None:
    """Refuses to number labels otherwise than the build that the list is of, if that lies there.

    Raises:
        ValueError: the class names differ.
    """
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

    Args:
        listed: the list.
        sources: all that was read.
        passed_over: gets the number of names that fit nothing any more.

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
        source = as_listed(read.name)
        for item in read.items:
            names = [each.name for each in stretches.get(source, ()) if each.holds(source, item)]
            own = as_listed(item.name)
            # a set: a line that is still broken is called by its place, and counts once
            exact = {name for name in (own, f"line {item.position}") if (source, name) in listed}
            if names or exact:
                chosen.append((read.name, item))
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
        """Whether the sample lies in it; also what has become of the stretch since."""
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
