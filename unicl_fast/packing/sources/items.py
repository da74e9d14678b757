"""Samples to pack, as every reader makes them: images with texts and labels, or a problem."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from unicl_fast.packing.sources.entries import Entry, Found, Problem
from unicl_fast.system.child import Death

MAX_TEXTS = 65_535
"""Most captions, and most labels, that the packed format can count for one sample."""
TOO_MANY = "too many texts"

Label = str | int
"""A class as its source spells it: a name, a key or a number; see also `spell_classes`."""
PATH = "\x1f"
"""Stands between the names of a label that is a path of a hierarchy, from the top down."""


def problem_of(death: Death) -> Problem:
    """The problem of an item whose reading process died."""
    if death.kind == "memory":
        return Problem("too large", f"reading it {death.how}")
    return Problem("too slow" if death.kind == "time" else "crash", f"a decoder {death.how}")


class Item(msgspec.Struct, array_like=True):
    """A sample to pack: an image, and its texts and labels as the source spells them."""

    name: str
    """The image's name inside its source."""
    entry: Entry | None = None
    captions: list[str] = []
    labels: list[Label] = []
    problem: Problem | None = None
    groups: list[str] = []
    """Values of --group-column: `--split` keeps samples with one value together; the first is
    packed, by which search groups them."""
    weights: list[float] = []
    """Values of --weight-column, one a row."""
    source: str = ""
    """The name of its source, if a packed data set was read, which knows its samples' origins."""


def item_of(name: str, found: Found) -> Item:
    """The item of an image without texts so far."""
    return Item(name, problem=found) if isinstance(found, Problem) else Item(name, found)


def refused(name: str, kind: str, message: str) -> Item:
    """An item that cannot be packed."""
    return Item(name, problem=Problem(kind, message))


def spell_classes(names: Sequence[str]) -> list[str]:
    """Labels that distinguish a list's classes, even classes with equal names.

    A label is the name, a zero byte, and how many classes before it have the same name: ImageNet's
    built-in names have 'missile' and 'sunglasses' twice.
    """
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        labels.append(f"{name}\0{seen[name]}")
        seen[name] += 1
    return labels


def join_rows(
    item: Item, captions: list[str], labels: list[Label], groups: Sequence[str] = ()
) -> None:
    """Adds new texts and groups to an item; too many texts become its problem."""
    item.captions = _merge(item.captions, captions)
    item.labels = _merge(item.labels, labels)
    item.groups = _merge(item.groups, groups) if groups else item.groups
    if max(len(item.captions), len(item.labels)) > MAX_TEXTS:
        item.problem = Problem(TOO_MANY, f"more than {MAX_TEXTS:,} captions or labels")


def _merge(known: list[Any], new: Sequence[Any]) -> list[Any]:
    """Both lists, each value once, in order; fast for one new value, the usual case."""
    if len(new) == 1:
        return known if new[0] in known else [*known, *new]
    return list(dict.fromkeys([*known, *new]))


def require_text(item: Item) -> None:
    """Gives an item without captions and labels a problem, once all rows are read."""
    if item.problem is None and not item.captions and not item.labels:
        item.problem = Problem("no text", "neither a caption nor a label")
