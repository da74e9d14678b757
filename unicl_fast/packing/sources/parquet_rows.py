"""Reads Parquet files with pyarrow into a file of JSON lines and a file of images.

`convert` runs in a separate process (`system.child`): a file can lie about sizes and offsets, and
pyarrow is C++.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from unicl_fast.packing.sources.cells import Cells, study_cells
from unicl_fast.packing.sources.entries import MAX_FILE_BYTES, Problem, Span
from unicl_fast.packing.sources.items import Item
from unicl_fast.packing.sources.rows import (
    FAILED_DOWNLOADS,
    LEFT_OUT,
    TableResult,
    TableTask,
    add_texts,
    meets,
    too_low,
)
from unicl_fast.system.untrusted_files import open_file

_IMG2DATASET = {"key", "status", "error_message"}

_BATCH_BYTES = 16_000_000
_MAX_BATCH_ROWS = 1024

_BYTES = (pa.binary(), pa.large_binary(), pa.binary_view())
_BROKEN = (pa.ArrowException, OSError, ValueError)
"""The errors that pyarrow raises for broken files."""


def convert(task: TableTask) -> TableResult:
    """Reads one file; raises ValueError if it lacks columns."""
    with open_file(task.path) as file:
        if not file.read(1):
            return TableResult(damaged=[(0, -1, "the file is empty")])
    try:
        table = pq.ParquetFile(task.path, buffer_size=1 << 20, pre_buffer=False)
        header = list(table.schema_arrow.names)  # raises for names that are not UTF-8
    except _BROKEN as error:
        return TableResult(damaged=[(0, -1, _reason(error))])
    if len(set(header)) < len(header):
        raise ValueError(f"{task.path} has several columns of one name: {header}")

    def rows_of(wanted: Collection[str]) -> Iterator[dict[str, Any]]:
        names = [name for name in header if name in wanted]
        for _, batch in _batches(table, names, []) if names else ():
            with contextlib.suppress(pa.ArrowException, UnicodeDecodeError):  # noted below
                yield from batch.to_pylist()

    cells = study_cells(task.path, header, rows_of, task.options)
    columns = cells.columns
    names = _class_names(table.schema_arrow, columns.labels)
    result = TableResult(labels_are_names=all(label in names for label in columns.labels))
    texts = [name for name in header if name in cells.sources]
    texts += sorted(_IMG2DATASET) if set(header) >= _IMG2DATASET else []
    wanted = list(dict.fromkeys((*columns.images, *texts)))
    with open(task.rows_file, "wb") as rows, open(task.images_file, "wb") as images:
        writer = _RowWriter(task, cells, texts, names, rows, images)
        for first, batch in _batches(table, wanted, result.damaged):
            try:
                writer.write(first, batch)
            except (pa.ArrowException, UnicodeDecodeError, RecursionError) as error:
                result.damaged.append((first, first + batch.num_rows, _reason(error)))
            except ValueError as error:
                raise ValueError(f"{task.path}: {error}") from error
            images.flush()
            rows.flush()  # so that complete lines survive this process
    result.passed_over, result.notes = dict(writer.passed_over), dict(+cells.notes)
    result.columns = {column: list(labels) for column, labels in columns.found.items()}
    return result


def _reason(error: Exception) -> str:
    """The error as a sentence; raises MemoryError again, which ends this process."""
    if isinstance(error, MemoryError):
        raise error
    return " ".join(str(error).split())[:300] or type(error).__name__


def _class_names(schema: pa.Schema, labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The class names of label columns, from Hugging Face's metadata."""
    try:
        found = dict(json.loads(schema.metadata[b"huggingface"])["info"]["features"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}  # absent, or without names
    return {label: names for label in labels if (names := _names_of(found.get(label)))}


def _names_of(feature: Any) -> tuple[str, ...]:
    """The names of a ClassLabel, or of a list of ClassLabels."""
    for _ in range(3):
        if isinstance(feature, list) and feature:
            feature = feature[0]
        elif isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def _batches(
    file: pq.ParquetFile, columns: list[str], damaged: list[tuple[int, int, str]]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields batches with the number of their first row; notes damaged rows.

    Reads page by page: a row group can be the whole file.
    """
    first = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        end = first + group.num_rows
        at, trouble = first, "it holds fewer rows than it declares"
        row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
        size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        try:
            for batch in file.iter_batches(size, [number], columns, use_threads=False):
                yield at, batch
                at += batch.num_rows
        except _BROKEN as error:
            trouble = _reason(error)
        if at < end:
            damaged.append((at, end, trouble))
        first = end


@dataclass(slots=True)
class _RowWriter:
    """Writes batches as rows."""

    task: TableTask
    cells: Cells
    texts: Sequence[str]
    """Columns of texts, conditions, scores, group and weight, and img2dataset's own."""
    names: dict[str, tuple[str, ...]]
    rows: BinaryIO
    images: BinaryIO
    passed_over: Counter[str] = field(default_factory=Counter)

    def write(self, first: int, batch: pa.RecordBatch) -> None:
        """Writes the rows of a batch, or raises before any if one cannot be read."""
        if batch.num_rows == 0:
            return
        file_name, options = os.path.basename(self.task.path), self.task.options
        conditions, scores = options.conditions(), options.scores()
        lines: list[bytes] = []
        passed_over: Counter[str] = Counter()
        fields = {name: batch.column(name).to_pylist() for name in self.texts}
        images = [_Images(batch.column(name)) for name in self.cells.columns.images]
        if len(images) > 1 and any(one.has_bytes for one in images):
            raise ValueError(
                f"of the columns {', '.join(self.cells.columns.images)} some hold images, and only "
                "paths are read from several: name one of them by --image-column"
            )
        for number in range(batch.num_rows):
            row = {name: values[number] for name, values in fields.items()}
            row = self.cells.with_attributes(row)
            if row.keys() >= _IMG2DATASET and row["status"] not in (None, "success"):
                passed_over[FAILED_DOWNLOADS] += 1
                continue
            if not meets(row, conditions):
                passed_over[LEFT_OUT] += 1
                continue
            listed = zip(self.cells.columns.images, images, strict=True)
            paths = self.cells.images_of({name: each.path_at(number) for name, each in listed})
            item = Item(f"{file_name}:{first + number}", problem=too_low(row, scores))
            named: Sequence[str] = ()
            if item.problem is None:
                row = self.cells.texts_of(row, paths)
                item.problem = self._name_labels(row)
            if item.problem is None:
                add_texts(item, row, self.cells.columns, f"{file_name}, row {first + number}")
                named = self._add_image(item, images[0], number, paths)
            try:
                line = msgspec.json.encode((first + number, item, named))
            except UnicodeEncodeError:  # JSON in a cell can spell half a character
                problem = Problem("bad row", "a name in it is no text: half a character")
                line = msgspec.json.encode((first + number, Item(item.name, problem=problem), ()))
            lines.append(line + b"\n")
        self.rows.writelines(lines)
        self.passed_over += passed_over

    def _name_labels(self, row: dict[str, Any]) -> Problem | None:
        """Replaces numbers by class names; a number without a name is a problem."""
        for column, names in self.names.items():
            found = row[column] if isinstance(row[column], list) else [row[column]]
            row[column] = []
            for value in found:
                is_number = isinstance(value, int) and not isinstance(value, bool)
                if is_number and not -1 <= value < len(names):
                    message = f"{column} {value}, where there are {len(names)} class names"
                    return Problem("bad row", message)
                row[column].append(names[value] if is_number and value >= 0 else value)
        return None

    def _add_image(
        self, item: Item, images: _Images, number: int, paths: Sequence[str]
    ) -> Sequence[str]:
        """Copies the row's image, and returns nothing; or returns its paths."""
        buffer = images.bytes_at(number)
        if buffer is None:
            item.problem = item.problem if paths else Problem("missing", "no image in the row")
            return paths
        if buffer.size > MAX_FILE_BYTES:
            item.problem = Problem("too large", f"an image of {buffer.size:,} bytes")
        elif item.problem is None:
            item.entry = Span("", self.images.tell(), buffer.size)
            self.images.write(buffer)
        return ()


class _Images:
    """A column of images: bytes, paths, or Hugging Face's structs of both."""

    def __init__(self, column: pa.Array) -> None:
        self._paths: pa.Array | None = None
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_struct(column.type):
            names = [column.type.field(number).name for number in range(column.type.num_fields)]
            # `flatten` nulls the bytes of null rows
            parts = dict(zip(names, column.flatten(), strict=True))
            self._paths, values = parts.get("path"), parts.get("bytes")
            is_image = "bytes" in parts or "path" in parts
        elif column.type in (pa.string(), pa.large_string(), pa.string_view()):
            self._paths, values, is_image = column, None, True
        else:
            values, is_image = column, _is_bytes(column.type)
        if not is_image:
            raise ValueError(
                f"the column of images is of type {column.type}; expected bytes, paths, or a "
                "struct of `bytes` and `path`"
            )
        self._values = values if values is not None and _is_bytes(values.type) else None
        self.has_bytes = self._values is not None and self._values.null_count < len(column)

    def bytes_at(self, number: int) -> pa.Buffer | None:
        if self._values is None or not (value := self._values[number]).is_valid:
            return None
        return value.as_buffer()

    def path_at(self, number: int) -> str | None:
        return None if self._paths is None else self._paths[number].as_py()


def _is_bytes(kind: pa.DataType) -> bool:
    return kind in _BYTES or bool(pa.types.is_fixed_size_binary(kind))
