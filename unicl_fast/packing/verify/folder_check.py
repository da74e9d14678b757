"""The files of a packed data set as files: all there, no others, sizes, checksums, references.

What verification knows before it looks into a shard. Faults are noted one by one; a data set comes
back opened if its manifest and arrays allow looking at samples.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from unicl_fast.dataset.arrays import (
    ARRAY_DTYPES,
    PIXELS_NAME,
    PixelLayout,
    blocks_of,
    open_array,
    verify_arrays,
)
from unicl_fast.dataset.files import LocalFiles, find_pixel_fault
from unicl_fast.dataset.growing_files import END_OF_TAR
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.reader import QUARANTINE_NAME, PackedDataset
from unicl_fast.packing.quarantine import read_left_out
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    file_checksum,
    format_checksums,
    read_checksums,
)
from unicl_fast.text.class_lists import check_templates


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong with a data set."""

    file: str
    """The name of a file in the folder."""
    kind: str
    """A word to count by: missing, extra, checksum, manifest, array, shard, index, image,
    captions, labels, tokens, quarantine, unreadable."""
    message: str
    sample: int | None = None
    """The number of the sample, where it is one's."""


NoteFault = Callable[[Fault], None]


def check_folder(folder: Path, *, note: NoteFault, progress: bool) -> PackedDataset | None:
    """Checks everything but the contents of samples.

    Returns:
        The data set, if its samples can be looked at. Rows of its arrays may name what does not
        exist: that was noted, and whoever follows them must look where they lead.

    Raises:
        FileNotFoundError: neither a manifest nor a list of checksums is there.
    """
    if not (folder / MANIFEST_NAME).is_file() and not (folder / CHECKSUMS_NAME).is_file():
        Manifest.load(folder)  # says what a data set is, and how to make one
    manifest: Manifest | None = None
    try:
        manifest = Manifest.load(folder)
    except FileNotFoundError:
        note(Fault(file=MANIFEST_NAME, kind="missing", message="there is no manifest"))
    except (ValueError, OSError) as error:
        note(Fault(file=MANIFEST_NAME, kind="manifest", message=str(error)))
    damaged = _check_checksums(folder, manifest, note=note, progress=progress)
    if manifest is None:
        return None
    _check_manifest(manifest, note=note)
    _check_shards(folder, manifest, note=note)
    _check_quarantine(folder, manifest, note=note)
    pixels_agree = _check_pixels(folder, manifest, note=note)
    if not _check_arrays(folder, manifest, damaged, note=note) or not pixels_agree:
        return None
    try:
        dataset = PackedDataset(folder, max_bad_fraction=None, verify=False)
    except (ValueError, OSError) as error:
        note(Fault(file=MANIFEST_NAME, kind="manifest", message=str(error)))
        return None
    if not damaged & {MANIFEST_NAME, *(f"{name}.npy" for name in ARRAY_DTYPES)}:
        _check_ranges(dataset, note=note)
    return dataset


def expected_files(manifest: Manifest) -> set[str]:
    """Names of all files of a data set but its list of checksums."""
    shards = {shard.name for shard in manifest.shards}
    indexes = {Path(name).with_suffix(".idx").name for name in shards}
    arrays = {f"{name}.npy" for name in ARRAY_DTYPES}
    pixels = set() if manifest.pixels is None else {PIXELS_NAME}
    return shards | indexes | arrays | pixels | {MANIFEST_NAME, QUARANTINE_NAME}


def _check_checksums(
    folder: Path, manifest: Manifest | None, *, note: NoteFault, progress: bool
) -> set[str]:
    """Compares all files with the list; returns those that are missing or not what they were."""
    listed: dict[str, str] = {}
    path = folder / CHECKSUMS_NAME
    try:
        listed = read_checksums(folder) or {}
        if not path.is_file():
            message = (
                "there is no list of checksums: changes in the arrays may go unnoticed. "
                "unicl-pack merge writes a copy that has one"
            )
            note(Fault(file=CHECKSUMS_NAME, kind="missing", message=message))
        elif format_checksums(listed.items()).encode() != path.read_bytes():
            raise ValueError(f"{path} is not as it was written; copy the data set again")
    except (ValueError, OSError) as error:
        note(Fault(file=CHECKSUMS_NAME, kind="checksum", message=str(error)))
    expected = set(listed) if manifest is None else expected_files(manifest)
    damaged: set[str] = set()
    entries = {entry.name: entry for entry in folder.iterdir()}
    for name in sorted(expected - set(entries) - {MANIFEST_NAME}):
        note(Fault(file=name, kind="missing", message="it is not there; copy the data set again"))
        damaged.add(name)
    for name in sorted(set(entries) - expected - {CHECKSUMS_NAME, MANIFEST_NAME}):
        note(Fault(file=name, kind="extra", message="it is no file of this data set"))
    present = sorted((expected | {MANIFEST_NAME}) & set(entries))
    total = sum(entries[name].stat().st_size for name in present if entries[name].is_file())
    bar = tqdm(total=total, desc="checksums", unit="B", unit_scale=True, disable=not progress)
    large = {shard.name: shard.xxh3 for shard in manifest.shards} if manifest else {}
    if manifest is not None and manifest.pixels is not None:
        large[PIXELS_NAME] = manifest.pixels.xxh3
    with bar:
        for name in present:
            fault = _compare_file(entries[name], listed, large)
            if fault is not None:
                note(fault)
                damaged.add(name)
            bar.update(entries[name].stat().st_size if entries[name].is_file() else 0)
    return damaged


