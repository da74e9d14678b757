"""COCO's JSON files: captions, instances, or both about the same images; and JSON in pieces.

All COCO files of a build are read together. Where two of them name the same image file, that is
one sample with the captions of one and the labels of the other.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from unicl_fast.packing.sources.items import (
    Columns,
    Entry,
    Item,
    ListOptions,
    Problem,
    Source,
    add_texts,
    refused,
)
from unicl_fast.packing.sources.spool import Spool
from unicl_fast.packing.sources.trees import Tree, find_image, open_tree

_COLUMNS = Columns("", ("caption",), ("category",))

Id = int | str


def is_coco(path: Path) -> bool:
    """Whether a .json is one object; one that is an array is a list like any other."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1] != "["


def read_coco(paths: Sequence[Path], options: ListOptions, spool: Spool) -> Source:
    """Reads COCO files as one source.

    They are captions_*.json, instances_*.json, or others of this form: `images` with `id` and
    `file_name`; `annotations` with `image_id`, and `caption` or `category_id`; `categories` with
    `id` and `name`. Without `image_root` the images are looked for beside each file.
    """
    names = ", ".join(path.name for path in paths)
    if options.scores():
        raise ValueError(f"{names}: COCO's files have no scores: leave --min-score out")
    if options.conditions():
        raise ValueError(f"{names}: COCO's files have no columns: leave --where out")
    items: dict[Entry | str, Item] = {}
    broken: list[Item] = []
    passed_over: Counter[str] = Counter()
    open_once = functools.cache(open_tree)  # a zip may have a long directory
    for path in paths:
        found = _read_file(path)
        tree = open_once(Path(options.image_root) if options.image_root else _image_folder(path))
        for number, name in found.images:
            _add_image(number, name, found, tree, items, broken)
        if unlisted := sum(texts.count for texts in found.texts.values() if not texts.listed):
            passed_over["annotations of images that are not listed"] += unlisted
        if found.num_unreadable:
            passed_over["annotations that cannot be read"] += found.num_unreadable
    stored = spool.new_items()
    stored.extend([*items.values(), *broken])
    return Source(
        name="+".join(path.name for path in paths),
        items=stored,
        labels_are_names=True,
        passed_over=passed_over,
    )


@dataclass(slots=True)
class _Texts:
    """The annotations of one image in one file."""

    captions: list[Any] = field(default_factory=list)
    categories: dict[Id, None] = field(default_factory=dict)
    count: int = 0
    listed: bool = False
    """Whether the file has listed the image; it may do so once."""


@dataclass(slots=True)
class _File:
    """The parts of one JSON file that are used."""

    images: list[tuple[Any, Any]] = field(default_factory=list)
    """(id, file_name), unchecked."""
    categories: dict[Id, str] = field(default_factory=dict)
    texts: dict[Id, _Texts] = field(default_factory=dict)
    num_unreadable: int = 0


def _read_file(path: Path) -> _File:
    found = _File()
    kinds = set()
    for kind, element in iter_elements(path):
        if kind not in ("images", "annotations", "categories"):
            continue
        kinds.add(kind)
        fields = element if isinstance(element, dict) else {}
        if kind == "images":
            found.images.append((fields.get("id"), fields.get("file_name")))
        elif kind == "annotations" or not isinstance(element, dict):
            _note(fields, found)
        elif _is_id(fields.get("id")) and isinstance(fields.get("name"), str):
            found.categories[fields["id"]] = fields["name"]
    if not {"images", "annotations"} <= kinds:
        raise ValueError(
            f"{path} is no COCO file of captions or instances, which has `images` and "
            f"`annotations`; of these it has: {', '.join(sorted(kinds)) or 'none'}. Other lists "
            "are JSONL files, or one array of objects with `image` and `caption` or `label`"
        )
    return found


def _note(annotation: dict[str, Any], found: _File) -> None:
    image, category = annotation.get("image_id"), annotation.get("category_id")
    has_caption = "caption" in annotation
    if not _is_id(image) or not (has_caption or _is_id(category)):
        found.num_unreadable += 1
        return
    texts = found.texts.setdefault(image, _Texts())
    texts.count += 1
    if has_caption:
        texts.captions.append(annotation["caption"])
    if _is_id(category):
        texts.categories[category] = None


def _is_id(value: Any) -> TypeGuard[Id]:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _add_image(
    number: Any,
    name: Any,
    found: _File,
    tree: Tree,
    items: dict[Entry | str, Item],
    broken: list[Item],
) -> None:
    """Makes the item of an image, or adds to the one that another file has made."""
    if not _is_id(number) or not isinstance(name, str) or not name:
        message = "an entry of `images` without a usable `id` and `file_name`"
        broken.append(refused(f"image {number!s:.40}", "bad row", message))
        return
    where = f"image id {number}"
    item = find_image(tree, name)
    item = items.setdefault(item.entry or name, item)
    texts = found.texts.setdefault(number, _Texts())
    if texts.listed:
        item.problem = Problem("ambiguous", f"{where} is listed twice")
        return
    texts.listed = True
    unknown = [category for category in texts.categories if category not in found.categories]
    if unknown:
        message = f"{where}: category {unknown[0]} is not among the file's categories"
        item.problem = Problem("bad row", message)
        return
    labels = [found.categories[category] for category in texts.categories]
    add_texts(item, {"caption": texts.captions, "category": labels}, _COLUMNS, where)


def _image_folder(path: Path) -> Path:
    """Returns where the images of annotations/captions_val2017.json are: val2017, images, or here.

    Each is looked for in the folder of the file and in the one above.
    """
    part = path.stem.rpartition("_")[2]
    for name in dict.fromkeys((part, "images")):
        for folder in (path.parent, path.parent.parent):
            if (folder / name).is_dir():
                return folder / name
            if (folder / f"{name}.zip").is_file():
                return folder / f"{name}.zip" / name
    return path.parent


_BLOCK = 1 << 20
MAX_ELEMENT = 64 << 20
"""Characters of one element, twice which may be held. The outline of a crowd takes some 100,000."""

_decoder = json.JSONDecoder()
_BEHIND_VALUES = frozenset(" \t\r\n,]}:")
_NO_BLANK = re.compile(r"[^ \t\r\n]")


def iter_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields what a JSON file holds, in pieces.

    An array at the top gives its elements, each as ("", element). An object gives for each of its
    fields (name, value), and where the value is an array (name, element) for each element of it.

    Raises:
        ValueError: it is not JSON, or is cut short; what came before has been yielded.
    """
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from _JsonWindow(file).top()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error


class _JsonWindow:
    """Part of a JSON text, which moves forwards through it.

    ijson, with its parser in C, takes 5.6 s for 154 MB of COCO's instances where this takes 1.7 s
    (it reads the file once for each of the three arrays; its events are no faster). It also holds
    an element of any length, and refuses NaN and integers of more than 64 bits, which cost only
    their row here.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._at = 0
        self._before = 0
        """Characters of the file before the window."""
        self._ended = False

    def top(self) -> Iterator[tuple[str, Any]]:
        opening = self._peek()
        if opening not in ("[", "{"):
            raise ValueError(f"it begins with {opening!r}, not with [ or {{")
        yield from self._array("") if opening == "[" else self._object()
        if rest := self._peek():
            raise ValueError(f"{rest!r} follows where it should end")

    def _object(self) -> Iterator[tuple[str, Any]]:
        for _ in self._between("{", "}"):
            name = self._value()
            if not isinstance(name, str):
                raise ValueError(f"a field's name at character {self._position:,} is no text")
            self._take(":")
            if self._peek() == "[":
                yield from self._array(name)
            else:
                yield name, self._value()

    def _array(self, name: str) -> Iterator[tuple[str, Any]]:
        for _ in self._between("[", "]"):
            yield name, self._value()

    def _between(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each entry between brackets, which the caller then reads."""
        self._take(opening)
        if self._peek() == closing:
            self._take(closing)
            return
        yield
        while self._take(f",{closing}") == ",":
            yield

    def _value(self) -> Any:
        """Reads the next value as a whole."""
        self._peek()
        wanted = _BLOCK
        while True:
            is_all = self._ended or len(self._text) - self._at > MAX_ELEMENT
            try:
                value, end = _decoder.raw_decode(self._text, self._at)
            except ValueError as error:  # not JSON, or more digits than Python converts
                if is_all:
                    position = self._before + getattr(error, "pos", self._at)
                    reason = getattr(error, "msg", error)
                    raise ValueError(f"at character {position:,}: {reason}") from error
            else:
                # a number at the end of the window, as 1 or 1. may be, can continue after it
                if is_all or self._text[end : end + 1] in _BEHIND_VALUES:
                    self._at = end
                    return value
            self._more(wanted)
            wanted *= 2  # so that a long element is not tried again at every block

    def _take(self, characters: str) -> str:
        """Reads the next character that is no blank, which must be one of these."""
        found = self._peek()
        self._at += len(found)
        if not found or found not in characters:
            wanted, found = " or ".join(characters), repr(found) if found else "the end"
            raise ValueError(f"at character {self._position:,}: {found} where {wanted} should be")
        return found

    def _peek(self) -> str:
        """Returns the next character that is no blank, or nothing at the end."""
        while True:
            if found := _NO_BLANK.search(self._text, self._at):
                self._at = found.start()
                return found.group()
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more(_BLOCK)

    def _more(self, num_characters: int) -> None:
        self._before += self._at
        read = self._file.read(num_characters)
        self._text = self._text[self._at :] + read
        self._at = 0
        self._ended = not read

    @property
    def _position(self) -> int:
        return self._before + self._at
