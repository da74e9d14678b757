"""`unicl-pack build` from and to URLs: sources are staged, the result is uploaded.

A data set that is to lie under a URL is packed in a folder first, and uploaded when it is whole.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from unicl_fast.remote.object_store import ObjectStore, is_url
from unicl_fast.shards import MANIFEST_NAME
from unicl_fast.tools.build_dataset import BuildSummary, build_dataset
from unicl_fast.tools.staging import DEFAULT_STAGING_BYTES, staged_sources, work_folder
from unicl_fast.tools.upload_dataset import require_free_url, upload_dataset


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
        ValueError: as there, or the sources take more room than is given for them.
        FileNotFoundError: a source is not there.
        StorageError: a store cannot be reached. A data set that was packed stays, and the message
            says how to go on.
    """
    place = Path(work) if work else work_folder()
    folder = Path(out)
    if is_url(out):
        store = ObjectStore(out)
        folder = place / xxhash.xxh3_64_hexdigest(store.url.encode()) / store.name
    with staged_sources(
        sources,
        image_root,
        out=folder,
        place=place,
        room=staging_bytes,
    ) as (places, root):
        if any(map(is_url, sources)):
            options["source_names"] = list(sources)
        if not is_url(out):
            return build_dataset(places, out, image_root=root, **options)
        if (folder / MANIFEST_NAME).is_file():
            raise ValueError(
                f"{folder} holds a data set that was packed for {store.url} and not uploaded: go "
                f"on with unicl-pack upload {folder} --out {store.url}, or remove it"
            )
        require_free_url(store, None, store.list_sizes() or {}, names=set())
        summary = build_dataset(places, folder, image_root=root, **options)
        try:
            upload_dataset(folder, store.url, progress=options.get("progress", True))
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"packed, but not uploaded: {error}. Go on with: unicl-pack upload {folder} --out "
                f"{store.url}"
            ) from error
        shutil.rmtree(folder.parent)
        return dataclasses.replace(summary, out=store.url)