def _compare_file(path: Path, listed: dict[str, str], large: dict[str, str]) -> Fault | None:
    """One file against the list and, a large one, against the manifest."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return Fault(file=path.name, kind="unreadable", message="it is not an ordinary file")
        found = file_checksum(path)
    except OSError as error:
        return Fault(file=path.name, kind="unreadable", message=str(error))
    # without a list everything passes that the manifest has no checksum of
    by_list = listed.get(path.name, "nothing of it") if listed else found
    by_manifest = large.get(path.name, found)
    for where, expected in ((CHECKSUMS_NAME, by_list), (MANIFEST_NAME, by_manifest)):
        if found != expected:
            message = f"its checksum is {found}, {where} says {expected}"
            return Fault(file=path.name, kind="checksum", message=message)
    return None


def _check_manifest(manifest: Manifest, *, note: NoteFault) -> None:
    def fault(message: str) -> None:
        note(Fault(file=MANIFEST_NAME, kind="manifest", message=message))

    if not manifest.num_samples:
        fault("no samples")
    if bool(manifest.num_labels) and not manifest.class_names:
        fault(f"{manifest.num_labels} labels, but no class names")
    if manifest.class_names:
        try:
            check_templates(manifest.templates, origin="templates")
        except ValueError as error:
            fault(str(error))


def _check_shards(folder: Path, manifest: Manifest, *, note: NoteFault) -> None:
    """Sizes, and the two empty blocks at the end of a tar."""
    for shard in manifest.shards:
        try:
            with (folder / shard.name).open("rb") as file:
                num_bytes = (folder / shard.name).stat().st_size
                if num_bytes == shard.num_bytes:
                    file.seek(max(0, num_bytes - len(END_OF_TAR)))
                    if file.read() != END_OF_TAR:
                        message = "it does not end with two empty blocks"
                        note(Fault(file=shard.name, kind="shard", message=message))
                    continue
        except OSError:  # missing or unreadable, which was said
            continue
        message = f"{num_bytes} bytes, the manifest says {shard.num_bytes}"
        note(Fault(file=shard.name, kind="shard", message=message))


def _check_pixels(folder: Path, manifest: Manifest, *, note: NoteFault) -> bool:
    """Size and header of decoded images; whether the manifest agrees with itself about them."""
    if manifest.pixels is None:
        return True
    try:
        layout = PixelLayout(folder, manifest.pixels, manifest.num_samples)
        found = find_pixel_fault(LocalFiles(folder), layout)
    except ValueError as error:
        note(Fault(file=MANIFEST_NAME, kind="manifest", message=str(error)))
        return False
    if found is not None and isinstance(found[0], ValueError):  # if it is missing, that was said
        note(Fault(file=PIXELS_NAME, kind="array", message=str(found[0])))
    return True


def _check_quarantine(folder: Path, manifest: Manifest, *, note: NoteFault) -> None:
    try:
        for _ in read_left_out(folder / QUARANTINE_NAME, num_rows=manifest.num_quarantined):
            pass
    except OSError:  # said already
        return
    except ValueError as error:
        note(Fault(file=QUARANTINE_NAME, kind="quarantine", message=str(error)))


def _check_arrays(folder: Path, manifest: Manifest, damaged: set[str], *, note: NoteFault) -> bool:
    """Types, lengths and references of the arrays; whether all can be opened."""
    can_be_opened = True
    for name, dtype in ARRAY_DTYPES.items():
        file = f"{name}.npy"
        try:
            open_array(folder / file, dtype, _length_of(name, manifest))
        except FileNotFoundError:  # said already
            can_be_opened = False
            continue
        except (ValueError, OSError) as error:
            note(Fault(file=file, kind="array", message=str(error)))
            can_be_opened = False
            continue
        if damaged & {file, MANIFEST_NAME}:
            continue
        try:
            verify_arrays(folder, manifest, {name: dtype}, checksums=None)  # they were compared
        except (ValueError, OSError) as error:
            note(Fault(file=file, kind="array", message=str(error)))
    return can_be_opened


def _length_of(name: str, manifest: Manifest) -> int:
    length: int = getattr(manifest, f"num_{name}")
    return length


def _check_ranges(dataset: PackedDataset, *, note: NoteFault) -> None:
    """Captions, tokens and labels are numbered through: each belongs to one row, none is left."""
    tables: list[tuple[str, npt.NDArray[Any], str, str, int]] = [
        (file, rows, f"{what}_start", f"{what}_{count}", len(array))
        for file, rows, what, count, array in (
            ("samples.npy", dataset.samples, "captions", "count", dataset.captions),
            ("samples.npy", dataset.samples, "labels", "count", dataset.labels),
            ("captions.npy", dataset.captions, "tokens", "length", dataset.tokens),
        )
    ]
    for file, rows, start, count, length in tables:
        first = total = 0
        for block in blocks_of(rows):
            counts = block[count].astype(np.uint64)
            expected = np.cumsum(counts) - counts + np.uint64(total)
            wrong = block[start] != expected
            if wrong.any():
                row = int(wrong.argmax())
                message = (
                    f"row {first + row}: {start} is {block[start][row]} where the rows before it "
                    f"have {expected[row]}"
                )
                note(Fault(file=file, kind="array", message=message))
                break
            first += len(block)
            total += int(counts.sum())
        else:
            if total != length:
                message = f"its {count} add up to {total}, there are {length}"
                note(Fault(file=file, kind="array", message=message))
