"""Weights in several safetensors files and the index that lists them, in transformers' format."""

import re
from pathlib import Path

import xxhash
from torch import Tensor

from unicl_fast.checkpoints.load import checksum_read_once, read_shapes, read_stored
from unicl_fast.system.untrusted_files import read_json

INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")


def shards_of(index: Path) -> dict[str, set[str]]:
    """The names of the tensors in each file; raises ValueError for a damaged index."""
    values = read_json(index)
    listed = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index} has no weight_map from tensors to files: copy it again")
    shards: dict[str, set[str]] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or _SHARD.fullmatch(name) is None:
            raise ValueError(
                f"{index} says that {tensor} is in {name!r}: expected the name of a file beside "
                "it, such as model-00001-of-00002.safetensors; copy it again"
            )
        shards.setdefault(name, set()).add(tensor)
    return shards


def read_shard_shapes(index: Path) -> dict[str, Tensor]:
    """All tensors on the device meta, from the headers of the files.

    Raises FileNotFoundError if a file is missing, ValueError if the index is damaged or does not
    list the tensors of a file.
    """
    found: dict[str, Tensor] = {}
    for name, expected in shards_of(index).items():
        path = index.parent / name
        if not path.is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there: copy it too")
        shapes = read_shapes(path)
        if wrong := sorted(shapes.keys() ^ expected):
            raise ValueError(
                f"{path} and {index.name} do not agree on {wrong[0]}: the index must list each "
                "tensor of each file; copy both again"
            )
        found |= shapes
    return found


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors; raises as `read_shard_shapes`, before it reads any."""
    read_shard_shapes(index)
    return {
        name: tensor
        for shard in shards_of(index)
        for name, tensor in read_stored(index.parent / shard).items()
    }


def shards_checksum(index: Path) -> str:
    """The xxh3 of the checksums of all files, the index included."""
    names = [index.name, *sorted(shards_of(index))]
    lines = [f"{checksum_read_once(index.parent / name)}  {name}\n" for name in names]
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())
