"""Reads exports: a model without its run, as `config.json` and `model.safetensors`.

`unicl_fast.conversion.export` writes them, in the layout of the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path

from unicl_fast.checkpoints.files import STATE_FILE
from unicl_fast.config import TrainConfig, config_from_dict
from unicl_fast.system.checksums import file_checksum

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LIBRARY = "unicl_fast"
FORMAT_VERSION = 1


def is_export(path: Path) -> bool:
    """Whether a folder has both files and, unlike a checkpoint, no state."""
    has_both = (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
    return has_both and not (path / STATE_FILE).exists()


def read_export(folder: Path) -> tuple[TrainConfig, Path]:
    """Returns an export's config and weights file; raises ValueError if it is none or damaged."""
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; convert the model again") from error
    library = values.get("library_name") if isinstance(values, dict) else None
    if library != LIBRARY:
        raise ValueError(
            f"{path}: expected library_name {LIBRARY}, as unicl-convert hf and official write it, "
            f"not {library!r}; what other formats hold is read by their own libraries"
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {values.get('format_version')!r}, this unicl_fast reads "
            f"{FORMAT_VERSION}: install the version that wrote it, or convert the model again"
        )
    checksums = values.get("checksums")
    expected = checksums.get(WEIGHTS_FILE) if isinstance(checksums, dict) else None
    weights = folder / WEIGHTS_FILE
    if (found := file_checksum(weights)) != expected:
        raise ValueError(
            f"{weights} is damaged or was exchanged: its xxh3 is {found}, {CONFIG_FILE} says "
            f"{expected}; copy the folder again or convert the model again"
        )
    try:
        return config_from_dict(values.get("config")), weights
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
