"""Labels as sources spell them -> class numbers, over all sources of a build or inputs of a merge.

A label may be a key (a folder name, a WordNet id), a class name, or a number. The list of class
names is given, or made of the labels found. `unicl_fast.text.prompts` makes texts of the names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.packing.sources.items import Label
from unicl_fast.text.class_lists import imagenet_wnids, read_class_names, read_templates


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """Class names in label order, and the number of each label."""

    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    """Other names by which sources may call each class; in the same order."""
    _numbers: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        numbers = {display_name(name): number for number, name in enumerate(self.names)}
        numbers |= {name: number for number, name in enumerate(self.names)}
        for name in repeated:  # only keys and numbers tell such classes apart
            numbers.pop(name, None)
            numbers.pop(display_name(name), None)
        numbers |= {key: number for number, key in enumerate(self.keys)}
        object.__setattr__(self, "_numbers", numbers)

    def number_of(self, label: Label) -> int:
        """The class number of a label.

        A text is looked up among the keys, then the names (also with blanks for underscores), then
        taken as a number if it is one.

        Raises:
            ValueError: no class fits; the message names the label.
        """
        if isinstance(label, str):
            for spelling in (label, display_name(label)):
                if spelling in self._numbers:
                    return self._numbers[spelling]
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

    Args:
        source: `imagenet` (the names CLIP uses; keys are the WordNet ids), or a file with one name
            a line in label order, or one KEY<TAB>NAME.
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
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    if repeated:
        raise ValueError(f"{Path(source)} has the key {repeated[0]!r} twice")
    return LabelSpace(tuple(name.strip() for name in names), keys)


def collect_label_space(labels: Iterable[Label]) -> LabelSpace:
    """The label space of a build without class names: its distinct labels as text, sorted."""
    names = sorted({display_name(str(label)) for label in labels})
    for name in names:
        if not name.isprintable():  # also true of bytes that are no UTF-8
            raise ValueError(f"the class name {name!r} cannot be printed; rename it")
    return LabelSpace(tuple(names))


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


def join_classes(
    lists: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[npt.NDArray[np.int64]]]:
    """Joins the class names of several data sets; classes with equal names become one.

    Those of the first list keep their numbers, new ones follow. A list may hold a name twice
    (ImageNet has two cranes): only names of different lists are joined, the first with the first
    and the second with the second.

    Returns:
        All names, and for each list an array that gives the new number of each of its labels.
    """
    numbers: dict[tuple[str, int], int] = {}
    maps = []
    for names in lists:
        seen: Counter[str] = Counter()
        new = []
        for name in names:
            new.append(numbers.setdefault((name, seen[name]), len(numbers)))
            seen[name] += 1
        maps.append(np.array(new, dtype=np.int64))
    return tuple(name for name, _ in numbers), maps


def join_templates(manifests: dict[str, Manifest], given: str) -> tuple[str, ...]:
    """The templates of all data sets that have classes.

    Args:
        manifests: by the name of the data set.
        given: templates for all by --templates, whatever they had.

    Raises:
        ValueError: they differ, and none were given.
    """
    with_classes = {name: one for name, one in manifests.items() if one.class_names}
    if not with_classes:
        return ()
    if given:
        return read_templates(given)
    first_name, first = next(iter(with_classes.items()))
    for name, manifest in with_classes.items():
        if manifest.templates != first.templates:
            raise ValueError(
                f"{first_name} has {len(first.templates)} prompt templates "
                f"({first.templates[0]!r}, ...) and {name} has {len(manifest.templates)} others "
                f"({manifest.templates[0]!r}, ...); say by --templates which to take: a file, "
                "imagenet or simple"
            )
    return first.templates
