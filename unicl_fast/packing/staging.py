"""Local copies of objects under URLs, for as long as a program needs them.

Packing reads images in shuffled order and archives from both ends, so sources are copied whole.
A copy's modification time encodes its object's version: a copy with the right size and time is
reused, and a resumed build sees that its sources are unchanged.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from unicl_fast.dataset.block_cache import CacheOptions
from unicl_fast.dataset.object_store import ObjectStore, StorageError, StoredObject, is_url
from unicl_fast.packing.sources.lists import LIST_SUFFIXES
from unicl_fast.packing.sources.tars import expand_braces
from unicl_fast.system.atomic_files import flush_to_disk, make_folder, temporary_folder
from unicl_fast.system.bar import Bar
from unicl_fast.system.checksums import CHECKSUMS_NAME, parse_checksums
from unicl_fast.system.wording import count_of, without_secrets

_FILES_AT_ONCE = 4
_INSIDE_ZIP = re.compile(r"(.+?\.zip)/(.+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Copy:
    """An object, and the path of its copy."""

    store: ObjectStore
    name: str
    """With its URL's query, which must not be shown."""
    found: StoredObject
    path: Path

    def make(self) -> int:
        """Makes the copy if it is missing or outdated; returns its size."""
        size, version = self.found.size, self.found.version
        seconds = xxhash.xxh3_64_intdigest(version.encode()) % 2**31
        with contextlib.suppress(FileNotFoundError):
            known = self.path.stat()
            if version and (known.st_size, known.st_mtime) == (size, seconds):
                return size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.store.fetch_file(self.name, self.path, size=size)
        if version:
            flush_to_disk(self.path)  # before the time marks it as whole
            os.utime(self.path, (seconds, seconds))
        return size


class StagedSources:
    """Local paths of sources; sources under URLs are copied."""

    def __init__(self, sources: Sequence[str], image_root: str, folder: Path) -> None:
        """Looks up the objects to copy into `folder`; copies nothing yet.

        Raises FileNotFoundError if nothing is there, ValueError for a folder that cannot be listed
        or a name that leaves it.
        """
        self._given = sources, image_root, folder
        self._folder = folder
        self._copies: list[_Copy] = []
        self.versions: dict[str, str] = {}
        """A text for each URL that changes with its objects, if the store has versions."""
        places = {place: place for place in (*sources, image_root)}
        for number, url in enumerate(filter(is_url, places)):
            # without a root, the folder of a list is copied too
            places[url], found = _find(url, folder / str(number), with_folder=not image_root)
            self._copies += found
            known = [
                (one.store.url_of(one.name), one.found.size, one.found.version) for one in found
            ]
            if all(version for *_, version in known):
                checksum = xxhash.xxh3_128_hexdigest(json.dumps(known).encode())
                text = f"{count_of(len(known), 'object')}, checksum {checksum}"
                self.versions[without_secrets(url)] = text
        self.paths = [places[source] for source in sources]
        self.image_root = places[image_root]
        self.are_known = len(self.versions) == sum(map(bool, places))
        """Whether `versions` covers all sources."""

    def fetch(self) -> None:
        """Makes copies, removes unknown ones; OSError without room, StorageError after changes."""
        wanted = {one.path: one.found.size for one in self._copies}
        for path in sorted(self._folder.rglob("*"), reverse=True):  # folders are packed as they are
            if path.is_file() and path not in wanted:
                path.unlink()
            elif path.is_dir():
                with contextlib.suppress(OSError):  # not empty; an object can have its name now
                    path.rmdir()
        if not wanted:
            return
        make_folder(self._folder)
        needed = sum(wanted.values())
        missing = needed - sum(path.stat().st_size for path in wanted if path.exists())
        if missing > (free := shutil.disk_usage(self._folder).free):
            raise OSError(
                f"copies of the URLs need {missing:,} bytes more, and {free:,} are free in "
                f"{self._folder}: make room, or pack fewer sources at a time and join the packed "
                "data sets by another build"
            )
        bar = Bar(total=needed, desc="copying", unit="B", unit_scale=True)
        with bar, ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="unicl-staging") as pool:
            for size in pool.map(_Copy.make, self._copies):
                bar.update(size)
        for url, version in StagedSources(*self._given).versions.items():
            if version != self.versions.get(url):
                raise StorageError(f"{url} was changed while it was copied; start again")


@contextlib.contextmanager
def local_copy(folder: str) -> Iterator[Path]:
    """A packed data set as a folder: itself, or a temporary copy of a URL."""
    if not is_url(folder):
        yield Path(folder)
        return
    work = default_work_folder()
    make_folder(work)
    with temporary_folder("staging-", root=work) as copies:
        staged = StagedSources([folder.rstrip("/") + "/"], "", copies / "set")
        staged.fetch()
        yield Path(staged.paths[0])


def default_work_folder() -> Path:
    """The folder in the user's cache for copies, and for data sets packed for a URL."""
    return CacheOptions().place / "work"


def _find(url: str, folder: Path, *, with_folder: bool) -> tuple[str, list[_Copy]]:
    """The local path for a URL (of a file, part of a zip, tars or a folder), and its copies.

    With `with_folder`, the folder of a list is copied too, since the list can name images in it.
    """
    place, mark, query = url.partition("?")
    secret = mark + query  # a signature: only for requests, not for paths and names
    inside = _INSIDE_ZIP.fullmatch(place)
    base, rest = (inside[1], f"/{inside[2]}") if inside else (place, "")
    above, _, name = base.rpartition("/")
    if not name or above.endswith(("://", ":/")) or "://" not in above:
        return _find_folder(url, folder)
    store, names = ObjectStore(above), expand_braces(name)
    if len(names) > 1:
        found = store.find_all([one + secret for one in names])
    else:
        found = {name + secret: store.find(name + secret)}
        if found[name + secret] is None:
            return _find_folder(place, folder)
    if with_folder and PurePosixPath(name).suffix.lower() in LIST_SUFFIXES:
        return str(folder / store.name / name), _find_folder(above, folder)[1]
    copies = []
    for one, (signed, stored) in zip(names, found.items(), strict=True):
        if stored is None:
            raise FileNotFoundError(f"{store.url_of(signed)}: there is no such object")
        copies.append(_Copy(store, signed, stored, folder / one))
    return str(folder / name) + rest, copies


def _find_folder(url: str, folder: Path) -> tuple[str, list[_Copy]]:
    store = ObjectStore(url)
    listed = store.list_objects()
    if listed is None and (data := store.read_whole(CHECKSUMS_NAME)) is not None:
        # a packed data set, whose list of checksums names its files
        names = parse_checksums(data, where=store.url_of(CHECKSUMS_NAME))
        found = store.find_all([CHECKSUMS_NAME, *names])
        listed = {name: one for name, one in found.items() if one is not None}
    if listed is None:
        raise ValueError(
            f"{store.url} is no file, and http cannot list folders: name each archive or list"
        )
    if not listed:
        raise FileNotFoundError(f"{store.url}: there is no such object, and no folder of this name")
    target = folder / store.name
    copies = []
    for name in sorted(listed):
        if not name or name.endswith("/"):  # some tools make such objects to stand for folders
            continue
        path = target / name
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(target):
            raise ValueError(f"{store.url_of(name)} has a name that leaves its folder")
        copies.append(_Copy(store, name, listed[name], path))
    return str(target), copies
