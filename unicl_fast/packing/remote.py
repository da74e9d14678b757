"""Packing from and to URLs: what lies there is copied for as long as it is needed, or uploaded.

Nothing of a source is streamed: packing reads images in shuffled order, archives are read from both
ends, and workers that decode have no network. So a source is copied as a whole, if it is not larger
than the room that was given. Copies of a build lie in a folder whose name is a hash of the sources
and the output, and stay as long as an unfinished build can resume with them (`work_folder`): the
same command then finds the same files. A copy is used as it is if its object has not changed since,
and has a time that its object's version decides, by which a build finds that its sources are the
same. A complete build whose sources all lie under URLs is known by these versions, and copies
nothing.

A data set is uploaded file by file, each read back, the manifest last. It is complete when its
manifest is there, so one that is being uploaded looks like none. An upload that was cut off can be
resumed: what lies there already is read and compared, and not sent again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash
from tqdm import tqdm

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.object_store import ObjectStore, StorageError, StoredObject, is_url
from unicl_fast.packing.build import BuildSummary, build_dataset
from unicl_fast.packing.folder_check import expected_files
from unicl_fast.packing.sources.tars import expand_braces
from unicl_fast.packing.work_folder import describe_unfinished, lock_folder
from unicl_fast.system.atomic_files import make_folder, temporary_folder
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, read_checksums
from unicl_fast.system.wording import count_of, without_secrets

DEFAULT_STAGING_BYTES = 100_000_000_000
_FILES_AT_ONCE = 4
_KEPT, _DISCARDED = "sources-", "discarded-"
_FOR_NAME = "for"
"""A file beside the copies: the path of the data set that is packed of them."""
_VERSIONS_NAME = "versions.jsonl"
_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_INSIDE_ARCHIVE = re.compile(r"(.+?\.(?:zip|tar\.gz))/(.+)", re.IGNORECASE)
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
    has_urls = any(map(is_url, (*sources, image_root, out)))
    if has_urls and not work and options.get("engine") == "ray":
        raise ValueError(
            "--engine ray with URLs takes --work FOLDER, on a file system that all machines of the "
            "cluster see under the same path: what is copied, or unpacked, on its way lies there, "
            f"and by default in {default_work_folder()} of this machine"
        )
    work_folder = Path(work) if work else default_work_folder()
    store = ObjectStore(out) if is_url(out) else None
    folder = _packed_folder(out, work_folder) if store is not None else Path(out)
    if store is not None:
        is_packed = (folder / MANIFEST_NAME).is_file()  # by a run that did not end its upload
        names = set(_checksums_of(folder, Manifest.load(folder))) if is_packed else set()
        _require_free_url(store, folder if is_packed else None, _list_below(store), names=names)
    if any(map(is_url, sources)):
        options["source_names"] = list(map(without_secrets, sources))
    with _staged_sources(
        sources, image_root, out=folder, work=work_folder, room=staging_bytes
    ) as staged:
        try:
            summary = build_dataset(out=folder, **staged, **options)
        except BaseException:
            if store is not None:
                with contextlib.suppress(OSError):  # it holds finished shards, or is not there
                    folder.parent.rmdir()
            raise
        if store is None:
            return summary
        try:
            upload_dataset(folder, out, progress=options.get("progress", True))
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"packed, but not uploaded: {error}. Resume by: {_command(folder, store.url)}"
            ) from error
        shutil.rmtree(folder.parent)
        return dataclasses.replace(summary, out=store.url)


@contextlib.contextmanager
def _staged_sources(
    sources: Sequence[str], image_root: str, *, out: Path, work: Path, room: int
) -> Iterator[dict[str, Any]]:
    """Arguments of `build_dataset` for sources, and a root of images, that may be URLs.

    Copies, of at most `room` bytes together, lie below `work`, and are made when the build calls
    `stage`. They are removed at the end, unless the build of `out` has failed and can resume with
    them.
    """
    if not any(map(is_url, (*sources, image_root))):
        yield {"sources": list(sources), "image_root": image_root}
        return
    out = out.absolute()
    # passwords change, and what was copied with another one is as good
    made_of = json.dumps([*map(without_secrets, sources), without_secrets(image_root), str(out)])
    folder = work / f"{_KEPT}{xxhash.xxh3_64_hexdigest(made_of.encode())}"
    make_folder(work)
    _sweep(work, but=folder)
    lock = lock_folder(folder)
    try:
        (folder / _FOR_NAME).write_text(str(out), encoding="utf-8", errors="surrogateescape")
        wanted: list[_Wanted] = []
        staged: dict[str, str] = {}
        stored: dict[str, str] = {}
        for number, source in enumerate(dict.fromkeys((*sources, image_root))):
            if is_url(source):
                place = folder / str(number)
                # without a root, a list brings the folder that it lies in
                staged[source], found = _find(source, place, with_folder=not image_root)
                wanted += found
                stored[without_secrets(source)] = _describe_objects(found)
        is_all = all(is_url(place) for place in (*sources, image_root) if place)
        if not is_all or not all(one.found.version for one in wanted):
            stored = {}  # they do not tell that nothing has changed
        _remove_others(folder, {one.path for one in wanted})
        advice = (
            "give more room, or fewer at a time (unicl-pack build joins what several builds made)"
        )
        versions = _Versions(folder / _VERSIONS_NAME)
        yield {
            "sources": [staged.get(source, source) for source in sources],
            "image_root": staged.get(image_root, image_root),
            "stored": stored,
            "stage": partial(
                _fetch, wanted, work=work, room=room, advice=advice, versions=versions
            ),
        }
    except BaseException:
        if not _has_unfinished(out):
            _discard(folder)
        raise
    else:
        _discard(folder)
    finally:
        os.close(lock)


@contextlib.contextmanager
def local_copy(folder: str, *, room: int = DEFAULT_STAGING_BYTES) -> Iterator[Path]:
    """A packed data set as a folder: itself, or for a while a copy of what lies under a URL.

    Raises:
        FileNotFoundError: there is nothing under the URL.
        ValueError: the copy would take more than `room` bytes.
        StorageError: the store cannot be reached.
    """
    if not is_url(folder):
        yield Path(folder)
        return
    work = default_work_folder()
    make_folder(work)
    with temporary_folder("staging-", root=work) as copies:
        path, wanted = _find_folder(folder, copies)
        _fetch(wanted, work=work, room=room, advice="give more room")
        yield Path(path)


def default_work_folder() -> Path:
    """The folder of copies, and of what is packed for a URL, in the user's cache."""
    return CacheOptions().place / "work"


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """An object, and the path of its copy."""

    store: ObjectStore
    name: str
    """With the query that its URL has, which is not to be shown."""
    found: StoredObject
    path: Path


