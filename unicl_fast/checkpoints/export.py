"""Reads exports: a model without its run, as `config.json` and `model.safetensors`.

The config has the fields that other libraries need and, under `unicl_fast`, our settings of the
model, its objective and its pixels. It has none of the run's, so later versions can read it as long
as they can build the model.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_fast.checkpoints.files import STATE_FILE
from unicl_fast.config import TrainConfig
from unicl_fast.config_json import config_from_dict
from unicl_fast.system.checksums import file_checksum
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.text.file_tokenizer import TOKENIZER_FILES

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
LIBRARY = "unicl_fast"
FORMAT_VERSION = 2
PIXELS = ("image_size", "evaluation_resize", "interpolation", "mean", "std")
"""Fields of `DataConfig` that belong to a model."""
BESIDE = "."
"""The path of a tokenizer that is in the export itself."""


def is_export(path: Path) -> bool:
    """Whether a folder has both files and, unlike a checkpoint, no state."""
    has_both = (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
    return has_both and not (path / STATE_FILE).exists()


def is_own(values: Mapping[str, Any]) -> bool:
    """Whether a config is of an export. Transformers keeps our part when it saves other weights."""
    return LIBRARY in values and "transformers_version" not in values


def read_description(folder: Path) -> Mapping[str, Any]:
    """Reads our part of an export's config; raises ValueError if it is damaged or has none."""
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; convert the model again") from error
    values = values if isinstance(values, dict) else {}
    if not isinstance(ours := values.get(LIBRARY), dict):
        raise ValueError(
            f"{path} is not an export of {LIBRARY} as unicl-convert hf writes it "
            f"(library_name is {values.get('library_name')!r}): other formats are read by their "
            "own libraries, and exports by the version that wrote them"
        )
    if ours.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {ours.get('format_version')!r}, this unicl_fast reads "
            f"{FORMAT_VERSION}: install the version that wrote it, or convert the model again"
        )
    return ours


def read_export(folder: Path) -> tuple[TrainConfig, Path]:
    """Returns an export's config and weights file; raises as `read_description`."""
    ours, weights = read_description(folder), folder / WEIGHTS_FILE
    checksums = ours.get("checksums")
    expected = checksums.get(WEIGHTS_FILE) if isinstance(checksums, dict) else None
    if (found := file_checksum(weights)) != expected:
        raise ValueError(
            f"{weights} is damaged or was replaced: its xxh3 is {found}, {CONFIG_FILE} says "
            f"{expected}; copy the folder again or convert the model again"
        )
    model = ours.get("model")
    if isinstance(model, dict) and str(model.get("tokenizer", "")).startswith(BESIDE):
        model = {**model, "tokenizer": f"{folder.absolute()}{model['tokenizer'][len(BESIDE) :]}"}
    groups = {"model": model, "objective": ours.get("objective")}
    groups |= {"data": ours.get("pixels"), "efficiency": {"precision": ours.get("precision")}}
    try:
        return config_from_dict(groups), weights
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def download_export(repository: str) -> Path:
    """Downloads an export of ours; returns its folder in the cache, raises as `download`.

    Both files are from one commit, even if a new one is pushed meanwhile. Another library's config
    is refused (ValueError) before its weights are downloaded.
    """
    from unicl_fast.system.hub import NotOnHubError, download  # 0.2 s

    config = download(repository, [CONFIG_FILE])
    values = read_json(config)
    if not isinstance(values, dict) or "library_name" not in values:  # transformers has none
        raise ValueError(
            f"hf-hub:{repository} is not a model of unicl_fast, open_clip, timm or transformers: "
            f"its {CONFIG_FILE} names no architecture, model_type or library"
        )
    # the cache has a folder for each commit
    at_commit = f"{repository.partition('@')[0]}@{config.parent.name}"
    ours = values.get(LIBRARY)
    model = ours.get("model") if isinstance(ours, dict) else None
    if isinstance(model, dict) and model.get("tokenizer"):
        for name in TOKENIZER_FILES:
            with contextlib.suppress(NotOnHubError):
                download(at_commit, [name])
    return download(at_commit, [WEIGHTS_FILE]).parent
