"""The samples of all sources as one sequence, and their labels as one label space.

No list of ten million samples is ever made: each step of a build keeps numbers, 8 bytes a sample,
and a sample is made when it is asked for. A sample is the name of its source, and its item.

A label, as sources spell it, may be a key (a folder name, a WordNet id), a class name, or a number.
The list of class names is given, or made of the labels found.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from unicl_fast.packing.limited_processes import in_order
from unicl_fast.packing.quarantine import DUPLICATE, duplicate_message
from unicl_fast.packing.sources.items import (
    Entry,
    EntryError,
    Item,
    JoinedTexts,
    Label,
    Problem,
    Source,
    spell_classes,
)
from unicl_fast.packing.sources.spool import READ_ITEMS, ItemStore
from unicl_fast.text.class_lists import imagenet_wnids, read_class_names
from unicl_fast.text.hierarchies import Hierarchy

_AHEAD = 64
"""Files under way for each thread that looks for duplicates."""

Sample = tuple[str, Item]


class Samples:
    """Samples that are made when they are asked for."""

    def __init__(self, count: int, make: Callable[[Sequence[int]], list[Sample]]) -> None:
        """`make` is given numbers, and makes the samples of all of them."""
        self._count = count
        self.make = make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Sample:
        return self.make([number])[0]

    def __iter__(self) -> Iterator[Sample]:
        for first in range(0, self._count, READ_ITEMS):
            yield from self.make(range(first, min(first + READ_ITEMS, self._count)))


def all_samples(sources: Sequence[Source]) -> Samples:
    """The samples of all sources, in the order of the sources."""
    starts = [0, *accumulate(len(source.items) for source in sources)]

    def make(numbers: Sequence[int]) -> list[Sample]:
        which = [bisect_right(starts, number) - 1 for number in numbers]
        wanted: dict[int, list[int]] = {each: [] for each in which}
        for each, number in zip(which, numbers, strict=True):
            wanted[each].append(number - starts[each])
        items = {each: iter(_items_of(sources[each], wanted[each])) for each in wanted}
        found = [(sources[each].name, next(items[each])) for each in which]
        return [(item.source or name, item) for name, item in found]

    return Samples(starts[-1], make)


def _items_of(source: Source, numbers: Sequence[int]) -> list[Item]:
    assert isinstance(source.items, ItemStore), "which all readers make"
    return source.items.at(numbers)


def reorder(samples: Samples, numbers: npt.NDArray[np.int64]) -> Samples:
    """Samples by their numbers in another sequence, in any order."""
    return Samples(len(numbers), lambda some: samples.make(numbers[some].tolist()))


def choose(samples: Samples, wanted: Callable[[Sample], bool]) -> Samples:
    """The samples that are wanted, in their order."""
    numbers = (number for number, sample in enumerate(samples) if wanted(sample))
    return reorder(samples, np.fromiter(numbers, np.int64))


def shuffled_order(count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """The numbers 0 to `count` - 1, in the same order for the same seed, anywhere.

    NumPy keeps the raw stream of a bit generator for good (NEP 19) but not what `permutation` makes
    of it, so the numbers are sorted by raw 64-bit numbers. `system.keyed_random` would do as well,
    and would change the order of every data set that is packed again.
    """
    keys = np.random.PCG64(seed).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def join_duplicates(
    samples: Samples, changed: ItemStore, *, max_file_bytes: int, workers: int, progress: bool
) -> Samples:
    """Makes one sample of files that are equal byte for byte, with the texts of all.

    The first of them gets the captions and labels of the others that it has not yet; the others get
    a problem. What cannot be read is left alone: packing will say why. Files of different sizes
    are different, so only those that share their size with another are read. Images that merely
    look alike are found by `near_duplicates`.

    `changed` is an empty store for the items that change, `workers` the number of threads that
    read. Some 50 bytes a sample are in memory.
    """
    candidates = _equal_in_size(samples)
    digests = np.zeros((len(candidates), 2), np.uint64)
    is_read = np.zeros(len(candidates), np.bool_)
    entries = (item.entry for _, item in reorder(samples, candidates))
    read = tqdm(
        _digests(entries, max_file_bytes=max_file_bytes, workers=workers),
        total=len(candidates),
        desc="looking for duplicates",
        unit=" images",
        disable=not progress,
        smoothing=0.1,
    )
    for number, digest in enumerate(read):
        if digest is not None:
            digests[number] = np.frombuffer(digest, np.uint64)
            is_read[number] = True
    rows = np.full(len(samples), -1, np.int64)  # of changed items in their store
    for group in _equal_rows(digests[is_read]):
        numbers = candidates[is_read][group].tolist()
        for number, item in _joined(samples, numbers):
            rows[number] = changed.append(item)

    def make(numbers: Sequence[int]) -> list[Sample]:
        return [
            (source, item if rows[number] < 0 else changed[int(rows[number])])
            for number, (source, item) in zip(numbers, samples.make(numbers), strict=True)
        ]

    return Samples(len(samples), make)


def _equal_in_size(samples: Samples) -> npt.NDArray[np.int64]:
    """The numbers of samples whose files share their size with another's."""
    sizes = np.full(len(samples), -1, np.int64)
    is_sound = np.zeros(len(samples), np.bool_)
    for number, (_, item) in enumerate(samples):
        if item.entry is not None:
            sizes[number] = item.entry.num_bytes
            is_sound[number] = item.problem is None
    _, kinds, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(is_sound & (counts[kinds] > 1))


