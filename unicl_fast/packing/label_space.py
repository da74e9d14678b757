"""The labels of all sources as one label space: class names in label order, and their hierarchy.

Sources spell a label as a key (a folder name, a WordNet id), a class name, or a number.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from unicl_fast.packing.sources.items import PATH, Label, spell_classes
from unicl_fast.text.class_lists import imagenet_wnids, read_class_names
from unicl_fast.text.hierarchies import Hierarchy


class LabelSpace:
    """Class names in label order, and the number of each label."""

    def __init__(self, names: tuple[str, ...], keys: Sequence[str] = ()) -> None:
        """`keys` are other names that sources use for the classes, in the same order."""
        self.names, self.keys = names, keys
        numbers = {display_name(name): number for number, name in enumerate(names)}
        numbers |= {name: number for number, name in enumerate(names)}
        for name in [name for name, count in Counter(names).items() if count > 1]:
            numbers.pop(name, None)  # only keys and numbers distinguish such classes
            numbers.pop(display_name(name), None)
        numbers |= {label: number for number, label in enumerate(spell_classes(names))}
        self._numbers = numbers | {key: number for number, key in enumerate(keys)}

    def find(self, label: str) -> int | None:
        """The number of the class with this key or name, also with blanks for underscores."""
        name = label.partition("\0")[0]
        for spelled in (label, name, display_name(name)):
            if (number := self._numbers.get(spelled)) is not None:
                return number
        return None

    def number_of(self, label: Label) -> int:
        """The number of a label's class; raises ValueError, which names the label, if none fits."""
        if (number := self.find(str(label))) is not None:
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
            "leave --class-names out to use the labels as names"
        )


def display_name(label: str) -> str:
    """A label with blanks for underscores."""
    return " ".join(label.replace("_", " ").split()) or label


def read_label_space(source: str) -> LabelSpace:
    """Reads a file with one name, or KEY<TAB>NAME, a line in label order.

    The built-in `imagenet` has CLIP's names, and WordNet ids as keys.
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

    `packed` are the class names of packed data sets: they come first, in their order, and equal
    names become one class. The other labels follow as text, sorted.
    """
    spelled = dict.fromkeys(label for names in packed for label in spell_classes(names))
    names = [label.partition("\0")[0] for label in spelled]
    # a source that only knows the name means the first class with this name
    known = LabelSpace(tuple(names), [label.removesuffix("\0" + "0") for label in spelled])
    others = (str(label) for label in labels)
    new = sorted({display_name(label) for label in others if known.find(label) is None})
    for name in new:
        if not name.isprintable():  # nor are bytes that are not UTF-8
            raise ValueError(f"the class name {name!r} cannot be printed; rename it")
    return LabelSpace((*known.names, *new), (*known.keys, *new))


def name_paths(labels: Iterable[Label]) -> dict[str, str]:
    """Names of labels that are paths, and of the classes above them, by path.

    A name is the last one of its path, or all of them if other paths end alike: `Men Tops Tees`.
    """
    split = (one.split(PATH) for one in labels if isinstance(one, str) and PATH in one)
    above = (names[:end] for names in split for end in range(1, len(names) + 1))
    paths = {PATH.join(names): names for names in above}
    alike = Counter(names[-1] for names in paths.values())
    return {
        path: display_name(" ".join(names if alike[names[-1]] > 1 else names[-1:]))
        for path, names in paths.items()
    }


def place_classes(
    space: LabelSpace, parents: Mapping[str, str], names: Mapping[str, str], *, origin: str
) -> Hierarchy:
    """The classes' hierarchy; a class that `parents` does not name has no place in it.

    Keys of `parents` and `names` are keys or names of classes; `origin` names `parents` in errors.
    Raises ValueError if no class has a place, one is above itself, or several keys have the name
    of a class without a key.
    """
    keys = dict.fromkeys([*parents, *parents.values()])
    numbers = {key: number for key in keys if (number := space.find(key)) is not None}
    with_key, by_name = set(numbers.values()), dict[int, str]()
    for key in keys:  # several keys can have one name: beaver is an animal and a hat
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
    """Refuses numbers as labels of a list: nobody knows what "a photo of a 3" shows."""
    for label in labels:
        if isinstance(label, int) or label.isdecimal():
            raise ValueError(
                f"{source}: labels are numbers, such as {label}. Name them by --class-names FILE, "
                "one name a line in label order, or choose a column with names by --label-column"
            )
