"""Writes our own format: a folder in the layout of the Hugging Face hub, without local paths.

It holds weights, config, preprocessing and a model card. `unicl_fast.checkpoints.export` reads it,
and so does transformers if it has such a model (`hugging_face`).
"""

import dataclasses
from math import inf
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
from unicl_fast.conversion.output import new_folder, write_json, write_own_tokenizer, write_tensors
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.objective import NoObjective
from unicl_fast.system.checksums import file_checksum
from unicl_fast.system.version import __version__
from unicl_fast.text.file_tokenizer import CANONICAL

_OF_TRAINING = (*INITIAL_WEIGHTS, "drop_path")
"""Fields of `ModelConfig` that a trained model does not have."""


def write_export(
    model: UniCL,
    folder: Path,
    *,
    facts: Facts = Facts(),  # noqa: B008  (it cannot change)
    license: str = "",
) -> float | None:
    """Writes a model in fp32 and evaluation mode, without its run, into a new folder.

    The card shows the facts and a license by the hub's identifier (empty for none). Returns the
    largest difference between coordinates of transformers' features and ours; None if transformers
    has no such model or is not installed.

    Raises:
        ValueError: the folder exists, or it is an image encoder by itself.
        RuntimeError: transformers gives other features.
        OSError: it cannot be written.
    """
    if isinstance(model.config.objective, NoObjective):
        raise ValueError(
            f"{model.config.model.image_encoder} is an image encoder by itself, and this layout "
            "keeps an objective too: convert it to timm or onnx instead"
        )
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
        if layout in ("clip", "vision-text-dual-encoder") and not model.config.model.tokenizer:
            hugging_face.write_tokenizer(aside, context_length=model.config.model.context_length)
        name = f"OWNER/{folder.absolute().name}"
        card = model_card(model, facts, layout=layout, name=name, license=license)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if layout == "unicl" or not hugging_face.is_installed():
            return None
        return hugging_face.difference_in_transformers(model, aside)


def _settings(model: UniCL) -> dict[str, Any]:
    """Our own settings of a model, of its objective and of its pixels."""
    config = model.config
    architecture, data = dataclasses.asdict(config.model), dataclasses.asdict(config.data)
    objective = dataclasses.asdict(config.objective)
    if place := config.model.tokenizer:
        architecture["tokenizer"] = BESIDE + CANONICAL * place.endswith(CANONICAL)
    return {
        "version": __version__,
        "format_version": FORMAT_VERSION,
        "model": {key: one for key, one in architecture.items() if key not in _OF_TRAINING},
        # JSON lacks infinity: a number so large that it bounds nothing replaces it
        "objective": {name: 1e300 if one == inf else one for name, one in objective.items()},
        "pixels": {name: data[name] for name in PIXELS},
        "precision": config.efficiency.precision.replace("fp64", "fp32"),
    }
