"""Whether the large files of a data set are there: by their sizes, without reading them.

Apart from `array_files`, which reads the small ones whole: here a missing file need not be the end,
since training can feed other samples instead of those that lie in it.
"""

from __future__ import annotations

import logging

from unicl_fast.dataset.files import DatasetFiles
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest, ShardInfo, shard_name
from unicl_fast.dataset.pixels import Fault, PixelFile

logger = logging.getLogger(__name__)


def check_files(
    files: DatasetFiles,
    manifest: Manifest,
    *,
    pixel_file: PixelFile | None,
    max_bad_fraction: float | None,
) -> None:
    """Compares the shards, and the decoded images of a raw data set, with the manifest.

    Args:
        files: of the data set.
        manifest: of the data set.
        pixel_file: its decoded images; None if the images are in the shards.
        max_bad_fraction: files that are missing or of another size are tolerated, with a warning,
            if they hold at most this part of the images; None tolerates all, without a word.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size, or the manifest contradicts itself.
    """
    total = manifest.num_samples
    in_shards = sum(shard.num_samples for shard in manifest.shards)
    if in_shards != total:
        raise ValueError(
            f"{files.where(MANIFEST_NAME)} contradicts itself: {total} samples, but the shards "
            f"hold {in_shards}"
        )
    faults: list[Fault] = []
    num_bad = 0
    if pixel_file is not None and (found := pixel_file.find_fault(files)) is not None:
        faults.append(found[0])
        num_bad = found[1]
    for number, shard in enumerate(manifest.shards):
        if shard.name != shard_name(number):
            raise ValueError(
                f"{files.where(MANIFEST_NAME)}: shard {number} should be called "
                f"{shard_name(number)}, not {shard.name!r}"
            )
    sizes = files.sizes_of([shard.name for shard in manifest.shards])
    for shard in manifest.shards:
        fault = _fault_of(files, shard, sizes[shard.name])
        if fault is not None:
            faults.append(fault)
            num_bad += shard.num_samples if pixel_file is None else 0
    if not faults or max_bad_fraction is None:
        return
    if not max_bad_fraction:
        raise faults[0]
    num_files = len(manifest.shards) + (pixel_file is not None)
    damage = (
        f"{faults[0]} ({len(faults)} such of {num_files} files, with the images of {num_bad} of "
        f"{total} samples"
    )
    if num_bad > max_bad_fraction * total:
        raise type(faults[0])(
            f"{damage}: more than data.max_bad_fraction = {max_bad_fraction} allows)"
        )
    logger.warning(
        "DAMAGED DATA SET: %s: within data.max_bad_fraction = %s, so others are fed instead)",
        damage, max_bad_fraction,
    )  # fmt: skip


def _fault_of(files: DatasetFiles, shard: ShardInfo, size: int | OSError | None) -> Fault | None:
    place = files.where(shard.name)
    if isinstance(size, OSError):
        return ValueError(f"{place} cannot be read: {size}")
    if size is None:
        return FileNotFoundError(f"{place} is missing; copy the data set again")
    if size != shard.num_bytes:
        return ValueError(
            f"{place} has {size} bytes, the manifest says {shard.num_bytes}; copy the data set "
            "again"
        )
    return None
