"""Checks of folders and of the file systems under them, and of how fast data can be read."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.system.machine import check_current_folder
from unicl_fast.system.wording import count_of

from .rows import Check, Found

_MOUNTS = Path("/proc/self/mounts")
_NO_LOCKS = ("nolock", "noflock", "localflock")
"""Options of NFS and Lustre by which a lock is not seen by other hosts."""
_GB = 10**9
_LITTLE_DISK = 2 * _GB
"""One checkpoint of Swin-B: 150 million parameters with AdamW's state, 12 bytes each."""
_READ_SECONDS, _READ_BYTES, _MOST_FILES = 2.0, 1 << 20, 64
_SLOW_READING = 100e6
"""Bytes/s: the 5,250 images/s that ResNet-50 takes at most on an H100, of 20 KB each."""


class Mount(NamedTuple):
    """A mounted file system."""

    kind: str
    options: list[str]


def mount_of(path: Path) -> Mount:
    """The file system that a path lies on."""
    path = path.resolve()
    best, found = -1, Mount("unknown", [])
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, place, kind, options, *_ = line.split(" ")
        place = place.replace("\\040", " ")
        if path.is_relative_to(place) and len(place) >= best:
            best, found = len(place), Mount(kind, options.split(","))
    return found


def check_folder(folder: Path, *, runs_code: bool = False) -> Found:
    """Looks whether a folder, or the one where it would be made, has room and can be written.

    `runs_code`: libraries that are compiled there are loaded from it.
    """
    there = next(each for each in (folder, *folder.parents) if each.exists())
    mount = mount_of(there)
    usage, inodes = shutil.disk_usage(there), os.statvfs(there)
    room = usage.free
    found = f"{folder}: {room / _GB:.3g} GB free ({mount.kind})"
    if not os.access(there, os.W_OK | os.X_OK) or not usage.total:  # /proc has no blocks
        return Found(
            "warning", f"{folder} cannot be written", f"chown or chmod {there}, or take another"
        )
    if room == 0 or (inodes.f_files and not inodes.f_favail):
        return Found("fault", f"{found}: the disk is full", "make room, of files too: df -h, df -i")
    if room < _LITTLE_DISK:
        return Found("warning", found, "make room, or take another")
    if runs_code and "noexec" in mount.options:
        return Found(
            "warning", f"{found}, mounted noexec: torch.compile cannot load what it compiled",
            "set TMPDIR to a folder on another file system",
        )  # fmt: skip
    locks = [one for one in mount.options if one in _NO_LOCKS or one.startswith("local_lock=")]
    if set(locks) - {"local_lock=none"}:
        return Found(
            "warning", f"{found}, mounted {locks[0]}: two hosts can write into one run folder",
            "mount it without this option, or never start a run twice",
        )  # fmt: skip
    return Found("ok", found)


def check_working_folder() -> Found:
    try:
        check_current_folder()
    except FileNotFoundError as error:
        os.chdir("/")  # MKL ends the process otherwise when torch is imported
        return Found("fault", f"{error}", "cd ~")
    return check_folder(Path.cwd())


def check_temporary_folder() -> Found:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return Found("fault", f"{error}", "set TMPDIR to a folder that can be written")
    return check_folder(folder, runs_code=True)


def check_cache_folder() -> Found:
    """Looks at the folder of blocks of remote data sets, which has kernels beside it."""
    try:
        folder = CacheOptions().place
    except RuntimeError:
        return Found(
            "warning", "this user has no home, so object stores are read without a cache",
            "set XDG_CACHE_HOME to a folder of this user",
        )  # fmt: skip
    return check_folder(folder)


def check_data(path: Path) -> Found:
    """Reads pieces at random places of the files of a folder, past the page cache if it can."""
    if not path.exists():
        return Found("fault", f"{path} is not there", "name a file or a folder; see mount")
    files = sample_files(path)
    if not files:
        return Found("fault", f"{path} has no file with anything in it", "name a packed data set")
    num_bytes, seconds = measure_reading(files)
    mount, room = mount_of(path), shutil.disk_usage(path).free
    rate = num_bytes / seconds
    found = f"{path} ({mount.kind}): {rate / 1e6:,.0f} MB/s at random, one reader, "
    found += (
        f"{num_bytes / 1e6:,.0f} MB of {count_of(len(files), 'file')}; {room / _GB:.3g} GB free"
    )
    if rate < _SLOW_READING:
        return Found(
            "warning", found, "a local disk, or fewer bytes: smaller images, WebP; several readers "
            "get more of a network disk",
        )  # fmt: skip
    if room < _LITTLE_DISK:
        return Found("warning", found, "make room before anything is written there")
    return Found("ok", found)


def sample_files(path: Path) -> list[Path]:
    """Some files of a folder, the first that are found, largest first; a file is itself."""
    if path.is_file():
        return [path] if path.stat().st_size else []
    found = []
    for folder, folders, names in os.walk(path):
        folders.sort()
        files = (Path(folder, name) for name in sorted(names))
        found += [file for file in files if file.is_file() and file.stat().st_size]
        if len(found) >= _MOST_FILES:
            break
    return sorted(found, key=lambda file: -file.stat().st_size)[:_MOST_FILES]


def measure_reading(files: list[Path], *, most_seconds: float = _READ_SECONDS) -> tuple[int, float]:
    """Returns the bytes that were read, and the seconds that reading took."""
    num_bytes, spent = 0, 0.0
    deadline = time.monotonic() + most_seconds
    for file, start in _places(files):
        begun = time.perf_counter()
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, start, _READ_BYTES, os.POSIX_FADV_DONTNEED)
            num_bytes += len(os.pread(descriptor, _READ_BYTES, start))
            spent += time.perf_counter() - begun
        finally:
            os.close(descriptor)
        if time.monotonic() > deadline:
            break
    return num_bytes, max(spent, 1e-9)


def _places(files: list[Path]) -> Iterator[tuple[Path, int]]:
    """Pieces of the files in random order, each once."""
    places = [
        (file, start) for file in files for start in range(0, file.stat().st_size, _READ_BYTES)
    ]
    return iter(random.sample(places, min(len(places), 1024)))


CURRENT_FOLDER = Check("current folder", check_working_folder)
"""The first of all: where it is gone, importing torch would end the process."""
CHECKS = [
    Check("temporary folder", check_temporary_folder),
    Check("cache folder", check_cache_folder),
]
