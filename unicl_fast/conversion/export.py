"""Writes our own format: a folder in the layout of the Hugging Face hub, without local paths.

It holds weights, config, preprocessing and a model card. `unicl_fast.checkpoints.export` reads it,
and `unicl-convert hf --push` publishes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from unicl_fast.checkpoints.export import CONFIG_FILE, FORMAT_VERSION, LIBRARY, WEIGHTS_FILE
from unicl_fast.config import INITIAL_WEIGHTS, TrainConfig, config_to_dict
from unicl_fast.conversion import preprocessing
from unicl_fast.conversion.card import Facts, model_card
from unicl_fast.conversion.output import (
    logits_of,
    new_folder,
    num_parameters,
    write_json,
    write_tensors,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checksums import file_checksum
from unicl_fast.system.version import __version__

_CARD_FILE = "README.md"
_NOT_PUBLISHED = {
    "data": ("train", "evaluate", "fraction", "cache_folder"),
    "model": INITIAL_WEIGHTS,
    "efficiency": ("activation_checkpointing", "compile", "image_features"),
    "checkpoint": ("best",),
}
"""Settings that are reset to defaults: they name files or data sets, or only matter in training."""


def write_export(
    model: UniCL,
    folder: Path,
    *,
    facts: Facts = Facts(),  # noqa: B008  (it cannot change)
    name: str = "FOLDER",
    license: str = "",
) -> None:
    """Writes a model without its run into a new folder.

    Args:
        model: in fp32.
        folder: must not exist, or be empty.
        facts: are stored in the config and shown on the card.
        name: what users of the card pass to `load_model`.
        license: the hub's identifier, for example apache-2.0; empty for none.

    Raises:
        ValueError: the folder exists.
        OSError: it cannot be written.
    """
    config = _published(model.config)
    with new_folder(folder) as aside:
        write_tensors(aside / WEIGHTS_FILE, model.state_dict())
        write_json(
            aside / CONFIG_FILE,
            {
                "library_name": LIBRARY,
                "library_version": __version__,
                "format_version": FORMAT_VERSION,
                "model_type": "unicl",
                "architectures": ["UniCL"],
                "num_parameters": num_parameters(model),
                **logits_of(model),
                "facts": facts._asdict(),
                "config": _finite(config_to_dict(config)),
                "checksums": {WEIGHTS_FILE: file_checksum(aside / WEIGHTS_FILE)},
            },
        )
        images = preprocessing.for_transformers(config.data)
        write_json(aside / "preprocessor_config.json", images)
        card = model_card(model, facts, name=name, license=license)
        (aside / _CARD_FILE).write_text(card, encoding="utf-8")


def _published(config: TrainConfig) -> TrainConfig:
    """Removes paths and names of data sets from a config, for weights in fp32."""
    defaults, replace = TrainConfig(), dataclasses.replace
    for group, names in _NOT_PUBLISHED.items():
        values = {name: getattr(getattr(defaults, group), name) for name in names}
        config = replace(config, **{group: replace(getattr(config, group), **values)})
    augment = tuple(entry for entry in config.data.augment if ":" not in entry)  # for all data sets
    precision = config.efficiency.precision.replace("fp64", "fp32")
    return replace(
        config,
        data=replace(config.data, augment=augment),
        efficiency=replace(config.efficiency, precision=precision),
    )


def _finite(values: Any) -> Any:
    """Replaces infinity, which JSON lacks, by a number so large that it bounds nothing."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return 1e300 if values == float("inf") else values
