"""A local copy of a remote data set's small files: manifest, checksums, arrays.

Every batch needs them, so they are fetched once and mapped as those of a local data set are.
Manifest and checksums are read at every opening, and name the folder: a data set that was replaced
under its URL gets another one. The copy is compared with its checksums at every opening, and what
differs is fetched again.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.remote.object_store import ObjectStore
from unicl_fast.system.atomic_files import lock, replacing
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, parse_checksums
from unicl_fast.system.progress import mark_progress

logger = logging.getLogger(__name__)

_READINGS = 3
_BETWEEN_READINGS_SECONDS = 1.0
_UNUSED_DAYS = 30
"""Folders that were not opened for so long are removed, to make room."""


def open_local_copy(store: ObjectStore, cache_folder: Path, names: Iterable[str]) -> Path:
    """Makes a folder with the manifest, the checksums and the named files of a data set.

    Processes that ask at the same time fetch them once.

    Args:
        store: where the data set lies.
        cache_folder: the folder is made below it; its own name is that of the data set.
        names: files beside these two; missing ones are left for the reader to find.

    Raises:
        FileNotFoundError: the URL is not that of a data set.
        ValueError: the data differ from their checksums.
        StorageError: the store cannot be reached.
    """
    manifest, checksums = _read_heads(store)
    identity = xxhash.xxh3_128_hexdigest(b"\0".join((store.url.encode(), manifest, checksums)))
    above = cache_folder / "datasets"
    folder = above / identity / store.name
    folder.mkdir(parents=True, exist_ok=True)
    with (above / f"{identity}.lock").open("w") as lock:
        _wait_for(lock.fileno())
        os.utime(folder.parent)
        listed = parse_checksums(checksums, where=store.url_of(CHECKSUMS_NAME)) if checksums else {}
        for name in names:
            _fetch_if_changed(store, folder / name, listed.get(name))
        if checksums:
            _put(folder / CHECKSUMS_NAME, checksums)
        _put(folder / MANIFEST_NAME, manifest)
        _remove_unused(above)
    return folder


def _read_heads(store: ObjectStore) -> tuple[bytes, bytes]:
    """Reads a manifest and the checksums that belong to it; none (b"") where there is no list."""
    for reading in range(1, _READINGS + 1):
        manifest = store.read_whole(MANIFEST_NAME)
        if manifest is None:
            raise FileNotFoundError(
                f"{store.url} is not a packed data set: it has no {MANIFEST_NAME}. "
                f"Make one with: unicl-pack build SOURCE... --out {store.url}"
            )
        checksums = store.read_whole(CHECKSUMS_NAME)
        if checksums is None:
            return manifest, b""
        listed = parse_checksums(checksums, where=store.url_of(CHECKSUMS_NAME))
        found = xxhash.xxh3_64_hexdigest(manifest)
        if listed.get(MANIFEST_NAME) == found:
            return manifest, checksums
        if reading == _READINGS:
            raise ValueError(
                f"{store.url_of(MANIFEST_NAME)} is damaged, or just being replaced: its checksum "
                f"is {found}, {CHECKSUMS_NAME} says {listed.get(MANIFEST_NAME) or 'nothing of it'};"
                " wait until it is whole, or upload the data set again"
            )
        time.sleep(_BETWEEN_READINGS_SECONDS)
    raise AssertionError("unreachable")


def _fetch_if_changed(store: ObjectStore, path: Path, expected: str | None) -> None:
    """Fetches a file unless it has its checksum already; one without a checksum always."""
    if expected is not None and path.is_file() and file_checksum(path) == expected:
        return
    size = store.size_of(path.name)
    if size is None:
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".{path.name}.partial")
    found = ""
    for _ in range(2):
        found = store.fetch_file(path.name, aside, size=size, progress=lambda _: mark_progress())
        if expected is None or found == expected:
            aside.replace(path)
            return
    aside.unlink()
    raise ValueError(
        f"{store.url_of(path.name)} is damaged: its checksum is {found}, {CHECKSUMS_NAME} says "
        f"{expected}; upload the data set again"
    )


def _put(path: Path, data: bytes) -> None:
    if path.is_file() and path.read_bytes() == data:
        return
    with replacing(path, flush=False) as aside:
        aside.write_bytes(data)


def _wait_for(descriptor: int) -> None:
    """Takes a lock. Its holder shows its own progress, so waiting for it is no hanging."""
    while not lock(descriptor):
        mark_progress()
        time.sleep(0.05)


def _remove_unused(above: Path) -> None:
    oldest = time.time() - _UNUSED_DAYS * 86_400
    for folder in above.iterdir():
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            logger.info("%s was not used for %d days, and is removed", folder, _UNUSED_DAYS)
            shutil.rmtree(folder, ignore_errors=True)
