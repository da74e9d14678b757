"""Converts microsoft/UniCL's checkpoints to ours.

Their image encoder is the original Swin: downsampling ends a stage, while in timm it begins the
next one, and tables that depend on the window size are stored. Texts have the same names.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.checkpoints.load import build_model
from unicl_fast.conversion.fitting import misfits, phrase
from unicl_fast.conversion.torch_files import read_torch_file
from unicl_fast.models.unicl import UniCL
from unicl_fast.objectives.unicl import UniCLObjective
from unicl_fast.presets import build_preset

_MODELS = {96: ("Swin-T", "swin-tiny"), 128: ("Swin-B", "swin-base")}
"""Width of the image encoder to the model's name and our preset."""
_PATCHES = "image_encoder.patch_embed.proj.weight"
_OLD_NAMES = (
    ("module.", ""),  # a model wrapped for several GPUs
    ("visual.", "image_encoder."),
    ("lang_encoder.", "text_encoder."),
    ("text.", "text_encoder."),
    ("vision_projection", "image_projection"),
)
_TABLES = re.compile(r"\.(attn_mask|relative_position_index)$")
_OTHER_TABLES = "tables of other windows than 7 x 7 patches in images of 224 pixels"
_LAYERS = "image_encoder.layers."
_DOWNSAMPLE = re.compile(rf"^{re.escape(_LAYERS)}(\d+)\.downsample\.")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The released models use ImageNet's statistics, ours CLIP's."""


@torch.no_grad()
def model_of(entries: Mapping[str, Tensor], *, source: Path) -> UniCL:
    """Builds our model with the weights of a released one, in fp32 and evaluation mode.

    Raises ValueError if `source` is no Swin-T or Swin-B in this layout; the error names all entries
    that are missing, left over, or have a wrong shape or content.
    """
    entries = _with_present_names(entries, source=source)
    model = _fresh_model(entries, source=source)
    tensors = official_entries(model)
    faults = misfits(tensors, entries)
    tables = [
        name
        for name, table in tensors.items()
        if _TABLES.search(name)
        and (found := entries.get(name, table)).shape == table.shape
        and not torch.equal(found.to(table.dtype), table)
    ]
    faults += [phrase(_OTHER_TABLES, tables)] if tables else []
    if faults:
        name, _ = _MODELS[tensors[_PATCHES].shape[0]]
        raise ValueError(
            f"{source} is not {name} in the layout of microsoft/UniCL, which has {len(tensors)} "
            f"entries: {'; '.join(faults)}"
        )
    for entry, tensor in tensors.items():
        tensor.copy_(entries[entry])
    return model


def official_entries(model: UniCL) -> dict[str, Tensor]:
    """Maps names in a released file to the tensors of our Swin-T or Swin-B, without copies."""

    def official_name(name: str) -> str:
        return _DOWNSAMPLE.sub(lambda match: f"{_LAYERS}{int(match[1]) - 1}.downsample.", name)

    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {official_name(name): tensor.detach() for name, tensor in tensors}


def _with_present_names(entries: Mapping[str, Tensor], *, source: Path) -> dict[str, Tensor]:
    """Renames entries of older files, such as visual, text and lang_encoder."""
    renamed: dict[str, Tensor] = {}
    for original, tensor in entries.items():
        name = original
        for old, new in _OLD_NAMES:
            if name.startswith(old):
                name = new + name[len(old) :]
        if name in renamed:
            raise ValueError(f"{source} has {name} twice, by its present and by an older name")
        renamed[name] = tensor
    return renamed


def _fresh_model(entries: Mapping[str, Tensor], *, source: Path) -> UniCL:
    """Builds a model of the shapes in a file, after checking them."""
    if _PATCHES not in entries:
        first_words = sorted({name.split(".")[0] for name in entries})
        raise ValueError(
            f"{source} is not in the layout of microsoft/UniCL: it lacks {_PATCHES}; its "
            f"{len(entries)} entries begin with {', '.join(first_words[:12])}"
        )
    width = entries[_PATCHES].shape[0] if entries[_PATCHES].ndim else 0
    if width not in _MODELS:
        known = " and ".join(f"{one} ({name})" for one, (name, _) in _MODELS.items())
        raise ValueError(f"{source} has an image encoder of width {width}; known are {known}")
    preset = build_preset(_MODELS[width][1])
    model = preset.model
    for entry, expected in {
        "text_encoder.token_embedding.weight": (model.vocab_size, model.text_width),
        "text_encoder.positional_embedding": (model.context_length, model.text_width),
        "text_projection": (model.text_width, model.embed_dim),
    }.items():
        if entry in entries and tuple(entries[entry].shape) != expected:
            raise ValueError(
                f"{source}: {entry} has shape {list(entries[entry].shape)}, not {list(expected)} "
                "as in the released models: models of another width are not converted"
            )
    # fp32, as in the published figures. The trained scale must not be clamped; a missing or odd
    # one is reported with the other entries.
    scale = entries.get("logit_scale", torch.zeros([]))
    trained = scale.double().item() if scale.numel() == 1 else 0.0
    trained = trained if math.isfinite(trained) else 0.0
    config = preset.changed(
        data={"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        objective={
            "logit_scale_init": 1.0,
            "logit_scale_max": max(UniCLObjective().logit_scale_max, trained),
        },
        efficiency={"precision": "fp32"},
    )
    return build_model(config).eval()


def read_official_file(path: Path) -> dict[str, Tensor]:
    """Reads the entries of a checkpoint; raises as `read_torch_file`."""
    return read_torch_file(path, expected="a file of microsoft/UniCL, such as in1k.pth")
