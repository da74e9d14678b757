"""How lists are read: the columns, cells and conditions that options of a build name."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from unicl_fast.system.checked_fields import plain_number

CellsKind = Literal["all", "first", "plain"]
_IN_BRACES = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How lists are read; the texts below are part of the help of `unicl-pack build`."""

    image_column: Sequence[str] = ()
    """Columns with image paths, or images, if not called image, file, path or file_name."""
    caption_column: Sequence[str] = ()
    """One or several columns with captions, if not called caption, captions or text; in tars,
    fields of KEY.json. '{name}, {color}' is a caption of two columns."""
    label_column: Sequence[str] = ()
    """One or several columns with labels, if not called label or labels; an image has the labels of
    all, and evaluations measure each column by itself. Labels are names, keys, or numbers into
    --class-names. 'categories=^(Men|Women)/' takes those that a regular expression finds. Any
    column can also be an attribute in cells like size=XS,color=Black."""
    group_column: str = ""
    """Column with a key, such as a product's number: --split keeps images with one key together,
    and a search shows the best of them. Invisible characters, full width and blanks do not matter;
    7, "7" and 7.0 are one key. 'sku=^[^-]+' takes the part that a regular expression finds: WS12 of
    WS12-XS-Orange. By default variants in a shop's export stay with their parent."""
    weight_column: str = ""
    """Column with a weight of each row, such as clicks: a positive number. An image of several rows
    has their mean, one of a source without columns 1. See data.sample_weights of unicl-pretrain."""
    cells: CellsKind = "all"
    """How cells of lists are read. all: as shops write them: several images in one become a sample
    each, paths such as Men/Tops/Tees become labels with a hierarchy, and HTML is removed; the
    report says so. first: the same with a row's first image. plain: a cell is one value."""
    image_root: str = ""
    """Folder or zip that image paths in lists are relative to; by default the list's folder, and
    for COCO's files the folder called images, or as they are (val2017)."""
    where: Sequence[str] = ()
    """COLUMN=VALUE: only read rows of lists with this value. Repeat it to add conditions."""
    takes_loose: bool = False
    """Put images outside class folders into a class named after their folder, instead of leaving
    them out, and treat all folders as classes. For callers in Python."""
    min_score: Sequence[str] = ()
    """COLUMN=NUMBER: leave out rows with a smaller value or none. Repeat it to add conditions."""

    def asked_columns(self, header: Collection[str]) -> list[tuple[str, str]]:
        """The columns that options name, each with the option."""
        captions = names_of(self.caption_column)
        named = {
            "--image-column": names_of(self.image_column),
            "--caption-column": [one for text in captions for one in fields_of(text, header)],
            "--label-column": self.patterns("label"),
            "--group-column": self.patterns("group"),
            "--weight-column": names_of(self.weight_column),
            "--where": [column for column, _ in self.conditions()],
            "--min-score": [column for column, _ in self.scores()],
        }
        return [(name, option) for option, names in named.items() for name in names]

    def patterns(self, what: Literal["label", "group"]) -> dict[str, re.Pattern[str]]:
        """The expressions of COLUMN=EXPRESSION, by column; ValueError if one is no expression."""
        option = f"--{what}-column"
        found = {}
        for text in names_of(getattr(self, f"{what}_column")):
            column, _, expression = text.partition("=")
            try:
                found[column] = re.compile(expression)
            except re.error as error:
                message = f"{option} must be COLUMN or COLUMN=EXPRESSION: {expression!r}: {error}"
                raise ValueError(message) from error
        return found

    def conditions(self) -> list[tuple[str, str]]:
        """`where` as columns and values; ValueError for anything but COLUMN=VALUE."""
        found = []
        for condition in self.where:
            column, _, value = condition.partition("=")
            if not column or column == condition:
                raise ValueError(f"--where must be COLUMN=VALUE, not {condition!r}")
            found.append((column, value))
        return found

    def refuse_filters(self, name: object) -> None:
        """Raises ValueError for options that choose rows, of which a source has none."""
        if self.where or self.min_score:
            raise ValueError(f"{name} has no columns: leave --where and --min-score out")

    def scores(self) -> list[tuple[str, float]]:
        """`min_score` as columns and numbers; ValueError for anything but COLUMN=NUMBER."""
        found = []
        for condition in self.min_score:
            column, _, value = condition.rpartition("=")
            try:
                found.append((column, plain_number(value, float)))
            except ValueError:
                column = ""
            if not column or math.isnan(found[-1][1]):
                raise ValueError(f"--min-score must be COLUMN=NUMBER, not {condition!r}")
        return found


def fields_of(text: str, header: Collection[str]) -> tuple[str, ...]:
    """The columns of which a caption is made: those in braces, or the one of this name."""
    found = () if text in header else _IN_BRACES.findall(text)
    return tuple(dict.fromkeys(found)) or (text,)


def names_of(option: Sequence[str]) -> tuple[str, ...]:
    """The columns that an option names."""
    return ((option,) if option else ()) if isinstance(option, str) else tuple(option)
