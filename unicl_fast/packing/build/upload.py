"""Puts a packed data set under a URL, file by file, each read back; the manifest comes last.

A data set is complete when its manifest is there, so one that is being uploaded looks like none. An
upload that was cut off goes on where it was: what lies there already is read and compared, and not
sent again.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.remote.object_store import ObjectStore, StorageError, is_url
from unicl_fast.packing.build.staging import packing_folder
from unicl_fast.packing.verify.folder_check import expected_files
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, read_checksums
from unicl_fast.system.wording import count_of

_TRIES = 3


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
    require_free_url(store, folder, there, names=set(checksums))
    names = sorted(checksums, key=lambda name: (not name.endswith(".tar"), name))
    names.remove(MANIFEST_NAME)
    sizes = {name: (folder / name).stat().st_size for name in names}
    num_sent = num_kept = 0
    bar = tqdm(
        total=sum(sizes.values()), desc="uploading", unit="B", unit_scale=True, disable=not progress
    )
    try:
        for name in names:
            if there.get(name) == sizes[name] and _is_there(store, name, folder, checksums[name]):
                num_kept += 1
            else:
                _send(store, folder / name, checksums[name])
                num_sent += 1
            bar.update(sizes[name])
        _send(store, folder / MANIFEST_NAME, checksums[MANIFEST_NAME])
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(
            f"what was uploaded stays under {store.url}, and is no data set until all is there; go "
            f"on with: unicl-pack upload {folder} --out {store.url}"
        )
        raise
    finally:
        bar.close()
    kept = f", {num_kept} were there already" if num_kept else ""
    return (
        f"{store.url}: {count_of(manifest.num_samples, 'image')}, "
        f"{sum(sizes.values()) / 1e6:,.1f} MB; "
        f"{count_of(num_sent + 1, 'file')} sent and read back{kept}"
        f"{_describe_copy(folder.absolute(), store)}"
    )


def _describe_copy(folder: Path, store: ObjectStore) -> str:
    """What to do with what `unicl-pack build` had packed for this URL; empty of other folders."""
    above = folder.parent
    if packing_folder(store.url, above.parent) != folder:
        return ""
    return f"\n{folder} was packed for this URL and is not needed any more: rm -r {above}"


def require_free_url(
    store: ObjectStore, folder: Path | None, there: dict[str, int], *, names: set[str]
) -> None:
    """Refuses a URL where anything lies but what an upload of `folder` has left.

    Raises:
        ValueError: says what lies there.
    """
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


def _is_there(store: ObjectStore, name: str, folder: Path, expected: str) -> bool:
    size = (folder / name).stat().st_size
    return store.checksum_of(name, size=size) == expected


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
