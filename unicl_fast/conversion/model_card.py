"""The text that the Hugging Face hub shows of a model: what it is and how it is used.

It claims nothing that the program does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from unicl_fast.checkpoints.export import LIBRARY, Preprocessing
from unicl_fast.models.unicl import UniCL

_TAGS = ("unicl", "clip", "image-text-label", "contrastive-learning")


def model_card(model: UniCL, *, origin: Mapping[str, Any], license: str) -> str:
    """The README.md of an exported model.

    Args:
        model: that is exported.
        origin: more rows of its table, in JSON's types.
        license: an identifier of the hub; empty names none.
    """
    return "\n".join(
        [
            *_front_matter(license),
            *_description(model, origin),
            *_preprocessing(Preprocessing.of(model.config)),
            *_use(Preprocessing.of(model.config)),
            "What it was trained on, how good it is and what it should not be used for is not",
            "known to the program that wrote this card: add it before you publish the model.",
            "",
        ]
    )


def _front_matter(license: str) -> list[str]:
    return [
        "---",
        f"library_name: {LIBRARY}",
        "pipeline_tag: zero-shot-image-classification",
        *([f"license: {license}"] if license else []),
        "tags:",
        *(f"- {tag}" for tag in _TAGS),
        "---",
        "",
    ]


def _description(model: UniCL, origin: Mapping[str, Any]) -> list[str]:
    config = model.config.model
    text = f"{config.text_layers} causal blocks, width {config.text_width}"
    rows = {
        "image encoder": f"{config.image_encoder} (timm)",
        "text encoder": f"{text}, {config.text_heads} heads",
        "dimensions of the common space": config.embed_dim,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "scale of the logits": f"{model.logit_scale.detach().exp().item():.4g}",
        **origin,
    }
    return [
        f"# UniCL, {config.image_encoder}",
        "",
        "An image encoder and a text encoder that meet in one space, trained with unified",
        "contrastive learning in image-text-label space (Yang et al., CVPR 2022, arXiv",
        "2204.03610).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_in_a_cell(value)} |" for key, value in rows.items()),
        "",
    ]


def _preprocessing(of: Preprocessing) -> list[str]:
    return [
        "## Preprocessing",
        "",
        f"RGB; the shorter side scaled to {of.resize} pixels ({of.interpolation}, antialiased);",
        f"the central {of.image_size} x {of.image_size}; values in 0 to 1; minus the mean",
        f"{of.mean}, divided by the standard deviation {of.std}.",
        f"Texts: CLIP's byte-pair encoding, {of.context_length} tokens, padded with 0.",
        "",
    ]


def _use(of: Preprocessing) -> list[str]:
    tokenizer = "Tokenizer()" if of.context_length == 77 else f"Tokenizer({of.context_length})"
    return [
        "## Use",
        "",
        "```python",
        "import torch",
        "from PIL import Image",
        "from torchvision import transforms",
        "from torchvision.transforms import InterpolationMode",
        "from unicl_fast import Tokenizer, load_model",
        "",
        'model = load_model("FOLDER")  # where this repository was downloaded to',
        "prepare = transforms.Compose(",
        "    [",
        f"        transforms.Resize({of.resize}, InterpolationMode.{of.interpolation.upper()}),",
        f"        transforms.CenterCrop({of.image_size}),",
        "        transforms.ToTensor(),",
        f"        transforms.Normalize({of.mean}, {of.std}),",
        "    ]",
        ")",
        "with torch.inference_mode():",
        '    images = prepare(Image.open("FILE").convert("RGB")).unsqueeze(0)',
        f'    tokens = {tokenizer}(["a photo of a cat", "a photo of a dog"])',
        "    products = model.encode_image(images) @ model.encode_text(tokens).T",
        "    print((model.logit_scale.exp() * products).softmax(dim=-1))",
        "```",
        "",
        "Or: `unicl-eval zero-shot --checkpoint FOLDER --data DIR`.",
        "",
    ]


def _in_a_cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
