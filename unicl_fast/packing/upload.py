"""Packing to a URL: sources under URLs are staged, the data set is packed here and uploaded.

A data set is uploaded file by file, each read back, the manifest last. It is complete when its
manifest is there, so one that is being uploaded looks like none. An upload that was cut off can be
resumed: what lies there already is read and compared, and not sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.object_store import ObjectStore, StorageError, is_url
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.folder_check import expected_files
from unicl_fast.packing.staging import DEFAULT_STAGING_BYTES, default_work_folder, staged_sources
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, read_checksums
from unicl_fast.system.wording import count_of

_TRIES = 3


def build_anywhere(
    sources: Sequence[str],
    out: str,
    *,
    image_root: str = "",
    work: str = "",
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    **options: Any,
) -> BuildSummary:
    """`build_dataset` where sources, `image_root` and `out` may be URLs.

    Args:
        sources: as there, or URLs of the same.
        out: as there, or the URL to make.
        image_root: as there, or a URL.
        work: folder of staged sources and of the data set on its way; empty takes one in the user's
            cache.
        staging_bytes: most that sources under URLs may take there.
        **options: the others of `build_dataset`.

    Raises:
        ValueError: as there, or the sources take more room than is given for them, or would be
            copied where the other machines of a Ray cluster do not see them.
        FileNotFoundError: a source is not there.
        StorageError: a store cannot be reached. A data set that was packed stays, and the message
            says how to resume.
    """
    urls = [*filter(is_url, (*sources, image_root, out))]
    if urls and not work and options.get("engine") == "ray":
        raise ValueError(
            "--engine ray with URLs takes --work FOLDER, on a file system that all machines of the "
            "cluster see under the same path: what is copied, or unpacked, on its way lies there, "
            f"and by default in {default_work_folder()} of this machine"
        )
    work_folder = Path(work) if work else default_work_folder()
    store = ObjectStore(out) if is_url(out) else None
    folder = _packed_folder(out, work_folder) if store is not None else Path(out)
    if store is not None:
        _require_not_packed(folder, store)
        _require_free_url(store, None, store.list_sizes() or {}, names=set())
    with staged_sources(sources, image_root, out=folder, work=work_folder, room=staging_bytes) as (
        paths,
        root,
    ):
        if any(map(is_url, sources)):
            options["source_names"] = list(sources)
        try:
            summary = build_dataset(paths, folder, image_root=root, **options)
        except BaseException:
            if store is not None:
                with contextlib.suppress(OSError):  # it holds finished shards, or is not there
                    folder.parent.rmdir()
            raise
        if store is None:
            return summary
        try:
            upload_dataset(folder, store.url, progress=options.get("progress", True))
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"packed, but not uploaded: {error}. Resume by: {_command(folder, store.url)}"
            ) from error
        shutil.rmtree(folder.parent)
        return dataclasses.replace(summary, out=store.url)


def upload_dataset(folder: Path, url: str, *, progress: bool = True) -> str:
    """Uploads a data set; returns what was done, in words.

    Raises:
        FileNotFoundError: not a data set, or a file of it is missing.
        ValueError: its files are not those of its manifest, or something else lies at the URL.
        StorageError: the store cannot be reached, or keeps something else than what was sent.
    """
    if not is_url(url):
        raise ValueError(f"--out takes a URL such as s3://bucket/folder, not {url}")
    store = ObjectStore(url)
    manifest = Manifest.load(folder)
    checksums = _checksums_of(folder, manifest)
    there = store.list_sizes()
    if there is None:
        raise ValueError(f"{url}: http takes no uploads; give the URL of an object store")
    _require_free_url(store, folder, there, names=set(checksums))
    names = sorted(checksums, key=lambda name: (not name.endswith(".tar"), name))
    names.remove(MANIFEST_NAME)
    sizes = {name: (folder / name).stat().st_size for name in names}
    num_sent = num_kept = 0
    bar = tqdm(
        total=sum(sizes.values()), desc="uploading", unit="B", unit_scale=True, disable=not progress
    )
    try:
        for name in names:
            if there.get(name) == sizes[name] and (
                store.checksum_of(name, size=sizes[name]) == checksums[name]
            ):
                num_kept += 1
            else:
                _send(store, folder / name, checksums[name])
                num_sent += 1
            bar.update(sizes[name])
        _send(store, folder / MANIFEST_NAME, checksums[MANIFEST_NAME])
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(
            f"what was uploaded stays under {store.url}, and is no data set until all is there; "
            f"resume by: {_command(folder, store.url)}"
        )
        raise
    finally:
        bar.close()
    kept = f", {num_kept} were there already" if num_kept else ""
    folder = folder.absolute()
    copy = ""
    if _packed_folder(store.url, folder.parent.parent) == folder:
        copy = f"\n{folder} was packed for this URL and is not needed any more: rm -r "
        copy += str(folder.parent)
    return (
        f"{store.url}: {count_of(manifest.num_samples, 'image')}, "
        f"{sum(sizes.values()) / 1e6:,.1f} MB; "
        f"{count_of(num_sent + 1, 'file')} sent and read back{kept}{copy}"
    )


def _packed_folder(url: str, work: Path) -> Path:
    """The folder below `work` in which a data set for a URL is packed; alone in one of its own."""
    url = url.rstrip("/")
    return work / xxhash.xxh3_64_hexdigest(url.encode()) / url.rpartition("/")[2]


def _command(folder: Path, url: str) -> str:
    return f"unicl-pack upload {folder} --out {url}"


def _require_not_packed(folder: Path, store: ObjectStore) -> None:
    """Refuses to pack again what is there; a copy whose upload is complete is removed."""
    if not (folder / MANIFEST_NAME).is_file():
        return
    if store.read_whole(MANIFEST_NAME) != (folder / MANIFEST_NAME).read_bytes():
        raise ValueError(
            f"{folder} holds a data set that was packed for {store.url} and not uploaded: resume "
            f"by {_command(folder, store.url)}, or remove it"
        )
    shutil.rmtree(folder.parent)  # the manifest comes last, so all of it is there
    raise ValueError(
        f"{store.url} holds the data set that was packed for it already (the copy in {folder} was "
        "still there, and is removed now); name another URL, or remove what lies there"
    )


def _require_free_url(
    store: ObjectStore, folder: Path | None, there: dict[str, int], *, names: set[str]
) -> None:
    """Refuses a URL where anything lies but what an upload of `folder` has left."""
    if MANIFEST_NAME in there:
        same = folder is not None and (
            store.read_whole(MANIFEST_NAME) == (folder / MANIFEST_NAME).read_bytes()
        )
        if not same:
            raise ValueError(
                f"{store.url} already holds another packed data set; name another URL or remove it"
            )
    if others := sorted(set(there) - names):
        raise ValueError(
            f"{store.url} holds {count_of(len(others), 'other object')}, {others[0]} for one; "
            "name another URL"
        )


def _checksums_of(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Name and checksum of each file, that of the list among them."""
    listed = read_checksums(folder)
    if listed is None:
        raise ValueError(
            f"{folder} has no {CHECKSUMS_NAME}, by which an upload could be checked; "
            f"unicl-pack merge {folder} --out DIR writes a copy that has one"
        )
    if missing := sorted(expected_files(manifest) - set(listed)):
        raise ValueError(
            f"{folder / CHECKSUMS_NAME} does not list {missing[0]}: see unicl-pack verify"
        )
    for name in listed:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; copy the data set again")
    return listed | {CHECKSUMS_NAME: file_checksum(folder / CHECKSUMS_NAME)}


def _send(store: ObjectStore, path: Path, expected: str) -> None:
    """Writes a file and reads it back, a few times if need be."""
    found = ""
    for _ in range(_TRIES):
        store.write_file(path, path.name)
        size = store.size_of(path.name)
        found = "nothing" if size is None else store.checksum_of(path.name, size=size)
        if found == expected:
            return
    own = file_checksum(path)
    if own != expected:
        raise ValueError(
            f"{path} is damaged: its checksum is {own}, {CHECKSUMS_NAME} says {expected}; see "
            "unicl-pack verify"
        )
    raise StorageError(
        f"{store.url_of(path.name)} holds other bytes than were sent ({_TRIES} tries): its "
        f"checksum is {found}, not {expected}; look after the store, then upload again"
    )