def _describe_objects(wanted: Sequence[_Wanted]) -> str:
    """Number of objects, and a checksum of their names, sizes and versions."""
    known = [(one.store.url_of(one.name), one.found.size, one.found.version) for one in wanted]
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(known).encode())
    return f"{count_of(len(known), 'object')}, checksum {checksum}"


def _has_unfinished(out: Path) -> bool:
    """Whether a build of this folder has finished shards and can resume; if in doubt it can."""
    try:
        return bool(describe_unfinished(out))
    except (OSError, ValueError):
        return True


def _sweep(work: Path, *, but: Path) -> None:
    """Removes copies that no build can use: its folder was removed, or finished since."""
    for folder in work.glob(f"{_DISCARDED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for note in work.glob(f"{_KEPT}*/{_FOR_NAME}"):
        if note.parent == but:
            continue
        with contextlib.suppress(ValueError, OSError):  # in use, or another process sweeps too
            lock = lock_folder(note.parent)
            try:
                out = Path(note.read_text(encoding="utf-8", errors="surrogateescape"))
                if not _has_unfinished(out):
                    _discard(note.parent)
            finally:
                os.close(lock)


def _discard(folder: Path) -> None:
    """Removes a folder; a process that is killed meanwhile leaves nothing under its name."""
    doomed = folder.with_name(folder.name.replace(_KEPT, _DISCARDED, 1))
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _remove_others(folder: Path, wanted: Set[Path]) -> None:
    """Removes copies of objects that are no longer there: folders are packed as they are."""
    for path in folder.glob("*/**/*"):
        if path.is_file() and path not in wanted:
            path.unlink()
    for path in sorted(folder.glob("*/**/"), reverse=True):  # an object may bear its name now
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


class _Versions:
    """The version of its object that each copy is of; one line of JSON for each whole copy."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # the last one, if it was cut off
                    self._known |= json.loads(line)

    def has(self, one: _Wanted) -> bool:
        """Whether the copy is there, whole, and of the object as it is now."""
        version = self._known.get(str(one.path), "")
        is_there = bool(version) and version == one.found.version and one.path.is_file()
        return is_there and one.path.stat().st_size == one.found.size

    def note(self, one: _Wanted) -> None:
        """Notes that the copy is whole."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({str(one.path): one.found.version}) + "\n")


def _fetch(
    wanted: Sequence[_Wanted],
    *,
    work: Path,
    room: int,
    advice: str,
    versions: _Versions | None = None,
) -> None:
    needed = sum(one.found.size for one in wanted)
    if needed > room:
        raise ValueError(
            f"what lies under the URLs takes {needed:,} bytes, more than --staging-bytes {room:,} "
            f"allows in {work}: {advice}"
        )
    bar = tqdm(total=needed, desc="copying", unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="unicl-staging") as pool:
        for one in wanted:
            one.path.parent.mkdir(parents=True, exist_ok=True)
        for size in pool.map(partial(_copy, versions=versions), wanted):
            bar.update(size)


def _copy(one: _Wanted, *, versions: _Versions | None) -> int:
    if versions is None or not versions.has(one):
        one.store.fetch_file(one.name, one.path, size=one.found.size)
        if versions is not None:
            if one.found.version:  # a build knows files by their times: another copy has the same
                seconds = xxhash.xxh3_64_intdigest(one.found.version.encode()) % 2**31
                os.utime(one.path, (seconds, seconds))
            with one.path.open("rb") as file:
                os.fsync(file.fileno())  # not noted as whole before it is
            versions.note(one)
    return one.found.size


def _find(url: str, folder: Path, *, with_folder: bool) -> tuple[str, list[_Wanted]]:
    """The path in `folder` that stands for a source's URL, and the objects to copy for it.

    The URL is that of a file, a part of an archive, tars in braces, or a folder. `with_folder` says
    whether a list may name images in its own folder, which is then copied too.
    """
    place, mark, query = url.partition("?")
    secret = mark + query  # a signature: for requests alone, not for paths and names
    inside = _INSIDE_ARCHIVE.fullmatch(place)
    base, rest = (inside[1], f"/{inside[2]}") if inside else (place, "")
    above, _, name = base.rstrip("/").rpartition("/")
    if above.endswith(("://", ":/")) or "://" not in above:
        return _find_folder(url, folder)
    store = ObjectStore(above)
    if len(names := expand_braces(name)) > 1:
        shards = []
        found_by_name = store.find_all([one + secret for one in names])
        for one, (signed, found) in zip(names, found_by_name.items(), strict=True):
            if found is None:
                raise FileNotFoundError(f"{store.url_of(signed)}: there is no such object")
            shards.append(_Wanted(store, signed, found, folder / one))
        return str(folder / name), shards
    stored = store.find(name + secret)
    if stored is None or place.endswith("/"):
        return _find_folder(place, folder)
    if with_folder and PurePosixPath(name).suffix.lower() in _LISTS:
        _, wanted = _find_folder(above, folder)
        return str(folder / store.name / name), wanted
    return str(folder / name) + rest, [_Wanted(store, name + secret, stored, folder / name)]


def _find_folder(url: str, folder: Path) -> tuple[str, list[_Wanted]]:
    store = ObjectStore(url)
    listed = store.list_objects()
    if listed is None:
        raise ValueError(
            f"{store.url} is no file, and http cannot list folders: name its archives or lists one "
            "by one"
        )
    if not listed:
        raise FileNotFoundError(f"{store.url}: there is no such object, and no folder of this name")
    target = folder / store.name
    wanted = []
    for name in sorted(listed):
        if not name or name.endswith("/"):  # what some tools make in the place of a folder
            continue
        path = target / name
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(target):
            raise ValueError(f"{store.url_of(name)} has a name that leaves its folder")
        wanted.append(_Wanted(store, name, listed[name], path))
    return str(target), wanted


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
    there = _list_below(store)
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
    copy, folder = "", folder.absolute()
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
    url = without_secrets(url).rstrip("/")
    return work / xxhash.xxh3_64_hexdigest(url.encode()) / url.rpartition("/")[2]


def _command(folder: Path, url: str) -> str:
    return f"unicl-pack upload {folder} --out {url}"


def _has_manifest_of(folder: Path, store: ObjectStore) -> bool:
    return store.read_whole(MANIFEST_NAME) == (folder / MANIFEST_NAME).read_bytes()


def _list_below(store: ObjectStore) -> dict[str, int]:
    """Names and sizes of the objects below a URL that a data set is to be uploaded to."""
    there = store.list_sizes()
    if there is None:
        raise ValueError(f"{store.url}: http takes no uploads; give the URL of an object store")
    return there


def _require_free_url(
    store: ObjectStore, folder: Path | None, there: dict[str, int], *, names: set[str]
) -> None:
    """Refuses a URL where anything lies but what an upload of `folder` has left."""
    if MANIFEST_NAME in there and (folder is None or not _has_manifest_of(folder, store)):
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
            f"unicl-pack build {folder} --out DIR writes a copy that has one"
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
