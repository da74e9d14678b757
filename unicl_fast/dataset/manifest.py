"""The manifest of a packed data set, written last and read first: its contents and origin."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unicl_fast.system.checked_fields import Checksum, Count, from_json_values
from unicl_fast.system.paths import nearest_name
from unicl_fast.system.untrusted_files import parse_json, read_file
from unicl_fast.system.wording import shorten
from unicl_fast.text.hierarchies import Hierarchy

FORMAT_VERSION = 1  # shards hold JPEGs and PNGs
RAW_FORMAT_VERSION = 2  # images are decoded, in one array
WEBP_FORMAT_VERSION = 3  # shards hold a WebP, which readers of version 1 do not expect
IN_PLACE_FORMAT_VERSION = 4  # images stay in their source files
PPM_FORMAT_VERSION = 5  # shards hold a PPM, an uncompressed image
_KNOWN_VERSIONS = (1, 2, 3, 4, 5)
MANIFEST_NAME = "manifest.json"
QUARANTINE_NAME = "quarantine.csv"
QUARANTINE_COLUMNS = ("source", "name", "kind", "message")
DEFAULT_SHARD_BYTES = 512_000_000
"""A shard is closed before it would grow beyond this: large enough for sequential reads, small
enough to copy and check one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInfo:
    """One tar file of the data set."""

    name: str
    num_samples: Count
    num_bytes: Count
    xxh3: Checksum
    """XXH3-64 of the whole file, by which caches name their copies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelsInfo:
    """The array of decoded images of a raw data set, all of the same size."""

    height: Count
    width: Count
    num_bytes: Count
    """Size of the whole file, header included."""
    xxh3: Checksum


@dataclass(frozen=True, kw_only=True, slots=True)
class InPlaceInfo:
    """The source files with the images of a data set in place."""

    num_files: Count
    num_name_bytes: Count
    """Length of names.npy."""
    num_bytes: Count
    """Bytes of the images in source files."""
    xxh3: Checksum
    """XXH3-64 of all images' checksums in the order of samples, 8 bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of a packed data set and how it was made."""

    version: Count = FORMAT_VERSION
    num_samples: Count
    num_captions: Count
    num_tokens: Count
    num_labels: Count
    """Length of labels.npy: a sample can have several labels, or none."""
    num_weights: Count = 0
    """Length of weights.npy, one a sample; 0 (and no field in the file) without weights."""
    num_quarantined: Count
    shards: tuple[ShardInfo, ...]
    tokenizer: str
    vocabulary_hash: str
    context_length: Count
    class_names: tuple[str, ...]
    """Display name of each label; empty if the data set has no labels."""
    templates: tuple[str, ...]
    """Prompt templates with one {} each."""
    source: tuple[str, ...]
    seed: Count
    tool_version: str
    license: str = ""
    """The license of the data, in the packer's words; if empty, the file has no such field."""
    pixels: PixelsInfo | None = None
    """The array of images; None (and no field in the file) if they are in the shards."""
    in_place: InPlaceInfo | None = None
    """The source files; None (and no field in the file) if the data set holds its own images."""
    hierarchy: Hierarchy | None = None
    """The parents of the classes; None (and no field in the file) if unknown."""
    label_columns: dict[str, tuple[Count, ...]] = dataclasses.field(default_factory=dict)
    """Numbers of the classes that each label column of the sources had; empty (and no field in the
    file) unless there are several."""

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """The classes among which a prediction is made: of each label column, or all as `""`.

        Classes of no column, beside others, are `(no column)`.
        """
        known = set().union(*self.label_columns.values())
        others = tuple(n for n in range(len(self.class_names)) if n not in known)
        rest = {"(no column)" if known else "": others} if others else {}
        return {**self.label_columns, **rest}

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards and of decoded images."""
        pixels = 0 if self.pixels is None else self.pixels.num_bytes
        return pixels + sum(shard.num_bytes for shard in self.shards)

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        for name in ("pixels", "in_place", "hierarchy", "license", "num_weights", "label_columns"):
            if not values[name]:
                del values[name]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "the manifest") -> Manifest:
        """Reads `to_json`'s output; raises ValueError, naming `where`, for anything else."""
        values = parse_json(text, where=where)
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise ValueError(f"{where} is not the manifest of a packed data set (no version in it)")
        version = values["version"]
        if version is True or version not in _KNOWN_VERSIONS:
            raise ValueError(
                f"{where} has format version {shorten(version)}, this program reads versions "
                f"{_KNOWN_VERSIONS[0]} to {_KNOWN_VERSIONS[-1]}; pack the data again with this "
                "version's unicl-pack"
            )
        try:
            manifest = from_json_values(cls, values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        for field, owner in (("pixels", RAW_FORMAT_VERSION), ("in_place", IN_PLACE_FORMAT_VERSION)):
            if (getattr(manifest, field) is None) == (version == owner):
                wanted = "needs the" if version == owner else "has no"
                raise ValueError(f"{where}: format version {version} {wanted} field {field}")
        if manifest.num_weights not in (0, manifest.num_samples):
            raise ValueError(f"{where}: num_weights must be num_samples, or be left out")
        hierarchy, num_classes = manifest.hierarchy, len(manifest.class_names)
        if hierarchy is not None and hierarchy.num_classes != num_classes:
            raise ValueError(
                f"{where}: the hierarchy is of {hierarchy.num_classes} classes, class_names has "
                f"{num_classes}"
            )
        for column, numbers in manifest.label_columns.items():
            if max(numbers, default=0) >= num_classes:
                raise ValueError(
                    f"{where}: label_columns has class {max(numbers)} in {shorten(column)}, "
                    f"class_names has {num_classes}"
                )
        return manifest

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Reads the manifest of the data set in `folder`."""
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a packed data set: {_why(path.parent)}")
        return cls.from_json(read_file(path), where=str(path))


def describe_columns(columns: Mapping[str, Sequence[int]]) -> str:
    """The label columns and the numbers of their classes, in words."""
    return ", ".join(f"{column} {len(numbers):,}" for column, numbers in columns.items())


def _why(folder: Path) -> str:
    """Why a folder without a manifest is no data set, and what to do."""
    if not folder.exists():
        return f"there is no such folder{nearest_name(folder)}"
    if inside := sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_NAME}")):
        return f"it holds some; name {' or '.join(inside[:4])}"
    return f"it has no {MANIFEST_NAME}. Make one with: unicl-pack build SOURCE... --out DIR"


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"
