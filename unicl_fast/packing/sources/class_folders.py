"""Class folders in a folder, in a zip or under a URL: the last kind, which refuses all else.

A split's name, such as train, is no class: several splits, or images directly in one, are refused.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.image_folders import METADATA_NAMES, NOT_IMAGES, is_metadata
from unicl_fast.packing.sources.items import Item, refused
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.spool import Source, Spool
from unicl_fast.packing.sources.trees import open_tree
from unicl_fast.system.wording import count_of_kind

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    """Reads class folders; other files beside them are counted, and not read."""
    path = Path(place.name) if place.is_url else place.path
    if place.matches:
        raise ValueError(
            f"{place.given} matches {len(place.matches):,} files or folders, such as "
            f"{place.matches[0]}; patterns only stand for tars and Parquet files, since an image "
            "by itself has neither class nor caption. Name the folder that holds the class "
            "folders, or a list (.csv, .jsonl, ...)"
        )
    options.refuse_filters(path)
    if not options.takes_loose:
        _require_one_split(path, place.folders)  # before all files are listed
    items = spool.new_items()
    passed_over: Counter[str] = Counter()
    holders = set[str]()
    for name, entry in (place.tree if place.is_url else open_tree(path)).entries():
        parts = name.split("/")
        *folders, file_name = parts
        _, dot, extension = file_name.rpartition(".")  # `splitext` would be a tenth of the loop
        suffix = f".{extension.lower()}" if dot else ""
        if isinstance(entry, Problem):
            items.append(Item(name, problem=entry))
        elif name[0] == "." or "/." in name or "__MACOSX" in parts:
            passed_over["hidden files"] += 1
        elif file_name in METADATA_NAMES and is_metadata(name, entry):
            holder = "/".join([str(path), *folders])
            raise ValueError(
                f"{path} holds {name}, a list of images with their texts, which class folders do "
                f"not have: unicl-pack build {holder} --out ... reads it (out of a zip: unpack it)"
            )
        elif suffix in NOT_IMAGES:
            passed_over[f"{suffix} files"] += 1
        elif folders:
            holders.add("/".join(folders))
            items.append(Item(name, entry, [], [folders[-1]]))
        elif options.takes_loose:
            items.append(Item(name, entry, labels=[path.resolve().name]))
        else:
            message = "the image lies in no class folder; expected for example cat/1.jpg"
            items.append(refused(name, "no class", message))
    if not items:
        message = f"{path} holds no images; expected class folders, such as {path}/cat/1.jpg"
        if passed_over:
            passed = ", ".join(count_of_kind(n, kind) for kind, n in passed_over.items())
            message += f". Passed over: {passed}; tars and lists beside folders are not read: name "
            message += "the files, or move the folders away"
        raise ValueError(message)
    if not options.takes_loose:
        _require_one_split(path, holders)
        _require_classes(path, {holder.rpartition("/")[2] for holder in holders})
    return Source(name=place.name, items=items, labels_are_names=True, passed_over=passed_over)


def _require_one_split(path: Path, folders: Iterable[str]) -> None:
    """Raises ValueError for several splits: joined, they would leak into each other."""
    found: dict[str, set[str]] = {}
    for parts in (folder.split("/") for folder in folders):
        for depth, name in enumerate(parts):
            if name.lower() in _SPLITS:
                found.setdefault("/".join([str(path), *parts[:depth]]), set()).add(name)
    for holder, names in found.items():
        if len(splits := sorted(names)) > 1:
            chosen = next((one for one in splits if one.lower().startswith("train")), splits[0])
            every = " ".join(f"{holder}/{split}" for split in splits)
            raise ValueError(
                f"{holder} holds the splits {', '.join(splits)}, which would become one data set. "
                f"Choose one: unicl-pack build {holder}/{chosen} --out ...; or, to join them, name "
                f"each: unicl-pack build {every} --out ..."
            )


def _require_classes(path: Path, classes: Iterable[str]) -> None:
    """Raises ValueError if all images lie directly in the folders of splits."""
    names = sorted(classes)
    if names and all(name.lower() in _SPLITS for name in names):
        raise ValueError(
            f"the only class in {path} would be {names[0]!r}, which is the name of a split. If "
            "captions lie beside the images (1.txt beside 1.jpg, or a metadata.jsonl), name that "
            f"folder: unicl-pack build {path}/{names[0]} --out ...; else put "
            f"the images into class folders, such as {names[0]}/cat/1.jpg"
        )


KIND = SourceKind(recognises=lambda _: True, read=_read)
