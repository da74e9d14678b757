"""Parquet lists and folders of Hugging Face's `datasets`, read with pyarrow.

Images are bytes in the file or paths beside it. Numbers that the file has names for become these
names. The files themselves are gone through by `arrow_tables`, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicl_fast.packing.limited_processes import run_limited
from unicl_fast.packing.sources.item_store import NamedItems
from unicl_fast.packing.sources.items import (
    Columns,
    Item,
    ListOptions,
    Problem,
    Source,
    add_texts,
)
from unicl_fast.packing.sources.lists import find_image
from unicl_fast.packing.sources.spans import Span
from unicl_fast.packing.sources.spool import Spool, full_disk, stamp
from unicl_fast.packing.sources.trees import Trees

if TYPE_CHECKING:
    from unicl_fast.packing.sources.arrow_tables import TableResult, TableTask

PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather")
_MEMORY_BYTES = 5_000_000_000
"""A ceiling: for a page, packed and unpacked, which may have 2 GB each; 16 MB is a usual use."""
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}.*\.parquet")
_COLUMNS = Columns("", ("captions",), ("labels",))
_MAX_JSON_BYTES = 64_000_000


def read_tables(
    name: str,
    paths: Sequence[Path],
    options: ListOptions,
    spool: Spool,
    *,
    features: str = "",
) -> Source:
    """Reads Parquet or Arrow files as one source.

    Args:
        name: what the source is to be called.
        paths: the files.
        options: for lists.
        spool: where images are unpacked.
        features: of Hugging Face's `datasets`, as JSON.

    Raises:
        ValueError: pyarrow is not installed, or no file has rows that can be read.
        OSError: the disk is full.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{name}: reading Parquet and Arrow files takes pyarrow, which is not installed: "
            "pip install 'unicl_fast[sources]'"
        )
    from unicl_fast.packing.sources.arrow_tables import TableTask, convert

    tasks = [
        TableTask(
            path=str(path),
            options=options,
            rows_file=str(spool.new_file()),
            images_file=str(spool.new_file()),
            features=features,
        )
        for path in paths
    ]
    spool.origins.extend(task.path for task in tasks)
    reader = _Reader(options, spool)
    known = [spool.recall(*_files_of(task)) for task in tasks]
    new = [task for task, values in zip(tasks, known, strict=True) if values is None]
    results = run_limited(convert, new, memory_bytes=_MEMORY_BYTES)
    try:
        for task, values in zip(tasks, known, strict=True):
            if values is not None:
                reader.add(task, _result_of(values))
                continue
            result = next(results)
            if not isinstance(result, Problem):
                spool.remember(*_files_of(task), dataclasses.asdict(result))
            reader.add(task, result)
        assert next(results, None) is None, "which also ends their process"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise full_disk(tasks[0].images_file) from error
        raise
    if not reader.items:
        reasons = [problem.message for item in reader.broken if (problem := item.problem)]
        raise ValueError(": ".join([f"{name} has no rows that can be read", *reasons[:1]]))
    reader.items.extend(reader.broken)
    return Source(
        name=name,
        items=reader.items,
        labels_are_names=reader.labels_are_names,
        passed_over=reader.passed_over,
    )


def _files_of(task: TableTask) -> tuple[list[Path], list[Any]]:
    """What is made of a file, and what that depends on, for `Spool.remember`."""
    made_of = [*stamp(task.path), repr(task.options), task.features]
    return [Path(task.rows_file), Path(task.images_file)], made_of


def _result_of(values: dict[str, Any]) -> TableResult:
    from unicl_fast.packing.sources.arrow_tables import TableResult

    damaged = [(first, end, message) for first, end, message in values["damaged"]]
    return TableResult(
        labels_are_names=values["labels_are_names"],
        passed_over=Counter(values["passed_over"]),
        damaged=damaged,
    )