def _digests(
    entries: Iterable[Entry | None], *, max_file_bytes: int, workers: int
) -> Iterator[bytes | None]:
    """XXH3-128 of each, in order; None for what cannot be read."""

    def digest(entry: Entry | None) -> bytes | None:
        if entry is None:
            return None
        try:
            return bytes(xxhash.xxh3_128_digest(entry.read(max_bytes=max_file_bytes)))
        except EntryError:
            return None

    with ThreadPoolExecutor(workers, thread_name_prefix="unicl-digest") as threads:
        # not all at once: results would pile up, and an interruption would wait for them
        yield from in_order(
            lambda entry: threads.submit(digest, entry), entries, ahead=workers * _AHEAD
        )


def _equal_rows(rows: npt.NDArray[np.uint64]) -> Iterator[npt.NDArray[np.int64]]:
    """Groups of two or more equal rows [N 2], as rising numbers."""
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable, so numbers rise within a group
    ends = np.flatnonzero(np.any(np.diff(rows[order], axis=0) != 0, axis=1)) + 1
    bounds = np.concatenate([[0], ends, [len(order)]])
    for first in np.flatnonzero(np.diff(bounds) > 1).tolist():
        yield order[bounds[first] : bounds[first + 1]]


def _joined(samples: Samples, group: list[int]) -> Iterator[tuple[int, Item]]:
    """Numbers and new items of the samples of one image, which are joined into the first."""
    source, first = samples[group[0]]
    texts = JoinedTexts(first.captions, first.labels)
    for number in group[1:]:
        _, item = samples[number]
        if texts.add(item.captions, item.labels):
            item.problem = Problem(DUPLICATE, duplicate_message(source, first.name))
            yield number, item
    first.captions, first.labels = list(texts.captions), list(texts.labels)
    yield group[0], first


class LabelSpace:
    """Class names in label order, and the number of each label."""

    def __init__(self, names: tuple[str, ...], keys: Sequence[str] = ()) -> None:
        """`keys` are other names by which sources may call each class; in the same order."""
        self.names, self.keys = names, keys
        numbers = {display_name(name): number for number, name in enumerate(names)}
        numbers |= {name: number for number, name in enumerate(names)}
        for name in [name for name, count in Counter(names).items() if count > 1]:
            numbers.pop(name, None)  # only keys and numbers tell such classes apart
            numbers.pop(display_name(name), None)
        numbers |= {label: number for number, label in enumerate(spell_classes(names))}
        self._numbers = numbers | {key: number for number, key in enumerate(keys)}

    def find(self, label: str) -> int | None:
        """The class that has a text as its key or name, also with blanks for underscores."""
        name = label.partition("\0")[0]
        for spelled in (label, name, display_name(name)):
            if (number := self._numbers.get(spelled)) is not None:
                return number
        return None

    def number_of(self, label: Label) -> int:
        """The class number of a label.

        A text is looked up among the keys, then the names (also with blanks for underscores), then
        taken as a number if it is one.

        Raises:
            ValueError: no class fits; the message names the label.
        """
        if isinstance(label, str) and (number := self.find(label)) is not None:
            return number
        if isinstance(label, int) or label.isdecimal():
            if 0 <= int(label) < len(self.names):
                return int(label)
            raise ValueError(
                f"label {label} is beyond the {len(self.names)} class names, which are numbered "
                f"from 0 to {len(self.names) - 1}"
            )
        raise ValueError(
            f"label {label!r} is not among the {len(self.names)} class names or their keys "
            f"({', '.join((self.keys or self.names)[:3])}, ...); add it to the class names, or "
            "leave --class-names out to take the labels as names"
        )


def display_name(label: str) -> str:
    """A label as text: blanks for underscores."""
    return " ".join(label.replace("_", " ").split()) or label


