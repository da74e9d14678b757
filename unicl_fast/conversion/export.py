"""Writes our own format: a folder in the layout of the Hugging Face hub, without local paths.

It holds weights, config, preprocessing and a model card. `unicl_fast.checkpoints.export` reads it,
transformers does where it has such a model (`hugging_face`), and `unicl-convert hf --push`
publishes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from unicl_fast.checkpoints.export import (
    BESIDE,
    CONFIG_FILE,
    FORMAT_VERSION,
    LIBRARY,
    PIXELS,
    WEIGHTS_FILE,
)
from unicl_fast.checkpoints.transformers_names import to_transformers
from unicl_fast.config import INITIAL_WEIGHTS
from unicl_fast.conversion import hugging_face, preprocessing
from unicl_fast.conversion.card import Facts, model_card
from unicl_fast.conversion.output import (
    new_folder,
    write_json,
    write_own_tokenizer,
    write_tensors,
)
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checksums import file_checksum
from unicl_fast.system.version import __version__
from unicl_fast.text.file_tokenizer import CANONICAL

_CARD_FILE = "README.md"
_OF_TRAINING = (*INITIAL_WEIGHTS, "drop_path", "token_drop")
"""Fields of `ModelConfig` that a trained model does not have."""


def write_export(
    model: UniCL,
    folder: Path,
    *,
    facts: Facts = Facts(),  # noqa: B008  (it cannot change)
    name: str = "FOLDER",
    license: str = "",
) -> float | None:
    """Writes a model without its run into a new folder.

    Args:
        model: in fp32 and evaluation mode.
        folder: must not exist, or be empty.
        facts: are stored in the config and shown on the card.
        name: what users of the card pass to `load_model`.
        license: the hub's identifier, for example apache-2.0; empty for none.

    Returns:
        The largest difference between coordinates of transformers' features and ours; None where
        transformers has no such model or is not installed.

    Raises:
        ValueError: the folder exists.
        RuntimeError: transformers gives other features.
        OSError: it cannot be written.
    """
    layout = hugging_face.layout_of(model)
    tensors = model.state_dict()
    if layout != "unicl":
        tensors = to_transformers(tensors, layout=layout)
    with new_folder(folder) as aside:
        write_tensors(aside / WEIGHTS_FILE, tensors)
        described = hugging_face.settings_for_transformers(model, layout)
        described |= {"library_name": LIBRARY, LIBRARY: _settings(model)}
        described[LIBRARY] |= {
            "facts": facts._asdict(),
            "checksums": {WEIGHTS_FILE: file_checksum(aside / WEIGHTS_FILE)},
        }
        write_json(aside / CONFIG_FILE, described)
        if (images := preprocessing.for_transformers(model.config.data)) is not None:
            write_json(aside / "preprocessor_config.json", images)
        write_own_tokenizer(model, aside)
        if layout in hugging_face.OF_CLIPS_TOKENS and not model.config.model.tokenizer:
            hugging_face.write_tokenizer(aside, context_length=model.config.model.context_length)
        card = model_card(model, facts, layout=layout, name=name, license=license)
        (aside / _CARD_FILE).write_text(card, encoding="utf-8")
        if layout == "unicl" or not hugging_face.is_installed():
            return None
        return hugging_face.difference_in_transformers(model, aside)


def _settings(model: UniCL) -> dict[str, Any]:
    """Our own settings of a model, of its objective and of its pixels."""
    config = model.config
    architecture = dataclasses.asdict(config.model)
    data = dataclasses.asdict(config.data)
    if place := config.model.tokenizer:
        architecture["tokenizer"] = BESIDE + CANONICAL * place.endswith(CANONICAL)
    return {
        "version": __version__,
        "format_version": FORMAT_VERSION,
        "model": {key: one for key, one in architecture.items() if key not in _OF_TRAINING},
        "objective": _finite(dataclasses.asdict(config.objective)),
        "pixels": {name: data[name] for name in PIXELS},
        "precision": config.efficiency.precision.replace("fp64", "fp32"),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces infinity, which JSON lacks, by a number so large that it bounds nothing."""
    return {name: 1e300 if one == float("inf") else one for name, one in values.items()}
