"""The layout of microsoft/UniCL's released checkpoints, to ours and back.

Their image encoder is Swin as its authors wrote it: a stage ENDS with its downsampling, where
timm's next stage begins with it, and the tables that follow from the window size are stored as
entries. Their text encoder has the names of ours. `official_entries` gives a model's own tensors
by the names they have there: reading copies into them, writing takes them out, and both know the
same names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.config import TrainConfig
from unicl_fast.models.unicl import UniCL
from unicl_fast.presets import build_preset

_PRESETS_BY_WIDTH = {96: "swin-tiny", 128: "swin-base"}
_NAMES = {"swin-tiny": "Swin-T", "swin-base": "Swin-B"}
_PATCHES = "image_encoder.patch_embed.proj.weight"
_OLD_NAMES = (
    ("module.", ""),  # of a model wrapped for several GPUs
    ("visual.", "image_encoder."),
    ("lang_encoder.", "text_encoder."),
    ("text.", "text_encoder."),
)
_TABLES = re.compile(r"\.(attn_mask|relative_position_index)$")
_DOWNSAMPLE = re.compile(r"^image_encoder\.layers\.(\d+)\.downsample\.")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""What the released models see: ImageNet's statistics, not CLIP's, which ours are trained with."""


@torch.no_grad()
def model_of(entries: Mapping[str, Tensor], *, source: Path) -> UniCL:
    """Our model with the weights of a released one, in evaluation mode, fp32.

    Its config is the preset's with the images prepared as the released models want them.

    Args:
        entries: name -> tensor, as in the file.
        source: the file, for errors.

    Raises:
        ValueError: no Swin-T or Swin-B in this layout; entries that are missing, left over, of
            another shape or content are all named.
    """
    entries = _with_present_names(entries, source=source)
    config = _config_of(entries, source=source)
    model = UniCL(config).eval()
    places = official_entries(model)
    name = _NAMES[_PRESETS_BY_WIDTH[places[_PATCHES].shape[0]]]
    faults = _faults(entries, places)
    if faults:
        raise ValueError(
            f"{source} is not {name} in the layout of microsoft/UniCL, which has {len(places)} "
            f"entries: {'; '.join(faults)}"
        )
    for entry, place in places.items():
        place.copy_(entries[entry])
    return model


def official_entries(model: UniCL) -> dict[str, Tensor]:
    """The model's own tensors (no copies) by their names in a released file.

    Raises:
        ValueError: its image encoder is not one of theirs.
    """
    name = model.config.model.image_encoder
    known = [build_preset(preset).model.image_encoder for preset in _NAMES]
    if name not in known:
        raise ValueError(
            f"microsoft/UniCL's files hold {' or '.join(known)}, this model's image encoder is "
            f"{name}: convert it to open_clip, hf or onnx"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {_official_name(name): tensor.detach() for name, tensor in tensors}


def num_parameters(entries: Mapping[str, Tensor]) -> int:
    """Numbers that are learnt: the tables of Swin's windows do not count."""
    return sum(tensor.numel() for name, tensor in entries.items() if not _TABLES.search(name))


def _official_name(name: str) -> str:
    return _DOWNSAMPLE.sub(
        lambda match: f"image_encoder.layers.{int(match.group(1)) - 1}.downsample.", name
    )


def _with_present_names(entries: Mapping[str, Tensor], *, source: Path) -> dict[str, Tensor]:
    """Older files say visual, text or lang_encoder, and vision_projection."""
    renamed: dict[str, Tensor] = {}
    for original, tensor in entries.items():
        name = original
        for old, new in _OLD_NAMES:
            if name.startswith(old):
                name = new + name[len(old) :]
        if name == "vision_projection":
            name = "image_projection"
        if name in renamed:
            raise ValueError(f"{source} has {name} twice, under its present and an older name")
        renamed[name] = tensor
    return renamed


def _config_of(entries: Mapping[str, Tensor], *, source: Path) -> TrainConfig:
    """The preset that a file is of, told by the widths in it, before a model is built."""
    if _PATCHES not in entries:
        raise ValueError(
            f"{source} is not in the layout of microsoft/UniCL: it lacks {_PATCHES}; its "
            f"{len(entries)} entries begin with {', '.join(sorted(_first_words(entries))[:12])}"
        )
    width = entries[_PATCHES].shape[0] if entries[_PATCHES].ndim else 0
    if width not in _PRESETS_BY_WIDTH:
        raise ValueError(
            f"{source} has an image encoder of width {width}; known are "
            + " and ".join(f"{w} ({_NAMES[name]})" for w, name in _PRESETS_BY_WIDTH.items())
        )
    preset = build_preset(_PRESETS_BY_WIDTH[width])
    text = preset.model
    for entry, expected in {
        "text_encoder.token_embedding.weight": (text.vocab_size, text.text_width),
        "text_encoder.positional_embedding": (text.context_length, text.text_width),
        "text_projection": (text.text_width, text.embed_dim),
    }.items():
        if entry in entries and tuple(entries[entry].shape) != expected:
            raise ValueError(
                f"{source}: {entry} has shape {list(entries[entry].shape)}, that of the released "
                f"models has {list(expected)}: models of another width are not converted"
            )
    return _released(preset, logit_scale=_scalar(entries.get("logit_scale")))


def _released(preset: TrainConfig, *, logit_scale: float) -> TrainConfig:
    data = dataclasses.replace(preset.data, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    # fp32, since figures were published for it; not clamped below what was learnt
    efficiency = dataclasses.replace(preset.efficiency, precision="fp32")
    model = dataclasses.replace(
        preset.model,
        logit_scale_init=1.0,
        logit_scale_max=max(preset.model.logit_scale_max, logit_scale),
    )
    return dataclasses.replace(preset, data=data, model=model, efficiency=efficiency)


def _scalar(tensor: Tensor | None) -> float:
    """A missing or odd one is found with the other entries."""
    value = float(tensor.double().item()) if tensor is not None and tensor.numel() == 1 else 0.0
    return value if math.isfinite(value) else 0.0


def _faults(entries: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> list[str]:
    """What keeps entries from their places, all names included; empty where nothing does."""
    both = [name for name in places if name in entries]
    alike = [name for name in both if entries[name].shape == places[name].shape]
    kinds = {
        "missing": [name for name in places if name not in entries],
        "left over": [name for name in entries if name not in places],
        "of another shape": [
            f"{name} {list(entries[name].shape)} instead of {list(places[name].shape)}"
            for name in both
            if entries[name].shape != places[name].shape
        ],
        "not finite numbers": [
            name
            for name in alike
            if not _TABLES.search(name)
            and not (entries[name].is_floating_point() and bool(entries[name].isfinite().all()))
        ],
        "tables of other windows than 7 x 7 patches in images of 224 pixels": [
            name
            for name in alike
            if _TABLES.search(name)
            and not torch.equal(entries[name].to(places[name].dtype), places[name])
        ],
    }
    return [f"{kind}: {', '.join(names)} ({len(names)})" for kind, names in kinds.items() if names]


def _first_words(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}
