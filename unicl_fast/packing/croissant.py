"""Describes a packed data set in Croissant, the metadata that hubs and data searches read.

croissant.json beside this file has all that is the same for every data set.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from unicl_fast.dataset.manifest import Manifest
from unicl_fast.system.atomic_files import write_text_atomically
from unicl_fast.system.checksums import file_checksum
from unicl_fast.system.untrusted_files import open_file

CROISSANT_NAME = "croissant.json"


def write_croissant(folder: Path, *, url: str = "", description: str = "") -> Path:
    """Writes croissant.json beside the manifest.

    Args:
        folder: a packed data set.
        url: address of its folder; without it shards have paths from the folder.
        description: by default the numbers of images and captions.

    Raises:
        FileNotFoundError: no data set, or a shard is missing.
        ValueError: a shard is not as it was packed.
    """
    manifest = Manifest.load(folder)
    contents = f"images: {manifest.num_samples:,}, captions: {manifest.num_captions:,}"
    about = {"name": folder.resolve().name, "description": description or contents,
             "url": url, "license": manifest.license}  # fmt: skip
    values: dict[str, Any] = json.loads(Path(__file__).with_name(CROISSANT_NAME).read_bytes())
    sets, (texts, images, classes) = values["distribution"], values["recordSet"]
    if manifest.pixels is not None or manifest.in_place is not None:  # images are in no tar
        sets, images = sets[:1], None
    rows = enumerate(manifest.class_names)
    classes["data"] = [{"classes/label": label, "classes/name": title} for label, title in rows]
    values["recordSet"] = [one for one in (texts, images, classes["data"] and classes) if one]
    shards = []
    for shard in manifest.shards:
        path = folder / shard.name
        if (found := file_checksum(path)) != shard.xxh3:  # SHA-256 must not vouch for damage
            raise ValueError(f"{path}: its checksum is {found}, the manifest says {shard.xxh3}")
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append({
            "@type": "cr:FileObject", "@id": shard.name, "name": shard.name, "sha256": digest,
            "contentUrl": f"{url.rstrip('/')}/{shard.name}" if url else shard.name,
            "contentSize": f"{shard.num_bytes} B", "encodingFormat": "application/x-tar",
        })  # fmt: skip
    for one in sets:
        one["containedIn"] = [{"@id": shard.name} for shard in manifest.shards]
    values |= about | {"distribution": [*shards, *sets]}
    values = {key: value for key, value in values.items() if value}
    write_text_atomically(folder / CROISSANT_NAME, json.dumps(values, indent=1) + "\n")
    return folder / CROISSANT_NAME
