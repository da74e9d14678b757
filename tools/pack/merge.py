"""`unicl-pack merge` as a sub-command: its arguments, and its outcome in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from unicl_fast.dataset.reader import QUARANTINE_NAME
from unicl_fast.dataset.writer import DEFAULT_SHARD_BYTES
from unicl_fast.packing.merge import MergeSummary, merge_datasets
from unicl_fast.system.wording import count_of


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one packed data set of several, without decoding anything again.

    Images and tokens are copied byte for byte and shuffled over all inputs. Classes with equal
    names become one; those of the first data set keep their numbers. What is copied is compared
    with its checksums: a damaged sample is left out and listed in OUT/quarantine.csv, together with
    what the inputs list there. Raw data sets go together if their images are of one size.

    Examples:
      unicl-pack merge packed/photos packed/pairs --out packed/both

      unicl-pack merge packed/photos --out packed/clean --leave-out near.csv
    """

    folders: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")
    ]
    """Packed data sets; folders, no URLs."""
    out: str
    """Folder to make, no URL. It must not exist yet, or be empty; it appears when it is whole."""
    seed: int = 0
    """Decides the order of the samples, shuffled over all data sets."""
    templates: str = ""
    """Prompts for class names, if the data sets differ in theirs: a file with one a line, {} for
    the name, or the built-in imagenet (80 prompts) or simple (1)."""
    leave_out: str = ""
    """A CSV file with the columns source and name: samples to leave out, such as inspect's
    --duplicates-list writes."""
    duplicates: Literal["keep", "join"] = "keep"
    """Images that are equal byte for byte: keep them all, or join them into one sample with the
    captions and labels of all. Those that were joined into another are listed in
    OUT/quarantine.csv."""
    shard_bytes: int = DEFAULT_SHARD_BYTES
    """Largest size of a shard, in bytes."""

    def run(self) -> tuple[str, int]:
        """Merges; returns the report and the exit code."""
        return _in_words(merge_datasets(**vars(self)), leave_out=self.leave_out), 0


def _in_words(summary: MergeSummary, *, leave_out: str) -> str:
    classes = f" of {count_of(len(summary.class_names), 'class')}" if summary.class_names else ""
    lines = [
        f"{summary.out}: {count_of(summary.num_samples, 'image')}, "
        f"{count_of(summary.num_captions, 'caption')}, "
        f"{count_of(summary.num_labels, 'label')}{classes}",
        f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s, "
        f"{summary.num_samples / summary.seconds:,.0f} images/s, all byte for byte",
    ]
    if leave_out:
        lines.append(f"left out, since {leave_out} names them: {summary.num_left_out:,}")
    if summary.num_joined:
        lines.append(f"joined into others with the same image: {summary.num_joined:,}")
    if summary.num_damaged:
        lines.append(
            f"DAMAGED and left out: {summary.num_damaged:,}; copy the inputs again and merge anew "
            "to have them"
        )
        lines += [f"  {message}" for message in summary.damaged]
    if summary.num_quarantined:
        lines.append(
            f"{summary.out / QUARANTINE_NAME} lists {count_of(summary.num_quarantined, 'image')} "
            "left out, now or when the inputs were packed"
        )
    lines.append(f"next: unicl-pack verify {summary.out}")
    return "\n".join(lines)
