"""The label spaces of several data sets as one: classes with equal names become one class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.text.class_lists import read_templates


def join_classes(
    lists: Sequence[Sequence[str]],
) -> tuple[tuple[str, ...], list[npt.NDArray[np.int64]]]:
    """Joins class names; those of the first list keep their numbers, new ones follow.

    A list may hold a name twice (ImageNet has two cranes): only names of different lists are
    joined, the first with the first and the second with the second.

    Returns:
        All names, and for each list an array that gives the new number of each of its labels.
    """
    places: dict[tuple[str, int], int] = {}
    maps = []
    for names in lists:
        seen: Counter[str] = Counter()
        numbers = []
        for name in names:
            numbers.append(places.setdefault((name, seen[name]), len(places)))
            seen[name] += 1
        maps.append(np.array(numbers, dtype=np.int64))
    return tuple(name for name, _ in places), maps


def join_templates(manifests: dict[str, Manifest], given: str) -> tuple[str, ...]:
    """The templates of all data sets that have classes.

    Args:
        manifests: by the name of the data set.
        given: what --templates says: templates for all, whatever they had.

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