class _Reader:
    """Makes items of the rows that have been written out."""

    def __init__(self, options: ListOptions, spool: Spool) -> None:
        self._root = options.image_root
        self._spool = spool
        self._trees = Trees()
        self.items = spool.new_items()
        self._named = NamedItems(self.items)
        self.broken: list[Item] = []
        self.passed_over: Counter[str] = Counter()
        self.labels_are_names = True

    def add(self, task: TableTask, result: TableResult | Problem) -> None:
        path, rows = Path(task.path), Path(task.rows_file)
        self._tree = self._trees.find(Path(self._root) if self._root else path.parent)
        behind = 0
        if rows.exists():
            with rows.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # not so where the process died in the middle
                        behind = self._add_row(task, path.name, json.loads(line)) + 1
            self._spool.release(rows)
        if isinstance(result, Problem):
            self.broken.append(Item(f"{path.name} from row {behind}", problem=result))
            return
        self.passed_over += result.passed_over
        self.labels_are_names &= result.labels_are_names
        for first, end, message in result.damaged:
            rest = f"from row {first}" if end < 0 else f"rows {first} to {end - 1}"
            problem = Problem(kind="damaged", message=message)
            self.broken.append(Item(f"{path.name} {rest}", problem=problem))

    def _add_row(self, task: TableTask, file_name: str, row: dict[str, Any]) -> int:
        number: int = row["row"]
        problem = row.get("problem")
        if "path" in row and problem is None:
            self._add_path(row, f"{file_name}, row {number}")
            return number
        item = Item(f"{file_name}:{number}", place=number)
        if problem is not None:
            item.problem = Problem(kind=problem[0], message=problem[1])
        else:
            file = task.path if row["in_place"] else task.images_file
            item.entry = Span(file, row["offset"], row["size"])
            add_texts(item, row, _COLUMNS, f"{file_name}, row {number}")
        self.items.append(item)
        return number

    def _add_path(self, row: dict[str, Any], where: str) -> None:
        """Adds a row that names its image; rows with one path are one sample."""
        known = self._named.find(row["path"])
        item = self._find(row["path"]) if known is None else Item(row["path"])
        add_texts(item, row, _COLUMNS, where)
        if known is None:
            item.place = row["row"]
            self._named.append(item)
        else:
            self.items.add_row(known, item)

    def _find(self, name: str) -> Item:
        if re.match(r"https?://", name):
            message = "an address, not a file; img2dataset fetches such lists"
            return Item(name, problem=Problem(kind="missing", message=message))
        return find_image(self._tree, name)


def is_saved_dataset(place: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of Hugging Face's `datasets`."""
    state = place / "state.json"
    if not state.is_file():
        return (place / "dataset_dict.json").is_file()
    with state.open("rb") as file:  # others have files of this name too
        return b'"_data_files"' in file.read(_MAX_JSON_BYTES)


def read_saved_dataset(place: Path, options: ListOptions, spool: Spool) -> Source:
    """Reads a folder that `save_to_disk` made: one split of a data set.

    Raises:
        ValueError: it holds several splits, or its description cannot be read.
        FileNotFoundError: a file of it is not there.
    """
    if not (place / "state.json").is_file():
        splits = _read_json(place / "dataset_dict.json").get("splits")
        known = ", ".join(map(str, splits)) if isinstance(splits, list) else "?"
        raise ValueError(f"{place} holds the splits {known}; name one, such as {place}/train")
    state = _read_json(place / "state.json")
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{place} was saved with a selection of its rows beside them; save it again by a newer "
            "version of `datasets`, or after flatten_indices()"
        )
    files = state.get("_data_files")
    names = (
        [file.get("filename") for file in files if isinstance(file, dict)]
        if isinstance(files, list)
        else []
    )
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise ValueError(f"{place / 'state.json'} does not say what files the data set has")
    paths = [place / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files that state.json names are not there: {missing[0]}"
        )
    info = place / "dataset_info.json"
    features = json.dumps(_read_json(info)) if info.is_file() else ""
    return read_tables(place.name, paths, options, spool, features=features)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            fields = json.loads(file.read(_MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error!s:.300}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no JSON object")
    return fields


def find_parquet(place: Path) -> list[Path]:
    """The Parquet files of a folder as data sets lie on Hugging Face's hub: here or in data/."""
    for folder in (place, place / "data"):
        if folder.is_dir():
            found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PARQUET]
            if found:
                return found
    return []


def choose_split(place: Path, paths: list[Path], split: str = "") -> list[Path]:
    """The files of one split, by names such as train-00000-of-00002.parquet.

    Raises:
        ValueError: there are several and none is asked for, or not the one that is.
    """
    splits = {
        path: match.group(1) if (match := _SPLIT.fullmatch(path.name)) else "" for path in paths
    }
    known = sorted(set(splits.values()))
    if not split and len(known) == 1:
        return paths
    if split in known:
        return [path for path in paths if splits[path] == split]
    wanted = f"no split {split!r}; it has" if split else "several splits:"
    raise ValueError(
        f"{place} has {wanted} {', '.join(name or 'files of other names' for name in known)}; name "
        f"one, such as {place}/{known[-1] or 'train'}"
    )
