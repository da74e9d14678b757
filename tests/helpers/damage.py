"""Spoils packed data sets in the ways that storage and bad luck do."""

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from packed_sets import saved
from PIL import Image

from unicl_fast.dataset.arrays import HEADER_BYTES
from unicl_fast.dataset.reader import PackedDataset
from unicl_fast.system.checksums import (
    CHECKSUMS_NAME,
    dump_checksummed_json,
    file_checksum,
    format_checksums,
    read_checksums,
)

HOSTILE = (
    "pay $5 or $6",
    "$\\frac{$",
    "$$",
    "a_b^c \\alpha \\",
    "<b> & % {} {0} %s",
    "\N{PILE OF POO}\N{RIGHT-TO-LEFT OVERRIDE}\u0000",
)
"""Names of classes and data sets that some program would take for a command."""


@contextlib.contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip_a_byte(path: Path) -> None:
    """Changes a bit of a file's last byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def make_fit(checkpoint: Path) -> None:
    """Checksums and seal of what is there now; a state that is no JSON stays as it is."""
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        for name in state["checksums"]:
            state["checksums"][name] = file_checksum(checkpoint / name)
        state.pop("seal", None)
        (checkpoint / "state.json").write_text(dump_checksummed_json(state))
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return


def copy_of(dataset: PackedDataset, folder: Path) -> Path:
    return Path(shutil.copytree(dataset.folder, folder))


def flip_byte(folder: Path, sample: int) -> None:
    """One byte in the middle of an image becomes another; its checksum tells."""
    with PackedDataset(folder, max_bad_fraction=1.0) as dataset:
        middle = dataset.offset_of(sample) + len(dataset.image_bytes(sample)) // 2
    with shard_of(folder, sample).open("r+b") as file:
        file.seek(middle)
        (old,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old ^ 0xFF]))


def store(folder: Path, sample: int, data: bytes) -> None:
    """Other bytes in the place of an image, with the checksum that belongs to them."""
    samples = np.load(folder / "samples.npy")
    row = samples[sample]
    assert len(data) <= row["size"]
    with shard_of(folder, sample).open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(data)
    row["size"], row["xxh3"] = len(data), xxhash.xxh3_64_intdigest(data)
    path = folder / "samples.npy"
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + samples.tobytes())
    mend_checksums(folder, path.name)


def mend_checksums(folder: Path, name: str) -> None:
    """Makes checksums.txt, and the manifest for a shard, agree with a file that was changed."""
    checksums = read_checksums(folder)
    old, new = checksums[name], file_checksum(folder / name)
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(old.encode(), new.encode()))
    checksums |= {name: new, "manifest.json": file_checksum(manifest)}
    text = format_checksums(checksums.items())
    (folder / CHECKSUMS_NAME).write_text(text, encoding="utf-8")


def undecodable(kind: str) -> bytes:
    """What the run-time decoder refuses, though it is what was packed."""
    if kind == "html":
        return b"<html><title>404</title>not found</html>"
    image = Image.linear_gradient("L").resize((40, 40))
    if kind == "gif":
        return saved(image, format="GIF")
    assert kind == "cut png"
    return saved(image, format="PNG")[:60]


def shard_of(folder: Path, sample: int) -> Path:
    with PackedDataset(folder, max_bad_fraction=1.0) as dataset:
        return folder / dataset.shard_of(sample)
