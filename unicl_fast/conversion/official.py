"""Reads microsoft/UniCL's checkpoints.

Their image encoder is the original Swin, whose tensors timm renames; texts have our names.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unicl_fast.presets import build_preset

_MODELS = {96: ("Swin-T", "swin-tiny"), 128: ("Swin-B", "swin-base")}
"""Width of the image encoder to the model's name and our preset."""
_PATCHES = "image_encoder.patch_embed.proj.weight"
_WINDOWS = "image_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
_OLD_NAMES = (
    ("module.", ""),  # a model wrapped for several GPUs
    ("visual.", "image_encoder."),
    ("lang_encoder.", "text_encoder."),
    ("text.", "text_encoder."),
    ("vision_projection", "image_projection"),
)
STATISTICS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""The released models use ImageNet's, ours CLIP's."""


def with_present_names(entries: Mapping[str, Tensor], *, source: Path) -> dict[str, Tensor]:
    """Renames entries of older files, such as visual, text and lang_encoder.

    Raises ValueError if `source` is not in this layout, or has an entry by two names.
    """
    renamed: dict[str, Tensor] = {}
    for original, tensor in entries.items():
        name = original
        for old, new in _OLD_NAMES:
            if name.startswith(old):
                name = new + name[len(old) :]
        if name in renamed:
            raise ValueError(f"{source} has {name} twice, by its present and by an older name")
        renamed[name] = tensor
    needed = _PATCHES, "image_projection", "text_projection", "logit_scale"
    if missing := [name for name in needed if name not in renamed]:
        first_words = sorted({name.split(".")[0] for name in renamed})
        raise ValueError(
            f"{source} is not in the layout of microsoft/UniCL: it lacks {missing[0]}; its "
            f"{len(renamed)} entries begin with {', '.join(first_words[:12])}"
        )
    return renamed


def preset_of(entries: Mapping[str, Tensor], *, source: Path) -> str:
    """The preset of the model with a file's entries, by their present names.

    Raises ValueError if it is neither Swin-T nor Swin-B.
    """
    width = entries[_PATCHES].shape[0] if entries[_PATCHES].ndim else 0
    if width not in _MODELS:
        known = " and ".join(f"{one} ({name})" for one, (name, _) in _MODELS.items())
        raise ValueError(f"{source} has an image encoder of width {width}; known are {known}")
    preset = _MODELS[width][1]
    model = build_preset(preset).model
    for entry, expected in {
        _WINDOWS: (13**2, width // 32),  # timm would resize those of others than 7 x 7 patches
        "text_encoder.token_embedding.weight": (model.vocab_size, model.text_width),
        "text_encoder.positional_embedding": (model.context_length, model.text_width),
        "image_projection": (8 * width, model.embed_dim),
        "text_projection": (model.text_width, model.embed_dim),
    }.items():
        if entry in entries and tuple(entries[entry].shape) != expected:
            raise ValueError(
                f"{source}: {entry} has shape {list(entries[entry].shape)}, not {list(expected)} "
                "as in the released models: models of another size are not converted"
            )
    return preset
