"""Parquet lists and folders of them as on Hugging Face's hub; `parquet_rows` reads the files."""

import errno
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from unicl_fast.packing.sources.entries import Problem
from unicl_fast.packing.sources.items import Item, Label, problem_of, refused
from unicl_fast.packing.sources.list_options import ListOptions
from unicl_fast.packing.sources.lists import add_named
from unicl_fast.packing.sources.named_images import NamedImages
from unicl_fast.packing.sources.read_sources import Place, SourceKind
from unicl_fast.packing.sources.rows import TableResult, TableTask
from unicl_fast.packing.sources.spool import ItemStore, Source, Spool
from unicl_fast.packing.sources.trees import open_tree
from unicl_fast.system.atomic_files import flush_to_disk, write_text_atomically
from unicl_fast.system.checksums import dump_checksummed_json, parse_checksummed_json
from unicl_fast.system.child import Death, run_limited
from unicl_fast.system.installation import install_command
from unicl_fast.system.untrusted_files import read_file

_PARQUET = (".parquet", ".pq")
_MEMORY_BYTES = 5_000_000_000
"""A limit, for a page of up to 2 GB, packed and unpacked; usually 16 MB are in use."""
_decode_row = msgspec.json.Decoder(tuple[int, Item, list[str]]).decode
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}.*\.parquet")


def _recognises(place: Place) -> bool:
    if place.is_file:
        return place.path.suffix.lower() in _PARQUET
    if place.is_folder:  # without folders, except the hub's data/
        return bool(find_parquet(place.path)) and place.folders - place.aside <= {"data"}
    if place.matches:
        return all(name.lower().endswith(_PARQUET) for name in place.matches)
    return any(map(_split_of, _files_of_split(place)))


def _files_of_split(place: Place) -> list[Path]:
    """The Parquet files of folder F if the place is F/train, say, and does not exist."""
    is_split = not (place.is_url or place.path.suffix)
    return find_parquet(place.path.parent) if is_split else []


def _read(place: Place, options: ListOptions, spool: Spool) -> Source:
    name, paths = place.name, [place.path]
    if place.is_folder:
        paths = _choose_split(place.path, find_parquet(place.path))
    elif place.matches:
        paths = list(map(Path, place.matches))
    elif not place.is_file:
        folder = place.path.parent
        name = f"{folder.name}/{name}"
        paths = _choose_split(folder, _files_of_split(place), split=place.name)
    source = _read_tables(name, paths, options, spool)
    source.passed_over.update(place.count_aside())
    return source


