"""A folder in the layout of the Hugging Face hub: weights, config, preprocessing, model card.

`load_model` takes it (`unicl_fast.checkpoints.export` reads it), and `hf upload NAME FOLDER`
publishes
it as it is: it names no path of the machine that it was trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unicl_fast import __version__
from unicl_fast.checkpoints.export import (
    CONFIG_FILE,
    FORMAT_VERSION,
    LIBRARY,
    WEIGHTS_FILE,
    Preprocessing,
)
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.conversion.model_card import model_card
from unicl_fast.conversion.new_files import new_folder, write_json, write_tensors
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checksums import file_checksum

PREPROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"


def write_export(
    model: UniCL, folder: Path, *, origin: Mapping[str, Any], license: str = ""
) -> None:
    """Writes a model without its run.

    Args:
        model: in fp32.
        folder: a new one.
        origin: where the weights come from, in JSON's types; stands in the config and on the card.
        license: an identifier of the hub, for example apache-2.0; empty leaves it open.

    Raises:
        ValueError: the folder is there already.
        OSError: it cannot be written.
    """
    config = publishable(model.config)
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
                "logit_scale": model.logit_scale.item(),
                "origin": dict(origin),
                "config": finite(config_to_dict(config)),
                "checksums": {WEIGHTS_FILE: file_checksum(aside / WEIGHTS_FILE)},
            },
        )
        write_json(aside / PREPROCESSOR_FILE, Preprocessing.of(config).for_transformers())
        card = model_card(model, origin=origin, license=license)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def publishable(config: TrainConfig) -> TrainConfig:
    """A config without paths and names of data sets, for weights in fp32."""
    augment = tuple(entry for entry in config.data.augment if ":" not in entry)
    data = dataclasses.replace(config.data, train=(), evaluate=(), fraction=(1.0,), augment=augment)
    efficiency = config.efficiency
    if efficiency.precision == "fp64":
        efficiency = dataclasses.replace(efficiency, precision="fp32")
    efficiency = dataclasses.replace(efficiency, activation_checkpointing=False, compile=False)
    checkpoint = dataclasses.replace(config.checkpoint, best="")
    return dataclasses.replace(config, data=data, efficiency=efficiency, checkpoint=checkpoint)


def num_parameters(model: UniCL) -> int:
    """Numbers that are learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


def finite(values: Any) -> Any:
    """A config's values with infinity, which JSON lacks, as a number that bounds nothing."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    return 1e300 if values == float("inf") else values
