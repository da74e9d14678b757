"""`unicl-pack verify` as a sub-command: its arguments, its report, JSON and CSV."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unicl_fast.dataset.object_store import is_url
from unicl_fast.images.limits import MAX_PIXELS
from unicl_fast.packing.build_options import DEFAULT_IMAGE_SECONDS
from unicl_fast.system.wording import count_of

from ..numbers import OneDataSet

if TYPE_CHECKING:
    from unicl_fast.packing.folder_check import Fault
    from unicl_fast.packing.verify import VerifySummary

# advice for faults of a data set at {0}
_IN_A_FOLDER = (
    "copy the named files again; damaged images can be left out by: unicl-pack build {0} --out DIR"
)
_AT_A_URL = (
    "if you have a sound copy in a folder DIR, unicl-pack upload DIR --out {0} sends files that "
    "differ again; if not, damaged images can be left out: copy it into a folder DIR with the "
    "store's program, then unicl-pack build DIR --out MENDED, and unicl-pack upload MENDED to "
    "another URL"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Check that a packed data set is what was packed, down to the last byte.

    Compares files with their checksums, arrays with each other, and each sample with the arrays;
    decodes every image strictly. Lists all faults, not only the first.

    Exit code: 0 sound, 1 faults found, 2 no data set there or wrong usage.

    Examples:
      unicl-pack verify packed/photos --list faults.csv
    """

    folder: Annotated[OneDataSet, tyro.conf.Positional]
    """The data set; one under a URL is copied, checked and removed."""
    decode: bool = True
    """Decode all images, which costs most of the time (a raw data set's are decoded already)."""
    show: int = 20
    """Faults to print; the others are counted."""
    list: Path | None = None
    """Write all faults into this file: CSV with the columns file, sample, kind, message."""
    max_pixels: int = MAX_PIXELS
    """The build's value: an image with more pixels is a fault."""
    image_seconds: float = DEFAULT_IMAGE_SECONDS
    """An image that needs longer is a fault; 0 sets no limit."""
    workers: int = 0
    """Processes that decode; 0 starts one for each core."""

    def run(self) -> tuple[str, int]:
        from unicl_fast.dataset.growing_files import ListFile
        from unicl_fast.dataset.reader import sample_key
        from unicl_fast.packing.staging import local_copy
        from unicl_fast.packing.verify import verify_dataset

        if min(self.show, self.workers, self.image_seconds) < 0 or self.max_pixels < 1:
            raise ValueError(
                "--show, --workers and --image-seconds must be 0 or more, --max-pixels 1 or more; "
                f"not {self.show}, {self.workers}, {self.image_seconds:g}, {self.max_pixels}"
            )
        first: list[Fault] = []
        with contextlib.ExitStack() as stack:
            listed: ListFile | None = None
            if self.list is not None:
                listed = ListFile(self.list, ["file", "sample", "kind", "message"])
                stack.enter_context(contextlib.closing(listed))
            folder = stack.enter_context(local_copy(self.folder))

            def note(fault: Fault) -> None:
                if len(first) < self.show:
                    first.append(fault)
                if listed is not None:
                    key = "" if fault.sample is None else sample_key(fault.sample)
                    listed.write_row([fault.file, key, fault.kind, fault.message])

            summary = verify_dataset(
                folder, note=note, decode=self.decode, workers=self.workers,
                max_pixels=self.max_pixels, image_seconds=self.image_seconds,
            )  # fmt: skip
        summary = dataclasses.replace(summary, folder=self.folder)
        return _in_words(summary, first, self.list), int(summary.num_faults > 0)


def _in_words(summary: VerifySummary, first: list[Fault], listed: Path | None) -> str:
    from unicl_fast.dataset.reader import sample_key

    lines = []
    for fault in first:
        where = "" if fault.sample is None else f", sample {sample_key(fault.sample)}"
        lines.append(f"{fault.file}{where}: {fault.kind}: {fault.message}")
    if summary.num_faults > len(first):
        rest = f"and {summary.num_faults - len(first):,} more"
        lines.append(f"{rest}, listed in {listed}" if listed else f"{rest}; --list FILE has all")
    manifest = summary.manifest
    checked = f"{summary.num_bytes / 1e6:,.1f} MB in {summary.seconds:,.1f} s"
    is_raw = manifest is not None and manifest.pixels is not None
    if manifest is not None:
        decoded = "kept as pixels" if is_raw else f"{summary.num_decoded:,} decoded"
        checked = (
            f"{count_of(manifest.num_samples, 'image')} ({decoded}), "
            f"{count_of(manifest.num_captions, 'caption')}, "
            f"{count_of(manifest.num_labels, 'label')}, {checked}"
        )
    if summary.num_faults:
        kinds = sorted(summary.faults.items(), key=lambda item: -item[1])
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
        lines.append(f"{summary.folder}: FAULTS FOUND: {counts}; checked {checked}")
        if manifest is None:
            lines.append("the samples were not checked, which needs a manifest and all arrays")
        lines.append((_AT_A_URL if is_url(summary.folder) else _IN_A_FOLDER).format(summary.folder))
    else:
        lines.append(f"{summary.folder}: sound; {checked}")
        if not summary.num_decoded and not is_raw:
            lines.append("images were compared with their checksums, but not decoded")
    return "\n".join(lines)
