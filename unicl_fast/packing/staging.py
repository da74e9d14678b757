"""Copies of what lies under URLs, for programs that need files, for as long as they need them.

Nothing of a source is streamed: packing reads images in shuffled order, archives are read from both
ends, and workers that decode have no network. So a source is copied as a whole, if it is not larger
than the room that was given.

Copies are removed at the end. Those of a build lie in a folder whose name is a hash of the sources
and the output, and stay as long as an unfinished build can resume with them (`work_folder`): the
same command then finds the same files. A copy is used as it is if its object has not changed since.
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

import xxhash
from tqdm import tqdm

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.object_store import ObjectStore, StoredObject, is_url
from unicl_fast.packing.sources.tars import expand_braces
from unicl_fast.packing.work_folder import describe_unfinished, lock_folder
from unicl_fast.system.atomic_files import temporary_folder

DEFAULT_STAGING_BYTES = 100_000_000_000
_FILES_AT_ONCE = 4
_KEPT, _DISCARDED = "sources-", "discarded-"
_FOR_NAME = "for"
"""A file beside the copies: the path of the data set that is packed of them."""
_VERSIONS_NAME = "versions.jsonl"
_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_INSIDE_ARCHIVE = re.compile(r"(.+?\.(?:zip|tar\.gz))/(.+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """An object, and the path of its copy."""

    store: ObjectStore
    name: str
    found: StoredObject
    path: Path


@contextlib.contextmanager
def staged_sources(
    sources: Sequence[str],
    image_root: str,
    *,
    out: Path,
    work: Path,
    room: int,
) -> Iterator[tuple[list[str], str]]:
    """Sources of a build, and the root of its images, as paths.

    Copies are removed at the end, unless the build has failed and can resume with them.

    Args:
        sources: paths and URLs.
        image_root: a path, a URL, or nothing: then a list brings the folder that it lies in.
        out: the folder that is packed of them; each has copies of its own.
        work: the folder below which copies lie.
        room: most bytes of all copies.

    Raises:
        FileNotFoundError: there is nothing under a URL.
        ValueError: copies would take more room, a URL cannot be taken apart, or the same build is
            under way.
        StorageError: a store cannot be reached.
    """
    if not any(map(is_url, (*sources, image_root))):
        yield list(sources), image_root
        return
    out = out.absolute()
    made_of = json.dumps([*sources, image_root, str(out)])
    folder = work / f"{_KEPT}{xxhash.xxh3_64_hexdigest(made_of.encode())}"
    work.mkdir(parents=True, exist_ok=True)
    _sweep(work, but=folder)
    lock = lock_folder(folder)
    try:
        (folder / _FOR_NAME).write_text(str(out), encoding="utf-8", errors="surrogateescape")
        wanted: list[_Wanted] = []
        staged: dict[str, str] = {}
        for number, source in enumerate(dict.fromkeys((*sources, image_root))):
            if is_url(source):
                staged[source], found = _find(
                    source, folder / str(number), with_folder=not image_root
                )
                wanted += found
        _remove_others(folder, {one.path for one in wanted})
        _fetch(
            wanted,
            work=work,
            room=room,
            advice="give more room, or fewer at a time (unicl-pack merge joins what several "
            "builds made)",
            versions=_Versions(folder / _VERSIONS_NAME),
        )
        yield [staged.get(source, source) for source in sources], staged.get(image_root, image_root)
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
    work.mkdir(parents=True, exist_ok=True)
    with temporary_folder("staging-", root=work) as copies:
        path, wanted = _find_folder(folder, copies)
        _fetch(wanted, work=work, room=room, advice="give more room")
        yield Path(path)


def default_work_folder() -> Path:
    """The folder of copies, and of what is packed for a URL, in the user's cache."""
    return CacheOptions().place / "work"


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
        return bool(
            version
            and version == one.found.version
            and one.path.is_file()
            and one.path.stat().st_size == one.found.size
        )

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
            with one.path.open("rb") as file:
                os.fsync(file.fileno())  # not noted as whole before it is
            versions.note(one)
    return one.found.size


def _find(url: str, folder: Path, *, with_folder: bool) -> tuple[str, list[_Wanted]]:
    """The path that stands for a source's URL, and the objects to copy for it.

    Args:
        url: of a file, of a part of an archive, of tars in braces, or of a folder.
        folder: the folder of the copies.
        with_folder: whether a list may name images in its own folder, which is then copied too.
    """
    inside = _INSIDE_ARCHIVE.fullmatch(url)
    base, rest = (inside[1], f"/{inside[2]}") if inside else (url, "")
    above, _, name = base.rstrip("/").rpartition("/")
    if above.endswith(("://", ":/")) or "://" not in above:
        return _find_folder(url, folder)
    store = ObjectStore(above)
    if len(names := expand_braces(name)) > 1:
        wanted = []
        for one, found in store.find_all(names).items():
            if found is None:
                raise FileNotFoundError(f"{store.url_of(one)}: there is no such object")
            wanted.append(_Wanted(store, one, found, folder / one))
        return str(folder / name), wanted
    stored = store.find(name)
    if stored is None or url.endswith("/"):
        return _find_folder(url, folder)
    if with_folder and PurePosixPath(name).suffix.lower() in _LISTS:
        _, wanted = _find_folder(above, folder)
        return str(folder / store.name / name), wanted
    return str(folder / name) + rest, [_Wanted(store, name, stored, folder / name)]


def _find_folder(url: str, folder: Path) -> tuple[str, list[_Wanted]]:
    store = ObjectStore(url)
    listed = store.list_objects()
    if listed is None:
        raise ValueError(
            f"{url} is no file, and http cannot list folders: name its archives or lists one by one"
        )
    if not listed:
        raise FileNotFoundError(f"{url}: there is no such object, and no folder of this name")
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
