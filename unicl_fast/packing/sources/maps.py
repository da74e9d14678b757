"""Maps of zips, as Swin and UniCL use them: `train_map.txt` lists the images in `train.zip`."""

import functools
from pathlib import Path

from unicl_fast.packing.sources.cells import Cells
from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.lists import Rows, collect_rows
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import Columns
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import find_image, open_tree
from unicl_fast.system.untrusted_files import open_file

_ENDING = "map.txt"


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads `train_map.txt`: lines PATH<TAB>NUMBER, paths in the zip next to it, or ZIP@PATH.

    The zip is `train.zip`, unless `--image-root` names another, or a folder.
    """
    path = place.path
    stem = path.name.lower().removesuffix(_ENDING).rstrip("_-.")
    beside = path.with_name(path.name[: len(stem)] + ".zip") if stem else path.parent
    root = Path(options.image_root) if options.image_root else beside
    open_once = functools.cache(open_tree)  # a zip can have a long directory

    def find(name: str) -> Item:
        archive, at, inside = name.rpartition("@")
        if ".." in archive.split("/") or archive.startswith("/"):
            return refused(name, "outside", "the zip lies elsewhere")
        try:
            tree = open_once(path.parent / archive if at else root)
        except (OSError, ValueError) as error:
            if not at:
                raise
            return refused(name, "missing", str(error))
        item = find_image(tree, inside.lstrip("/") if at else name)
        item.name = name
        return item

    cells = Cells(columns=Columns(("image",), (), ("label",)))
    return collect_rows(path, _map_rows(path), cells, options, find, spool)


def _map_rows(path: Path) -> Rows:
    """Yields lines PATH<TAB>NUMBER; a path can hold blanks."""
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            name, _, label = line.decode("utf-8", "surrogateescape").rstrip("\r\n").rpartition("\t")
            if name and "\t" not in name and label.strip().removeprefix("-").isdecimal():
                yield number, {"image": name, "label": int(label)}
            else:
                yield number, Problem("bad row", "not PATH<TAB>NUMBER")


KIND = SourceKind(
    recognises=lambda place: place.is_file and place.name.lower().endswith(_ENDING), read=_read
)