def _read_tables(name: str, paths: Sequence[Path], options: ListOptions, spool: Spool) -> Source:
    """Reads Parquet files as one source."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{name}: reading Parquet files needs pyarrow, which is not installed: "
            f"{install_command('sources')}"
        )
    tasks = []
    for file in map(str, paths):
        rows, images = str(spool.new_file(file)), str(spool.new_file(file))
        tasks.append(TableTask(file, options, rows, images))
    roots = {Path(options.image_root)} if options.image_root else {path.parent for path in paths}
    named = NamedImages(name, open_tree(roots.pop())) if len(roots) == 1 else None
    items, broken = spool.new_items(), list[Item]()
    passed_over, notes, labels_are_names = Counter[str](), Counter[str](), True
    columns: dict[str, dict[Label, None]] = {}
    for task, result in _unpack(tasks):
        path = Path(task.path)
        behind = _read_rows(task, named, items)
        if isinstance(result, Problem):
            broken.append(Item(f"{path.name} from row {behind}", problem=result))
            continue
        passed_over.update(result.passed_over)
        notes.update(result.notes)
        for column, labels in result.columns.items():
            columns.setdefault(column, {}).update(dict.fromkeys(labels))
        labels_are_names &= result.labels_are_names
        for first, end, message in result.damaged:
            rest = f"from row {first}" if end < 0 else f"rows {first} to {end - 1}"
            broken.append(refused(f"{path.name} {rest}", "damaged", message))
    if not items:
        reasons = [problem.message for item in broken if (problem := item.problem)]
        reasons += passed_over
        raise ValueError(": ".join([f"{name} has no rows that can be read", *reasons[:1]]))
    items.extend(broken)
    source = Source(
        name=name, items=items, labels_are_names=labels_are_names, passed_over=passed_over,
        notes=notes, columns=columns,
    )  # fmt: skip
    if named is not None:
        named.finish(source)
    return source


def _unpack(tasks: Sequence[TableTask]) -> Iterator[tuple[TableTask, TableResult | Problem]]:
    """Unpacks files, except those that an earlier run of the build has completed."""
    from unicl_fast.packing.sources.parquet_rows import convert

    known = [_recall(task) for task in tasks]
    new = [task for task, result in zip(tasks, known, strict=True) if result is None]
    results = run_limited(convert, new, memory_bytes=_MEMORY_BYTES)
    for task, before in zip(tasks, known, strict=True):
        result: TableResult | Problem | None = before
        if result is None:
            try:
                found = next(results)
                result = problem_of(found) if isinstance(found, Death) else found
                # nothing is written for a file that cannot be opened
                if isinstance(result, TableResult) and os.path.exists(task.rows_file):
                    _remember(task, result)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                message = f"no room left for {task.images_file}: unpacked images need their full "
                raise OSError(errno.ENOSPC, f"{message}size on the disk of --out") from error
        yield task, result
    assert next(results, None) is None, "which also ends their process"


def _remember(task: TableTask, result: TableResult) -> None:
    """Records that a file is unpacked; a build that resumes has the same options and sources."""
    for file in (task.rows_file, task.images_file):
        flush_to_disk(Path(file))
    write_text_atomically(_note_of(task), dump_checksummed_json(msgspec.to_builtins(result)))


def _recall(task: TableTask) -> TableResult | None:
    """The recorded result."""
    try:
        return msgspec.convert(parse_checksummed_json(read_file(_note_of(task))), TableResult)
    except (ValueError, OSError):
        return None


def _note_of(task: TableTask) -> Path:
    return Path(f"{task.rows_file}.json")


def _read_rows(task: TableTask, named: NamedImages | None, items: ItemStore) -> int:
    """Adds the rows that were written; returns the number after the last."""
    number = -1

    def find(name: str) -> Item:
        if named is None:  # the same path in two folders would be one sample
            raise ValueError(
                f"{task.path}, row {number}, names the image {name!r}, and the files of this "
                "source lie in several folders: make each file a source, or give the folder in "
                "which all paths start by --image-root"
            )
        return named.find(name)

    if not os.path.exists(task.rows_file):
        return 0
    with open(task.rows_file, "rb") as rows:
        for line in rows:
            if not line.endswith(b"\n"):  # the process died in the middle
                break
            number, item, paths = _decode_row(line)
            if item.entry is not None:
                item.entry = msgspec.structs.replace(item.entry, path=task.images_file)
            for name in paths:  # rows with one path are one sample
                add_named(items, msgspec.structs.replace(item, name=name), find)
            if not paths:
                items.append(item)
    return number + 1


def find_parquet(folder: Path) -> list[Path]:
    """The Parquet files in a folder or, as on Hugging Face's hub, in its data/."""
    for each in (folder, folder / "data"):
        if each.is_dir():
            found = [path for path in sorted(each.iterdir()) if path.suffix.lower() in _PARQUET]
            if found:
                return found
    return []


def _split_of(path: Path) -> str:
    """The split of a file named like train-00000-of-00002.parquet; "" for others."""
    match = _SPLIT.fullmatch(path.name)
    return match.group(1) if match else ""


def _choose_split(folder: Path, paths: list[Path], split: str = "") -> list[Path]:
    """The files of one split; ValueError if there are several to choose from, or none."""
    known = sorted(set(map(_split_of, paths)))
    if not split and len(known) == 1:
        return paths
    if split in known:
        return [path for path in paths if _split_of(path) == split]
    wanted = f"no split {split!r}; it has" if split else "several splits:"
    listed = ", ".join(name or "files of other names" for name in known)
    raise ValueError(
        f"{folder} has {wanted} {listed}; name one, such as {folder}/{known[-1] or 'train'}"
    )


KIND = SourceKind(recognises=_recognises, read=_read)