def read_label_space(source: str) -> LabelSpace:
    """Reads class names from a file, or takes the built-in `imagenet`.

    That has the names CLIP uses, and WordNet ids as keys. A file has one name a line in label
    order, or one KEY<TAB>NAME.
    """
    lines = read_class_names(source)
    if source == "imagenet":
        return LabelSpace(lines, imagenet_wnids())
    with_key = sum("\t" in line for line in lines)
    if not with_key:
        return LabelSpace(lines)
    if with_key < len(lines):
        raise ValueError(
            f"{Path(source)}: {with_key} of {len(lines)} lines are KEY<TAB>NAME; "
            "either all must be, or none"
        )
    keys, names = zip(*(line.split("\t", 1) for line in lines), strict=True)
    if repeated := [key for key, count in Counter(keys).items() if count > 1]:
        raise ValueError(f"{Path(source)} has the key {repeated[0]!r} twice")
    return LabelSpace(tuple(name.strip() for name in names), keys)


def collect_label_space(
    labels: Iterable[Label], packed: Sequence[Sequence[str]] = ()
) -> LabelSpace:
    """The label space of a build without class names.

    Args:
        labels: those of all sources.
        packed: the class names of packed data sets, which come first. Classes of different sets
            are one if their names are equal; those of the first set keep their numbers.

    Returns:
        These, then the other labels as text, sorted.
    """
    spelled = dict.fromkeys(label for names in packed for label in spell_classes(names))
    names = [label.partition("\0")[0] for label in spelled]
    # a source that knows no more than the name means the first class of this name
    known = LabelSpace(tuple(names), [label.removesuffix("\0" + "0") for label in spelled])
    others = (str(label) for label in labels)
    new = sorted({display_name(label) for label in others if known.find(label) is None})
    for name in new:
        if not name.isprintable():  # also true of bytes that are no UTF-8
            raise ValueError(f"the class name {name!r} cannot be printed; rename it")
    return LabelSpace((*known.names, *new), (*known.keys, *new))


def place_classes(
    space: LabelSpace, parents: Mapping[str, str], names: Mapping[str, str], *, origin: str
) -> Hierarchy:
    """The classes' places among those above them; a class that `parents` does not name has none.

    Args:
        space: the classes.
        parents: the parent of each class that has one, by keys or names of classes.
        names: names of the classes above, and perhaps of others, by key.
        origin: where `parents` comes from, for messages.

    Raises:
        ValueError: none of the classes is there, one is above itself, or several keys have the name
            of a class that has none.
    """
    keys = dict.fromkeys([*parents, *parents.values()])
    numbers = {key: number for key in keys if (number := space.find(key)) is not None}
    with_key, by_name = set(numbers.values()), dict[int, str]()
    for key in keys:  # a name may be that of several: beaver is an animal and a hat
        number = space.find(names[key]) if key not in numbers and key in names else None
        if number is None or number in with_key:
            continue
        if number in by_name:
            raise ValueError(
                f"{origin}: {by_name[number]} and {key} are both called {names[key]!r}, and the "
                "class of this name has no key: give --class-names with lines KEY<TAB>NAME"
            )
        by_name[number] = key
        numbers[key] = number
    if not numbers:
        raise ValueError(
            f"{origin} places none of the {len(space.names)} classes "
            f"({', '.join((space.keys or space.names)[:3])}, ...), but others such as "
            f"{', '.join(itertools.islice(parents, 3))}: it must name them by key or name"
        )
    placed, above = [-1] * len(space.names), list[str]()
    taken = set(space.names)
    to_place = list(numbers)
    while to_place:
        key = to_place.pop()
        parent = parents.get(key)
        if parent is None:
            continue
        if parent not in numbers:
            numbers[parent] = len(placed)
            placed.append(-1)
            name = names.get(parent, display_name(parent))
            if name in taken:  # equal names would be one class in training
                name = f"{name} ({display_name(parent)})"
            taken.add(name)
            above.append(name)
            to_place.append(parent)
        if placed[numbers[key]] < 0 and numbers[parent] != numbers[key]:
            placed[numbers[key]] = numbers[parent]
    return Hierarchy(names=tuple(above), parents=tuple(placed))


def refuse_numbers(labels: Iterable[Label], source: str) -> None:
    """Refuses numbers as labels of a list: nobody can tell what "a photo of a 3" was to show.

    Class folders called 0 to 9 are another matter: a folder's name is all the name there is.
    """
    for label in labels:
        if isinstance(label, int) or label.isdecimal():
            raise ValueError(
                f"{source}: labels are numbers, such as {label}. Say what they stand for by "
                "--class-names FILE, one name a line in label order, or choose a column with names "
                "by --label-column"
            )
