"""Hierarchies of classes: read from files, checked, and walked from the top to a class.

A hierarchy is a forest: a class has at most one parent (of WordNet's several, the first one).
Ancestors that are no labels of the data set have names too, for prompts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.system.untrusted_files import read_json, read_text, reading_table
from unicl_fast.system.wording import count_of

_MOST_LEVELS = 100  # wordNet has 20; without a limit, a damaged file could use any amount of memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Hierarchy:
    """The parents of a data set's classes, and their ancestors."""

    names: tuple[str, ...]
    """Names of ancestors, which are numbered after the data set's classes."""
    parents: tuple[int, ...]
    """The number of the parent of each class and ancestor; -1 at the top."""

    def __post_init__(self) -> None:
        """Raises ValueError if a parent does not exist, or a class is its own ancestor."""
        for number, parent in enumerate(self.parents):
            if not -1 <= parent < len(self.parents):
                raise ValueError(
                    f"hierarchy: class {number} has the parent {parent}, which must be one of the "
                    f"{len(self.parents)} classes or -1"
                )
        self.chains()

    @property
    def num_classes(self) -> int:
        """Classes of the data set, without ancestors."""
        return len(self.parents) - len(self.names)

    def describe(self) -> str:
        """How many classes have a place, and how many ancestors there are, in words."""
        own = set(range(self.num_classes))
        placed = {number for number in own if self.parents[number] >= 0}
        placed |= own & set(self.parents)
        above = count_of(len(self.names), "class")
        return f"{len(placed):,} of {count_of(len(own), 'class')} placed, {above} above"

    def chains(self) -> list[tuple[int, ...]]:
        """For each class its ancestors from the top down, and itself."""
        chains = []
        for number in range(len(self.parents)):
            chain, above = list[int](), number
            while above >= 0 and len(chain) <= _MOST_LEVELS:
                chain.append(above)
                above = self.parents[above]
            if len(chain) > _MOST_LEVELS:
                raise ValueError(
                    f"hierarchy: class {number} is above itself, or has {_MOST_LEVELS} classes or "
                    "more above it"
                )
            chains.append(tuple(reversed(chain)))
        return chains


def read_parents(path: Path, *, columns: Sequence[str] = ()) -> dict[str, str]:
    """Reads the parent of each class that has one, by their names or keys.

    A .json file holds {"child": "parent", ...}. A .csv or .tsv file has a header and, in `columns`
    (default: all), names from the top down to a class; empty cells are skipped. Any other file has
    lines PARENT CHILD, as WordNet's wordnet.is_a.txt; a child's first line counts. Raises
    FileNotFoundError, or ValueError for another form or two parents of a class in JSON or a table.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with a hierarchy of classes")
    if path.suffix in (".csv", ".tsv"):
        return _parents_in_table(path, columns)
    if columns:
        raise ValueError(f"{path}: only a .csv or .tsv file has columns ({', '.join(columns)})")
    if path.suffix == ".json":
        values = read_json(path)
        if not isinstance(values, dict) or not all(isinstance(one, str) for one in values.values()):
            raise ValueError(f'{path} must hold {{"child": "parent", ...}}, names as texts')
        return values
    parents: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if len(words) != 2:
            raise ValueError(
                f"{path}: line {number} must be PARENT CHILD, two words, not {line[:80]!r}"
            )
        parents.setdefault(words[1], words[0])
    return parents


def _parents_in_table(path: Path, columns: Sequence[str]) -> dict[str, str]:
    parents: dict[str, str] = {}
    with reading_table(path, delimiter="\t" if path.suffix == ".tsv" else ",") as rows:
        header = list(rows.fieldnames or ())
        if unknown := [column for column in columns if column not in header]:
            raise ValueError(f"{path} has no column {unknown[0]!r}; it has {', '.join(header)}")
        for row in rows:
            names = [" ".join((row[column] or "").split()) for column in columns or header]
            names = [name for name, _ in itertools.groupby(filter(None, names))]  # Gorilla gorilla
            for parent, child in itertools.pairwise(names):
                if parents.setdefault(child, parent) != parent:
                    raise ValueError(
                        f"{path}: line {rows.line_num} puts {child!r} under {parent!r}, an earlier "
                        f"line under {parents[child]!r}; a class has one parent: make the names "
                        "differ"
                    )
    return parents


def read_names(path: Path) -> dict[str, str]:
    """Reads lines KEY<TAB>NAME, as in WordNet's words.txt; of several comma-separated names one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with names of classes")
    names = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        key, tab, name = line.partition("\t")
        if not tab or not name.strip():
            raise ValueError(f"{path}: line {number} must be KEY<TAB>NAME, not {line[:80]!r}")
        names[key] = name.split(",")[0].strip()
    return names
