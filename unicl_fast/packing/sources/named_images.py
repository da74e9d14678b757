"""Finds the images that lists name by paths, and advises if none exists."""

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.spool import Source
from unicl_fast.packing.sources.trees import Tree, find_image
from unicl_fast.system.wording import count_of

_ENOUGH = 1000  # after so many missing images in a row from the start, a wrong folder is reported
_FOLDERS_TRIED = 100
_ADDRESS = re.compile(r"https?://")
_WINDOWS = "paths with \\ read as if it were /"
_SLASH = "paths that begin with / found below the image root"


class NamedImages:
    """Finds images of one list in a tree; `listed` is the list, for messages."""

    def __init__(self, listed: object, tree: Tree) -> None:
        self._listed, self._tree = listed, tree
        self._num_found = self._num_missing = 0
        self._renamed: Counter[str] = Counter()
        self._first_missing = ""

    def find(self, *names: str) -> Item:
        """Returns the item of an image, by the first of its possible names that exists.

        Raises ValueError if it is the thousandth missing image, and none was found.
        """
        found = [self._find(name) for name in names]
        item = next((one for one in found if one.problem is None), found[0])
        if item.problem is not None and ("\\" in item.name or item.name.startswith("/")):
            plain = self._find(item.name.replace("\\", "/").lstrip("/"))
            if plain.problem is None:
                self._renamed[_SLASH if item.name.startswith("/") else _WINDOWS] += 1
                item = Item(item.name, plain.entry)
        if item.problem is None:
            self._num_found += 1
        elif item.problem.kind in ("missing", "outside"):
            self._num_missing += 1
            self._first_missing = self._first_missing or item.name
            if self._num_missing == _ENOUGH:
                self._require_some()
        return item

    def finish(self, source: Source) -> None:
        """Counts renamed paths in `source`; raises ValueError if no image was found."""
        self._require_some()
        source.notes.update(self._renamed)

    def _require_some(self) -> None:
        """Raises ValueError, with advice, if all images so far are missing."""
        if self._num_missing and not self._num_found:
            raise ValueError(
                f"{self._listed}: not one of {count_of(self._num_missing, 'image')} is there, such "
                f"as {self._first_missing!r} in {self._tree.root}. {self._advise()}"
            )

    def _find(self, name: str) -> Item:
        if _ADDRESS.match(name):
            return refused(name, "missing", "an address, not a file")
        return find_image(self._tree, name)

    def _advise(self) -> str:
        name = self._first_missing.replace("\\", "/")
        below = name.lstrip("/")
        if _ADDRESS.match(name):
            return (
                "They are addresses: download them with img2dataset (img2dataset --url_list FILE "
                "--input_format parquet --output_format webdataset ...) and build from the folder "
                "that it makes; or name a column with paths by --image-column"
            )
        parts = name.split("/")
        if ".." in parts:
            return "Write the paths without .., and give the folder they start in: --image-root"
        whole = [Path("/")] if name != below else []
        for folder in (*whole, *self._folders()):
            with contextlib.suppress(OSError, ValueError):  # zero bytes in names, or too long ones
                if (folder / below).is_file():
                    return f"It is in {folder}: add --image-root {folder}"
        for number in range(1, len(parts)):
            rest = "/".join(parts[number:])
            if self._find(rest).problem is None:
                before = "/".join(parts[:number])
                return f"{rest!r} is there: remove {before!r} from the beginning of all paths"
        return "Give the folder or zip in which the paths start: --image-root"

    def _folders(self) -> Iterator[Path]:
        """Yields folders in which the paths could start: here, above the root, in and beside it."""
        root = self._tree.root.absolute()
        yield from (Path.cwd(), *root.parents)
        for above in (root, root.parent):
            with contextlib.suppress(OSError):
                folders = (Path(each.path) for each in os.scandir(above) if each.is_dir())
                yield from islice(folders, _FOLDERS_TRIED)
