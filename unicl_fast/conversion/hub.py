"""A folder in the layout of the Hugging Face hub: weights, config, preprocessing, model card.

`load_model` takes it (`unicl_fast.checkpoints.export` reads it), and `hf upload NAME FOLDER`
publishes it as it is: it names no path of the machine that it was trained on. The card claims
nothing that the program does not know.
"""

from __future__ import annotations

import dataclasses
import json
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
    is_export,
)
from unicl_fast.checkpoints.load import find_model, read_state
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.conversion.checked_output import (
    load_source,
    new_folder,
    num_parameters,
    print_written,
    write_json,
    write_tensors,
)
from unicl_fast.conversion.requests import ToHub
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.checksums import file_checksum

_CARD_FILE = "README.md"


def convert(command: ToHub) -> None:
    """Runs `unicl-convert hf`."""
    model = load_source(command)
    checkpoint = find_model(command.model)
    origin: dict[str, Any] = {}
    if not is_export(checkpoint):  # where the weights come from, as far as it may be published
        step = read_state(checkpoint).step
        seen = step * model.config.run.global_batch_size
        origin = {"steps": step, "samples seen in training": seen}
    write_export(model, command.out, origin=origin, license=command.license)
    print_written(command.out)
    print(f"next: unicl-eval zero-shot --checkpoint {command.out} --data DIR")
    print(
        f"to publish it: say in {command.out / _CARD_FILE} what it was trained on and what it is "
        f"good for{'' if command.license else ', add a license'}; hf upload NAME {command.out}"
    )


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
    config = _publishable(model.config)
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
                "config": _finite(config_to_dict(config)),
                "checksums": {WEIGHTS_FILE: file_checksum(aside / WEIGHTS_FILE)},
            },
        )
        write_json(aside / "preprocessor_config.json", Preprocessing.of(config).for_transformers())
        card = _model_card(model, origin=origin, license=license)
        (aside / _CARD_FILE).write_text(card, encoding="utf-8")


def _publishable(config: TrainConfig) -> TrainConfig:
    """A config without paths and names of data sets, for weights in fp32."""
    augment = tuple(entry for entry in config.data.augment if ":" not in entry)
    replace = dataclasses.replace
    precision = config.efficiency.precision
    return replace(
        config,
        data=replace(config.data, train=(), evaluate=(), fraction=(1.0,), augment=augment),
        efficiency=replace(
            config.efficiency,
            precision="fp32" if precision == "fp64" else precision,
            activation_checkpointing=False,
            compile=False,
        ),
        checkpoint=replace(config.checkpoint, best=""),
    )


def _finite(values: Any) -> Any:
    """A config's values with infinity, which JSON lacks, as a number that bounds nothing."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return 1e300 if values == float("inf") else values


_CARD = """\
---
library_name: {library}
pipeline_tag: zero-shot-image-classification
{license}tags:
- unicl
- clip
- image-text-label
- contrastive-learning
---

# UniCL, {encoder}

An image encoder and a text encoder that meet in one space, trained with unified
contrastive learning in image-text-label space (Yang et al., CVPR 2022, arXiv
2204.03610).

| | |
|---|---|
{rows}

## Preprocessing

RGB; the shorter side scaled to {of.resize} pixels ({of.interpolation}, antialiased);
the central {of.image_size} x {of.image_size}; values in 0 to 1; minus the mean
{of.mean}, divided by the standard deviation {of.std}.
Texts: CLIP's byte-pair encoding, {of.context_length} tokens, padded with 0.

## Use

```python
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from unicl_fast import Tokenizer, load_model

model = load_model("FOLDER")  # where this repository was downloaded to
prepare = transforms.Compose(
    [
        transforms.Resize({of.resize}, InterpolationMode.{interpolation}),
        transforms.CenterCrop({of.image_size}),
        transforms.ToTensor(),
        transforms.Normalize({of.mean}, {of.std}),
    ]
)
with torch.inference_mode():
    images = prepare(Image.open("FILE").convert("RGB")).unsqueeze(0)
    tokens = {tokenizer}(["a photo of a cat", "a photo of a dog"])
    products = model.encode_image(images) @ model.encode_text(tokens).T
    print((model.logit_scale.exp() * products).softmax(dim=-1))
```

Or: `unicl-eval zero-shot --checkpoint FOLDER --data DIR`.

What it was trained on, how good it is and what it should not be used for is not
known to the program that wrote this card: add it before you publish the model.
"""


def _model_card(model: UniCL, *, origin: Mapping[str, Any], license: str) -> str:
    """The README.md of an exported model, which the hub shows."""
    config, of = model.config.model, Preprocessing.of(model.config)
    text = f"{config.text_layers} causal blocks, width {config.text_width}"
    rows = {
        "image encoder": f"{config.image_encoder} (timm)",
        "text encoder": f"{text}, {config.text_heads} heads",
        "dimensions of the common space": config.embed_dim,
        "parameters": f"{num_parameters(model):,}",
        "scale of the logits": f"{model.logit_scale.detach().exp().item():.4g}",
        **origin,
    }

    def in_a_cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return _CARD.format(
        library=LIBRARY,
        license=f"license: {license}\n" if license else "",
        encoder=config.image_encoder,
        rows="\n".join(f"| {key} | {in_a_cell(value)} |" for key, value in rows.items()),
        of=of,
        interpolation=of.interpolation.upper(),
        tokenizer=f"Tokenizer({'' if of.context_length == 77 else of.context_length})",
    )
