"""`unicl-pack build` from and to URLs: sources are staged, the result is uploaded.

A data set that is to lie under a URL is packed in a folder first, and uploaded when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unicl_fast.dataset.manifest import MANIFEST_NAME
from unicl_fast.dataset.remote.object_store import ObjectStore, is_url
from unicl_fast.packing.build.build import BuildSummary, build_dataset
from unicl_fast.packing.build.staging import (
    DEFAULT_STAGING_BYTES,
    packing_folder,
    staged_sources,
    work_folder,
)
from unicl_fast.packing.build.upload import require_free_url, upload_dataset


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
        work: folder for what is staged and packed on its way; empty takes one in the user's cache.
        staging_bytes: most that sources under URLs may take there.
        options: the others of `build_dataset`.

    Raises:
        ValueError: as there, or the sources take more room than is given for them, or would be
            copied where the other machines of a Ray cluster do not see them.
        FileNotFoundError: a source is not there.
        StorageError: a store cannot be reached. A data set that was packed stays, and the message
            says how to go on.
    """
    urls = [*filter(is_url, (*sources, image_root, out))]
    if urls and not work and options.get("engine") == "ray":
        raise ValueError(
            "--engine ray with URLs takes --work FOLDER, on a file system that all machines of the "
            "cluster see under the same path: what is copied, or unpacked, on its way lies there, "
            f"and by default in {work_folder()} of this machine"
        )
    store = ObjectStore(out) if is_url(out) else None
    folder = _packed_folder(out, work)
    if store is not None:
        _require_not_packed(folder, store)
        require_free_url(store, None, store.list_sizes() or {}, names=set())
    with staged_sources(
        sources,
        image_root,
        out=folder,
        place=_work_place(work),
        room=staging_bytes,
    ) as (places, root):
        if any(map(is_url, sources)):
            options["source_names"] = list(sources)
        if store is None:
            return build_dataset(places, out, image_root=root, **options)
        try:
            summary = build_dataset(places, folder, image_root=root, **options)
        except BaseException:
            with contextlib.suppress(OSError):  # it holds finished shards, or is not there
                folder.parent.rmdir()
            raise
        try:
            upload_dataset(folder, store.url, progress=options.get("progress", True))
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"packed, but not uploaded: {error}. Go on with: {_upload(folder, store.url)}"
            ) from error
        shutil.rmtree(folder.parent)
        return dataclasses.replace(summary, out=store.url)


def _packed_folder(out: str, work: str) -> Path:
    """The folder that `build_anywhere` packs: the one asked for, or that of a URL below `work`."""
    return packing_folder(out, _work_place(work)) if is_url(out) else Path(out)


def _work_place(work: str) -> Path:
    return Path(work) if work else work_folder()


def _require_not_packed(folder: Path, store: ObjectStore) -> None:
    """Refuses to pack again what is there; a copy whose upload is complete is removed.

    Raises:
        ValueError: says how to go on.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return
    if store.read_whole(MANIFEST_NAME) != (folder / MANIFEST_NAME).read_bytes():
        raise ValueError(
            f"{folder} holds a data set that was packed for {store.url} and not uploaded: go on "
            f"with {_upload(folder, store.url)}, or remove it"
        )
    shutil.rmtree(folder.parent)  # the manifest comes last, so all of it is there
    raise ValueError(
        f"{store.url} holds the data set that was packed for it already (the copy in {folder} was "
        "still there, and is removed now); name another URL, or remove what lies there"
    )


def _upload(folder: Path, url: str) -> str:
    return f"unicl-pack upload {folder} --out {url}"
