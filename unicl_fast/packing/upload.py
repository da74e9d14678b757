"""Uploads a packed data set file by file, reads each back, and sends the manifest last.

An interrupted upload resumes: files that are there already are compared, not sent again.
"""

from pathlib import Path

from unicl_fast.dataset.in_place import SourceFiles
from unicl_fast.dataset.manifest import MANIFEST_NAME, Manifest
from unicl_fast.dataset.object_store import ObjectStore, StorageError, is_url
from unicl_fast.packing.croissant import CROISSANT_NAME
from unicl_fast.packing.folder_check import expected_files
from unicl_fast.system.bar import Bar
from unicl_fast.system.checksums import CHECKSUMS_NAME, file_checksum, read_checksums
from unicl_fast.system.untrusted_files import read_file
from unicl_fast.system.wording import count_of


def upload_dataset(folder: Path, url: str, *, progress: bool = True) -> str:
    """Uploads a data set; returns a report.

    Raises:
        ValueError: its files do not fit its manifest, or something else lies at the URL.
        StorageError: the store cannot be reached, or stored other bytes.
    """
    manifest, checksums = Manifest.load(folder), _checksums_of(folder)
    if manifest.in_place is not None:
        sources = SourceFiles(folder, manifest, None)
        if len(sources) and sources.cache is None:
            raise ValueError(
                f"the images of {folder} are in files of this machine, such as {sources[0]}: "
                "upload these, and index them by their URLs"
            )
    store, there = require_free_url(url, folder)
    names = sorted(checksums, key=lambda name: (name == MANIFEST_NAME, name[-4:] != ".tar", name))
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, num_sent = sum(sizes.values()), 0
    try:
        with Bar(total=total, desc="uploading", unit="B", unit_scale=True, shown=progress) as bar:
            for name in names:
                is_there = there.get(name) == sizes[name] and name != MANIFEST_NAME
                if not is_there or store.checksum_of(name, size=sizes[name]) != checksums[name]:
                    _send(store, folder / name, checksums[name])
                    num_sent += 1
                bar.update(sizes[name])
    except (KeyboardInterrupt, SystemExit) as stop:
        stop.add_note(
            f"uploaded files stay under {store.url}, which is no data set until all are there; "
            f"resume by: {upload_command(folder, store.url)}"
        )
        raise
    kept = f", {len(names) - num_sent} were there already" if num_sent < len(names) else ""
    return (
        f"{store.url}: {count_of(manifest.num_samples, 'image')}, {total / 1e6:,.1f} MB; "
        f"{count_of(num_sent, 'file')} sent and read back{kept}"
    )


def upload_command(folder: Path, url: str) -> str:
    """The command that uploads a data set or resumes an upload."""
    return f"unicl-pack upload {folder} --out {url}"


def require_free_url(url: str, folder: Path) -> tuple[ObjectStore, dict[str, int]]:
    """Raises ValueError if a URL holds anything but files of an earlier upload of `folder`.

    Returns the store, and the sizes of its objects.
    """
    if not is_url(url):
        raise ValueError(f"--out must be a URL such as s3://bucket/folder, not {url}")
    store = ObjectStore(url)
    listed = store.list_objects()
    if listed is None:
        raise ValueError(f"{store.url}: http has no uploads; give the URL of an object store")
    there = {name: found.size for name, found in listed.items()}
    manifest = folder / MANIFEST_NAME
    own = {*_checksums_of(folder), CROISSANT_NAME} if there and manifest.is_file() else set()
    if MANIFEST_NAME in there and (
        not own or store.read_whole(MANIFEST_NAME) != read_file(manifest)
    ):
        raise ValueError(
            f"{store.url} already holds another packed data set; name another URL or remove it"
        )
    if others := sorted(set(there) - own):
        raise ValueError(
            f"{store.url} holds {count_of(len(others), 'other object')}, {others[0]} for one; "
            "name another URL"
        )
    return store, there


def _checksums_of(folder: Path) -> dict[str, str]:
    """The checksums of all files by name, including the list of checksums."""
    manifest, listed = Manifest.load(folder), read_checksums(folder)
    if listed is None:
        raise ValueError(
            f"{folder} has no {CHECKSUMS_NAME} to check an upload by; "
            f"unicl-pack build {folder} --out DIR writes a copy that has one"
        )
    if missing := sorted(expected_files(manifest) - set(listed)):
        raise ValueError(
            f"{folder / CHECKSUMS_NAME} does not list {missing[0]}: see unicl-pack verify"
        )
    more = [name for name in (CHECKSUMS_NAME, CROISSANT_NAME) if (folder / name).is_file()]
    return listed | {name: file_checksum(folder / name) for name in more}


def _send(store: ObjectStore, path: Path, expected: str) -> None:
    """Writes a file, and compares the stored bytes with its checksum from packing."""
    store.write_file(path, path.name)
    found = store.checksum_of(path.name, size=path.stat().st_size)
    if found != expected:
        raise StorageError(
            f"{store.url_of(path.name)} has the checksum {found}, and {CHECKSUMS_NAME} says "
            f"{expected}: unicl-pack verify {path.parent} says whether the file here is damaged; "
            "if it is not, check the store, then upload again"
        )
