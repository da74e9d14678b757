"""`unicl-pack inspect` as a sub-command: its arguments, its report and its files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unicl_fast.dataset.manifest import QUARANTINE_COLUMNS, Manifest, describe_columns
from unicl_fast.dataset.object_store import is_url
from unicl_fast.images.limits import DEFAULT_DISTANCE, MAX_DISTANCE
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.wording import count_of, markdown_table, without_secrets

from ..numbers import OneDataSet

if TYPE_CHECKING:
    from unicl_fast.packing.inspect import Copies, Inspection, Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """Describe a packed data set: counts, classes, captions, sizes, copies.

    Near copies are found by perceptual hashes.

    Examples:
      unicl-pack inspect packed/photos --html photos.html

      unicl-pack inspect packed/photos --duplicates-list near.csv
      unicl-pack build packed/photos --leave-out near.csv --out packed/clean
    """

    folder: Annotated[OneDataSet, tyro.conf.Positional]
    """The data set; one under a URL is copied, inspected and removed."""
    html: Path | None = None
    """Write one self-contained page with plots and a contact sheet into this file."""
    json: Path | None = None
    """Write all numbers, and the groups of copies, into this file."""
    duplicates_list: Path | None = None
    """Write all but the first image of each group of copies into this CSV file, for build's
    --leave-out. Check it first: images that look alike need not be copies."""
    near: bool = True
    """Look for images that look alike, which decodes all."""
    near_distance: int = DEFAULT_DISTANCE
    """How many of 64 bits of a perceptual hash can differ: 4 finds copies in another size, quality,
    aspect or in grey, 8 also copies cut by a twentieth; beyond 10 unrelated photographs match."""
    workers: int = 0
    """Processes that hash images; 0 starts one for each core."""

    def run(self) -> tuple[str, int]:
        from unicl_fast.packing.staging import local_copy

        if not 0 <= self.near_distance <= MAX_DISTANCE:
            raise ValueError(
                f"--near-distance must lie in 0 to {MAX_DISTANCE}, not {self.near_distance}"
            )
        if self.workers < 0:
            raise ValueError("--workers must be 0 or more")
        with local_copy(self.folder) as folder:
            return self._inspect(folder), 0

    def _inspect(self, folder: Path) -> str:
        """Writes the requested files; returns the report."""
        from unicl_fast.packing.inspect import inspect_dataset
        from unicl_fast.packing.page import make_page

        inspection = inspect_dataset(
            folder, near=self.near, near_distance=self.near_distance, workers=self.workers
        )
        if is_url(self.folder):  # the copy will be removed
            inspection = dataclasses.replace(inspection, folder=without_secrets(self.folder))
        if self.json is not None:
            text = json.dumps(dataclasses.asdict(inspection), indent=1, default=str)  # a path
            write_text_atomically(self.json, text + "\n")
        if self.html is not None:
            write_text_atomically(self.html, make_page(inspection, folder))
        if self.duplicates_list is not None:
            _write_duplicates(inspection, folder, self.duplicates_list)
        lines = [_in_words(inspection)]
        written = [path for path in (self.html, self.json, self.duplicates_list) if path]
        if written:
            lines.append(f"written: {', '.join(map(str, written))}")
        return "\n".join(lines)


def _write_duplicates(inspection: Inspection, folder: Path, path: Path) -> None:
    """Writes all but the first image of each group, as a list for --leave-out."""
    from unicl_fast.dataset.growing_files import ListFile
    from unicl_fast.dataset.reader import PackedDataset
    from unicl_fast.dataset.stored_samples import SampleReader

    near = inspection.near_copies.groups if inspection.near_copies is not None else ()
    groups = [("duplicate", group) for group in inspection.exact_copies.groups]
    groups += [("near duplicate", group) for group in near]
    with (
        contextlib.closing(ListFile(path, QUARANTINE_COLUMNS)) as names,
        PackedDataset(folder, verify=False) as dataset,
        contextlib.closing(SampleReader(dataset)) as reader,
    ):
        for kind, group in groups:
            first = reader.read_description(group.samples[0])
            distances = group.distances[1:] or itertools.repeat(None)
            for sample, distance in zip(group.samples[1:], distances, strict=False):
                copy = reader.read_description(sample)
                is_same = distance is None
                like = "the same bytes as" if is_same else f"{distance} of 64 bits from"
                message = f"{like} {first.name} of {first.source}"
                names.write_row([copy.source, copy.name, kind, message])


def _in_words(inspection: Inspection) -> str:
    manifest = inspection.manifest
    lines = [
        f"{inspection.folder}: {contents_of(manifest)}, {manifest.num_bytes / 1e6:,.1f} MB"
        f"{', kept as pixels' if manifest.pixels else ''}",
        "",
    ]
    numbers = [_numbers(what, spread) for what, spread in inspection.spreads.items()]
    lines += [markdown_table(("", "least", "median", "mean", "95 %", "most"), numbers), ""]
    if inspection.class_counts:
        ordered = sorted(inspection.class_counts, key=lambda entry: -entry[1])
        empty = sum(count == 0 for _, count in ordered)
        ends = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
        shown = " to ".join(f"{name} {count:,}" for name, count in ends)
        lines.append(f"classes: {shown}" + (f"; {empty:,} have no image" if empty else ""))
    if manifest.num_captions:
        lines.append(
            f"distinct captions: {inspection.num_distinct_captions:,}; as long as the context: "
            f"{inspection.num_cut_captions:,}"
        )
    lines.append(f"exact copies: {_copies(inspection.exact_copies)}")
    if inspection.near_copies is not None:
        lines.append(
            f"near copies (within {inspection.near_distance} of 64 bits): "
            f"{_copies(inspection.near_copies)}"
        )
    if manifest.num_quarantined:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in inspection.quarantined.items())
        lines.append(f"left out when packed: {kinds}")
    return "\n".join(lines)


def contents_of(manifest: Manifest) -> str:
    """Counts of images, captions, labels and classes."""
    num_classes = len(manifest.class_names)
    classes = f" of {count_of(num_classes, 'class')}" if num_classes else ""
    classes += f" ({describe_columns(manifest.label_columns)})" if manifest.label_columns else ""
    images, captions = count_of(manifest.num_samples, "image"), manifest.num_captions
    labels = count_of(manifest.num_labels, "label")
    return f"{images}, {count_of(captions, 'caption')}, {labels}{classes}"


def _copies(copies: Copies) -> str:
    if not copies.num_groups:
        return "none"
    differ = f", labels differ in {copies.num_labels_differ:,}" if copies.num_labels_differ else ""
    return f"{copies.num_surplus:,} in {count_of(copies.num_groups, 'group')}{differ}"


def _numbers(what: str, spread: Spread) -> tuple[str, ...]:
    values = (spread.smallest, spread.median, spread.mean, spread.percentile_95, spread.largest)
    return (what, *(f"{value:,.0f}" if value >= 100 else f"{value:.4g}" for value in values))
