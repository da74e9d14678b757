"""Copies of what lies under URLs, for programs that need files: all of it, removed at the end.

Nothing of a source is streamed: packing goes through pictures in shuffled order, archives are read
from both ends, and workers that decode have no network. So a source is copied as a whole, if it is
not larger than the room that was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from unicl_fast.remote.block_cache import CacheOptions
from unicl_fast.remote.object_store import ObjectStore, is_url
from unicl_fast.tools.source_tars import expand_braces
from unicl_fast.tools.temporary_folder import temporary_folder

DEFAULT_STAGING_BYTES = 100_000_000_000
_FILES_AT_ONCE = 4
_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
_INSIDE_ARCHIVE = re.compile(r"(.+?\.(?:zip|tar\.gz))/(.+)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """An object to be copied, and where to."""

    store: ObjectStore
    name: str
    size: int
    path: Path


@contextlib.contextmanager
def staged_sources(
    sources: Sequence[str], image_root: str, *, place: Path, room: int
) -> Iterator[tuple[list[str], str]]:
    """Sources of a build, and the root of its pictures, as paths; copies go at the end.

    Args:
        sources: paths and URLs.
        image_root: a path, a URL, or nothing: then a list brings the folder that it lies in.
        place: copies go below it.
        room: most bytes of all copies.

    Raises:
        FileNotFoundError: there is nothing under a URL.
        ValueError: copies would take more room, or a URL cannot be taken apart.
        StorageError: a store cannot be reached.
    """
    if not any(map(is_url, (*sources, image_root))):
        yield list(sources), image_root
        return
    with _copies(place) as folder:
        wanted: list[_Wanted] = []
        staged: dict[str, str] = {}
        for number, source in enumerate(dict.fromkeys((*sources, image_root))):
            if is_url(source):
                path, found = _find(source, folder / str(number), with_folder=not image_root)
                staged[source] = path
                wanted += found
        _fetch(wanted, place=place, room=room)
        yield [staged.get(source, source) for source in sources], staged.get(image_root, image_root)


@contextlib.contextmanager
def local_copy(place: str, *, room: int = DEFAULT_STAGING_BYTES) -> Iterator[Path]:
    """A packed data set as a folder: itself, or for a while a copy of what lies under a URL.

    Raises:
        FileNotFoundError: there is nothing under the URL.
        ValueError: the copy would take more than `room` bytes.
        StorageError: the store cannot be reached.
    """
    if not is_url(place):
        yield Path(place)
        return
    with _copies(work_folder()) as folder:
        path, wanted = _find_folder(place, folder)
        _fetch(wanted, place=work_folder(), room=room)
        yield Path(path)


def work_folder() -> Path:
    """Where copies go by default."""
    return CacheOptions().place / "work"


@contextlib.contextmanager
def _copies(place: Path) -> Iterator[Path]:
    place.mkdir(parents=True, exist_ok=True)
    with temporary_folder("staging-", root=place) as folder:
        yield folder


def _fetch(wanted: Sequence[_Wanted], *, place: Path, room: int) -> None:
    needed = sum(one.size for one in wanted)
    if needed > room:
        raise ValueError(
            f"what lies under the URLs takes {needed:,} bytes, more than --staging-bytes {room:,} "
            f"allows in {place}: give more room, or fewer at a time (unicl-pack merge joins what "
            "several builds made)"
        )
    bar = tqdm(total=needed, desc="copying", unit="B", unit_scale=True, disable=None)
    with bar, ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="unicl-staging") as pool:
        for one in wanted:
            one.path.parent.mkdir(parents=True, exist_ok=True)
        for size in pool.map(_copy, wanted):
            bar.update(size)


def _copy(one: _Wanted) -> int:
    one.store.fetch_file(one.name, one.path, size=one.size)
    return one.size


def _find(url: str, folder: Path, *, with_folder: bool) -> tuple[str, list[_Wanted]]:
    """What has to be copied of a source, and the path that then stands for its URL.

    Args:
        url: of a file, of a part of an archive, of tars in braces, or of a folder.
        folder: where copies go.
        with_folder: whether a list may name pictures in its own folder, which then come too.
    """
    inside = _INSIDE_ARCHIVE.fullmatch(url)
    base, rest = (inside[1], f"/{inside[2]}") if inside else (url, "")
    above, _, name = base.rstrip("/").rpartition("/")
    if above.endswith(("://", ":/")) or "://" not in above:
        return _find_folder(url, folder)
    if len(names := expand_braces(name)) > 1:
        store = ObjectStore(above)
        sizes = store.sizes_of(names)
        for one in names:
            if sizes[one] is None:
                raise FileNotFoundError(f"{store.url_of(one)}: there is no such object")
        found = [_Wanted(store, one, sizes[one] or 0, folder / one) for one in names]
        return str(folder / name), found
    store = ObjectStore(above)
    size = store.size_of(name)
    if size is None or url.endswith("/"):
        return _find_folder(url, folder)
    suffix = PurePosixPath(name).suffix.lower()
    if with_folder and suffix in _LISTS:
        _, found = _find_folder(above, folder)
        return str(folder / store.name / name), found
    return str(folder / name) + rest, [_Wanted(store, name, size, folder / name)]


def _find_folder(url: str, folder: Path) -> tuple[str, list[_Wanted]]:
    store = ObjectStore(url)
    listed = store.list_sizes()
    if listed is None:
        raise ValueError(
            f"{url} is no file, and http cannot list folders: name its archives or lists one by one"
        )
    if not listed:
        raise FileNotFoundError(f"{url}: there is no such object, and no folder of this name")
    target = folder / store.name
    found = []
    for name, size in sorted(listed.items()):
        if not name or name.endswith("/"):  # what some tools make in the place of a folder
            continue
        path = target / name
        if ".." in PurePosixPath(name).parts or not path.is_relative_to(target):
            raise ValueError(f"{store.url_of(name)} has a name that leaves its folder")
        found.append(_Wanted(store, name, size, path))
    return str(target), found
