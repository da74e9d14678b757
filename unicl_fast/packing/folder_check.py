"""Checks the files of a packed data set: present, no others, sizes, checksums, references.

`verify` does this before it opens a shard.
"""

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from unicl_fast.dataset.arrays import (
    ARRAY_DTYPES,
    PIXELS_NAME,
    PixelLayout,
    blocks_of,
    dtypes_of,
    length_of,
    open_array,
    verify_arrays,
)
from unicl_fast.dataset.files import LocalFiles, find_pixel_fault
from unicl_fast.dataset.growing_files import END_OF_TAR
from unicl_fast.dataset.manifest import MANIFEST_NAME, QUARANTINE_NAME, Manifest
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.dataset.writer import MADE_OF_NAME
from unicl_fast.packing.croissant import CROISSANT_NAME
from unicl_fast.packing.quarantine import count_left_out
from unicl_fast.system.bar import Bar
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    file_checksum,
    format_checksums,
    read_checksums,
)
from unicl_fast.system.untrusted_files import open_file, read_file
from unicl_fast.system.wording import count_of
from unicl_fast.text.class_lists import check_templates


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is wrong with a data set."""

    file: str
    """The name of a file in the folder."""
    kind: str
    """A word to count by: missing, extra, checksum, manifest, array, shard, index, image,
    captions, labels, tokens, quarantine, source, unreadable."""
    message: str
    sample: int | None = None
    """The number of the faulty sample, if the fault is one sample's."""


class FaultLog:
    """Passes faults on as they are found, and counts them by kind."""

    def __init__(self, note: Callable[[Fault], None]) -> None:
        self._note = note
        self.counts: Counter[str] = Counter()

    def add(self, file: str, kind: str, message: str, *, sample: int | None = None) -> None:
        """Counts a fault, and passes it on."""
        self.counts[kind] += 1
        self._note(Fault(file=file, kind=kind, message=message, sample=sample))

    @contextlib.contextmanager
    def catch(
        self, file: str, kind: str, *, known: type[OSError] | tuple[()] = ()
    ) -> Iterator[None]:
        """Turns a ValueError or OSError into a fault; ignores `known` ones, noted elsewhere."""
        try:
            yield
        except known:
            pass
        except (ValueError, OSError) as error:
            self.add(file, kind, str(error))


def check_folder(folder: Path, *, faults: FaultLog, progress: bool) -> PackedDataset | None:
    """Checks all but the contents of samples; raises FileNotFoundError if there is no data set.

    Returns the data set if its samples can be read; its arrays can still refer to missing data.
    """
    if not (folder / MANIFEST_NAME).is_file() and not (folder / CHECKSUMS_NAME).is_file():
        Manifest.load(folder)  # raises, and says how to make a data set
    manifest: Manifest | None = None
    if not (folder / MANIFEST_NAME).is_file():
        faults.add(MANIFEST_NAME, "missing", "there is no manifest")
    else:
        with faults.catch(MANIFEST_NAME, "manifest"):
            manifest = Manifest.load(folder)
    damaged = _check_checksums(folder, manifest, faults=faults, progress=progress)
    if manifest is None:
        return None
    if not manifest.num_samples:
        faults.add(MANIFEST_NAME, "manifest", "no samples")
    if manifest.num_labels and not manifest.class_names:
        message = f"{count_of(manifest.num_labels, 'label')}, but no class names"
        faults.add(MANIFEST_NAME, "manifest", message)
    if manifest.class_names:
        with faults.catch(MANIFEST_NAME, "manifest"):
            check_templates(manifest.templates, origin="templates")
    _check_shards(folder, manifest, faults=faults)
    with faults.catch(QUARANTINE_NAME, "quarantine", known=OSError):
        count_left_out(folder / QUARANTINE_NAME, num_rows=manifest.num_quarantined)
    pixels_agree = _check_pixels(folder, manifest, faults=faults)
    dataset: PackedDataset | None = None
    if _check_arrays(folder, manifest, damaged, faults=faults) and pixels_agree:
        with faults.catch(MANIFEST_NAME, "manifest"):
            dataset = PackedDataset(folder, max_bad_fraction=None, verify=False)
    needed = {MANIFEST_NAME, *(f"{name}.npy" for name in ARRAY_DTYPES)}
    if dataset is not None and not damaged & needed:
        _check_ranges(dataset, faults=faults)
    if dataset is not None and dataset.sources is not None:
        info = manifest.in_place
        with faults.catch("files.npy", "source"):
            for message, _ in dataset.sources.changed():
                faults.add("files.npy", "source", message)
        digest = xxhash.xxh3_64()
        for rows in blocks_of(dataset.samples):
            digest.update(rows["xxh3"].tobytes())
        if info is not None and digest.hexdigest() != info.xxh3:
            message = f"in_place.xxh3 is {info.xxh3}, by samples.npy {digest.hexdigest()}"
            faults.add(MANIFEST_NAME, "manifest", message)
    return dataset


def expected_files(manifest: Manifest) -> set[str]:
    """Names of all files of a data set, except its list of checksums."""
    shards = {shard.name for shard in manifest.shards}
    indexes = {Path(name).with_suffix(".idx").name for name in shards}
    arrays = {f"{name}.npy" for name in dtypes_of(manifest)}
    pixels = set() if manifest.pixels is None else {PIXELS_NAME}
    return shards | indexes | arrays | pixels | {MANIFEST_NAME, QUARANTINE_NAME}


