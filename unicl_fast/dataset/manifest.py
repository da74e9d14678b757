"""The manifest of a packed data set: what it holds and how it was made.

A data set is complete when its manifest is there, so this is the first file read and the last one
written. It says nothing about where samples lie; that is the business of `shards`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
"""Of data sets whose shards hold JPEGs and PNGs; of earlier programs also WebPs."""
RAW_FORMAT_VERSION = 2
"""Of data sets whose images are decoded and lie in one array."""
WEBP_FORMAT_VERSION = 3
"""Of data sets whose shards hold a WebP, which readers of version 1 do not expect."""
_KNOWN_VERSIONS = (FORMAT_VERSION, RAW_FORMAT_VERSION, WEBP_FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One tar file of the data set."""

    name: str
    num_samples: int
    num_bytes: int
    xxh3: str
    """XXH3-64 of the whole file, 16 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelsInfo:
    """The array of decoded images of a raw data set."""

    height: int
    """Of every image, and so is the width."""
    width: int
    num_bytes: int
    """Of the whole file, header included."""
    xxh3: str
    """XXH3-64 of the whole file, 16 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a packed data set holds and how it was made. Written last: with it, the set is whole."""

    version: int = FORMAT_VERSION
    num_samples: int
    num_captions: int
    num_tokens: int
    num_labels: int
    """Length of labels.npy: a sample may have several labels, or none."""
    num_quarantined: int
    shards: tuple[ShardInfo, ...]
    tokenizer: str
    vocabulary_hash: str
    context_length: int
    class_names: tuple[str, ...]
    """Display name of each label; empty if the data set has no labels."""
    templates: tuple[str, ...]
    """Prompt templates with one {} each."""
    source: tuple[str, ...]
    seed: int
    tool_version: str
    pixels: PixelsInfo | None = None
    """Where the images are; None (and no field in the file) if they are in the shards."""

    @property
    def num_bytes(self) -> int:
        """Of the shards, and of decoded images."""
        pixels = 0 if self.pixels is None else self.pixels.num_bytes
        return pixels + sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        if self.pixels is None:
            del values["pixels"]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "the manifest") -> Manifest:
        """Reads what `to_json` wrote; `where` names the file in messages."""
        try:
            values = json.loads(text, object_pairs_hook=_refuse_repeated)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON as it should be: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise ValueError(f"{where} is not the manifest of a packed data set (no version in it)")
        version = values["version"]
        if version is True or version not in _KNOWN_VERSIONS:
            raise ValueError(
                f"{where} has format version {_short(version)}, this program reads versions "
                f"{_KNOWN_VERSIONS[0]} to {_KNOWN_VERSIONS[-1]}; pack the data again with this "
                "version's unicl-pack"
            )
        absent = set() if version == RAW_FORMAT_VERSION else {"pixels"}
        manifest: Manifest = _from_values(cls, values, where=where, absent=absent)
        return manifest

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """The manifest of the data set in `folder`."""
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not a packed data set: it has no {MANIFEST_NAME}. "
                "Make one with: unicl-pack build SOURCE... --out DIR"
            )
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        return cls.from_json(text, where=str(path))


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a key come twice, and readers differ in which one counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a field comes twice among {[name for name, _ in pairs]}")
    return values


def _from_values(cls: type[Any], values: Any, *, where: str, absent: Set[str] = frozenset()) -> Any:
    """Builds a manifest class from parsed JSON, refusing what is missing, unknown or mistyped.

    Fields in `absent` must not be there.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in absent}
    if not isinstance(values, dict) or set(values) != set(hints):
        found = _short(sorted(values) if isinstance(values, dict) else values)
        raise ValueError(f"{where}: expected the fields {sorted(hints)}, found {found}")
    arguments = {
        name: _typed(values[name], hint, where=f"{where}: {name}") for name, hint in hints.items()
    }
    return cls(**arguments)


def _typed(value: Any, hint: Any, *, where: str) -> Any:
    """`value` as the type of its field; JSON has no tuples and no classes."""
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(_typed(entry, item, where=where) for entry in value)
    if hint is ShardInfo:
        return _from_values(ShardInfo, value, where=where)
    if hint == PixelsInfo | None:  # where the field is there at all, it says something
        return _from_values(PixelsInfo, value, where=where)
    if typing.get_origin(hint) is tuple or not isinstance(value, hint) or isinstance(value, bool):
        raise ValueError(f"{where} should be {hint}, found {_short(value)}")
    if hint is int and not 0 <= value < 2**63:
        raise ValueError(f"{where} should lie in 0 to 2**63 - 1, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    """A value for a message; what is nested too deep for Python to print is only named."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."