def _check_checksums(
    folder: Path, manifest: Manifest | None, *, faults: FaultLog, progress: bool
) -> set[str]:
    """Compares all files with the list of checksums; returns missing and changed ones."""
    listed: dict[str, str] = {}
    path = folder / CHECKSUMS_NAME
    with faults.catch(CHECKSUMS_NAME, "checksum"):
        listed = read_checksums(folder) or {}
        if not path.is_file():
            message = (
                "there is no list of checksums: changes in the arrays can go unnoticed. "
                "unicl-pack build of it writes a copy that has one"
            )
            faults.add(CHECKSUMS_NAME, "missing", message)
        elif format_checksums(listed.items()).encode() != read_file(path):
            raise ValueError(f"{path} is not as it was written; copy the data set again")
    expected = set(listed) if manifest is None else expected_files(manifest)
    damaged: set[str] = set()
    entries = {entry.name: entry for entry in folder.iterdir()}
    for name in sorted(expected - set(entries) - {MANIFEST_NAME}):
        faults.add(name, "missing", "it is not there; copy the data set again")
        damaged.add(name)
    others = {CHECKSUMS_NAME, MANIFEST_NAME, MADE_OF_NAME, CROISSANT_NAME}
    for name in sorted(set(entries) - expected - others):
        faults.add(name, "extra", "it is no file of this data set")
    present = sorted((expected | {MANIFEST_NAME}) & set(entries))
    sizes = {name: entries[name].stat().st_size for name in present if entries[name].is_file()}
    total = sum(sizes.values())
    bar = Bar(total=total, desc="checksums", unit="B", unit_scale=True, shown=progress)
    large = {shard.name: shard.xxh3 for shard in manifest.shards} if manifest else {}
    if manifest is not None and manifest.pixels is not None:
        large[PIXELS_NAME] = manifest.pixels.xxh3
    with bar:
        for name in present:
            if not _is_as_listed(entries[name], listed, large, faults=faults):
                damaged.add(name)
            bar.update(sizes.get(name, 0))
    return damaged


def _is_as_listed(
    path: Path, listed: dict[str, str], large: dict[str, str], *, faults: FaultLog
) -> bool:
    """Compares one file with the list and, if it is large, with the manifest."""
    found = ""
    with faults.catch(path.name, "unreadable"):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not an ordinary file")
        found = file_checksum(path)
    if not found:
        return False
    # without a list, files pass that have no checksum in the manifest
    by_list = listed.get(path.name, "nothing of it") if listed else found
    by_manifest = large.get(path.name, found)
    for where, expected in ((CHECKSUMS_NAME, by_list), (MANIFEST_NAME, by_manifest)):
        if found != expected:
            faults.add(path.name, "checksum", f"its checksum is {found}, {where} says {expected}")
            return False
    return True


def _check_shards(folder: Path, manifest: Manifest, *, faults: FaultLog) -> None:
    """Checks sizes, and the two empty blocks that end a tar."""
    for shard in manifest.shards:
        with (
            faults.catch(shard.name, "shard", known=OSError),
            open_file(folder / shard.name) as file,
        ):
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != shard.num_bytes:
                raise ValueError(f"{num_bytes} bytes, the manifest says {shard.num_bytes}")
            file.seek(max(0, num_bytes - len(END_OF_TAR)))
            if file.read() != END_OF_TAR:
                raise ValueError("it does not end with two empty blocks")


def _check_pixels(folder: Path, manifest: Manifest, *, faults: FaultLog) -> bool:
    """Checks size and header of decoded images; returns whether the manifest is consistent."""
    if manifest.pixels is None:
        return True
    agrees = False
    with faults.catch(MANIFEST_NAME, "manifest"):
        layout = PixelLayout(folder, manifest.pixels, manifest.num_samples)
        found = find_pixel_fault(LocalFiles(folder), layout)
        agrees = True
        if found is not None and isinstance(found[0], ValueError):  # a missing file is noted
            faults.add(PIXELS_NAME, "array", str(found[0]))
    return agrees


def _check_arrays(folder: Path, manifest: Manifest, damaged: set[str], *, faults: FaultLog) -> bool:
    """Checks types, lengths and references of the arrays; returns whether all can be opened."""
    can_be_opened = True
    for name, dtype in dtypes_of(manifest).items():
        file, is_open = f"{name}.npy", False
        with faults.catch(file, "array", known=FileNotFoundError):
            open_array(folder / file, dtype, length_of(manifest, name))
            is_open = True
            if not damaged & {file, MANIFEST_NAME}:
                # checksums were compared already
                verify_arrays(folder, manifest, {name: dtype}, checksums=None)
        can_be_opened &= is_open
    return can_be_opened


def _check_ranges(dataset: PackedDataset, *, faults: FaultLog) -> None:
    """Checks that each caption, token and label belongs to exactly one row, in order."""
    tables: list[tuple[str, npt.NDArray[Any], str, str, int]] = [
        ("samples.npy", dataset.samples, "captions", "count", len(dataset.captions)),
        ("samples.npy", dataset.samples, "labels", "count", len(dataset.labels)),
        ("captions.npy", dataset.captions, "tokens", "length", len(dataset.tokens)),
    ]
    for file, rows, what, size, length in tables:
        start, count = f"{what}_start", f"{what}_{size}"
        first = total = 0
        for block in blocks_of(rows):
            counts = block[count].astype(np.uint64)
            expected = np.cumsum(counts) - counts + np.uint64(total)
            wrong = block[start] != expected
            if wrong.any():
                row = int(wrong.argmax())
                before = f"where the rows before it have {expected[row]}"
                message = f"row {first + row}: {start} is {block[start][row]} {before}"
                faults.add(file, "array", message)
                break
            first += len(block)
            total += int(counts.sum())
        else:
            if total != length:
                message = f"its {count} add up to {total}, there are {length}"
                faults.add(file, "array", message)
