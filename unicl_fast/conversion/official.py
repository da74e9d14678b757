"""microsoft/UniCL's released checkpoints, to ours and back: their layout, and their files.

Their image encoder is Swin as its authors wrote it: a stage ENDS with its downsampling, where
timm's next stage begins with it, and the tables that follow from the window size are stored as
entries. Their text encoder has the names of ours. `official_entries` gives a model's own tensors
by the names they have there: reading copies into them, writing takes them out, and both know the
same names.

This is the one place of the project that touches a pickle, since those checkpoints exist in no
other form. torch reads them by a machine of its own that knows tensors and containers and calls
nothing else (`weights_only`); the files that are written hold tensors alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from unicl_fast.config import TrainConfig
from unicl_fast.models.unicl import UniCL
from unicl_fast.presets import build_preset

_MODELS = {96: ("Swin-T", "swin-tiny"), 128: ("Swin-B", "swin-base")}
"""By the encoder's width: the model's name, and our preset of it."""
_PATCHES = "image_encoder.patch_embed.proj.weight"
_OLD_NAMES = (
    ("module.", ""),  # of a model wrapped for several GPUs
    ("visual.", "image_encoder."),
    ("lang_encoder.", "text_encoder."),
    ("text.", "text_encoder."),
    ("vision_projection", "image_projection"),
)
_TABLES = re.compile(r"\.(attn_mask|relative_position_index)$")
_DOWNSAMPLE = re.compile(r"^image_encoder\.layers\.(\d+)\.downsample\.")
# torch says it in two ways: of modules that it knows as dangerous (os.system), and of all others
_FOREIGN_OBJECT = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_NEW_PROTOCOL = "Unsupported operand 149"
"""The operation FRAME, with which pickles of protocols 4 and 5 begin."""
_TORCH_ADVICE = re.compile(r"^Weights only load failed.*WeightsUnpickler error:", re.DOTALL)
_ZIP = b"PK\x03\x04"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""The released models take ImageNet's statistics, not CLIP's, which ours are trained with."""


@torch.no_grad()
def model_of(entries: Mapping[str, Tensor], *, source: Path) -> UniCL:
    """Our model with the weights of a released one, in evaluation mode, fp32.

    Its config is the preset's with the images prepared as the released models want them. `source`
    is the file, for errors.

    Raises:
        ValueError: no Swin-T or Swin-B in this layout; entries that are missing, left over, of
            another shape or content are all named.
    """
    entries = _with_present_names(entries, source=source)
    model = UniCL(_config_of(entries, source=source)).eval()
    tensors = official_entries(model)
    if faults := _faults(entries, tensors):
        name, _ = _MODELS[tensors[_PATCHES].shape[0]]
        raise ValueError(
            f"{source} is not {name} in the layout of microsoft/UniCL, which has {len(tensors)} "
            f"entries: {'; '.join(faults)}"
        )
    for entry, tensor in tensors.items():
        tensor.copy_(entries[entry])
    return model


def official_entries(model: UniCL) -> dict[str, Tensor]:
    """The model's own tensors (no copies) by their names in a released file.

    Raises:
        ValueError: its image encoder is not one of theirs.
    """
    name = model.config.model.image_encoder
    known = [build_preset(preset).model.image_encoder for _, preset in _MODELS.values()]
    if name not in known:
        raise ValueError(
            f"microsoft/UniCL's files hold {' or '.join(known)}, this model's image encoder is "
            f"{name}: convert it to open_clip, hf or onnx"
        )

    def official_name(name: str) -> str:
        return _DOWNSAMPLE.sub(
            lambda match: f"image_encoder.layers.{int(match[1]) - 1}.downsample.", name
        )

    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {official_name(name): tensor.detach() for name, tensor in tensors}


def num_parameters(entries: Mapping[str, Tensor]) -> int:
    """Number of trained parameters: the tables of Swin's windows do not count."""
    return sum(tensor.numel() for name, tensor in entries.items() if not _TABLES.search(name))


def _with_present_names(entries: Mapping[str, Tensor], *, source: Path) -> dict[str, Tensor]:
    """The entries under present names: older files say visual, text, lang_encoder and so on."""
    renamed: dict[str, Tensor] = {}
    for original, tensor in entries.items():
        name = original
        for old, new in _OLD_NAMES:
            if name.startswith(old):
                name = new + name[len(old) :]
        if name in renamed:
            raise ValueError(f"{source} has {name} twice, under its present and an older name")
        renamed[name] = tensor
    return renamed


def _config_of(entries: Mapping[str, Tensor], *, source: Path) -> TrainConfig:
    """The config of a file's model, found by the widths in it, before a model is built."""
    if _PATCHES not in entries:
        first_words = sorted({name.split(".")[0] for name in entries})
        raise ValueError(
            f"{source} is not in the layout of microsoft/UniCL: it lacks {_PATCHES}; its "
            f"{len(entries)} entries begin with {', '.join(first_words[:12])}"
        )
    width = entries[_PATCHES].shape[0] if entries[_PATCHES].ndim else 0
    if width not in _MODELS:
        raise ValueError(
            f"{source} has an image encoder of width {width}; known are "
            + " and ".join(f"{known} ({name})" for known, (name, _) in _MODELS.items())
        )
    preset = build_preset(_MODELS[width][1])
    model = preset.model
    for entry, expected in {
        "text_encoder.token_embedding.weight": (model.vocab_size, model.text_width),
        "text_encoder.positional_embedding": (model.context_length, model.text_width),
        "text_projection": (model.text_width, model.embed_dim),
    }.items():
        if entry in entries and tuple(entries[entry].shape) != expected:
            raise ValueError(
                f"{source}: {entry} has shape {list(entries[entry].shape)}, that of the released "
                f"models has {list(expected)}: models of another width are not converted"
            )
    # fp32, since figures were published for it; not clamped below the trained scale, of which a
    # missing or odd one is found with the other entries
    scale = entries.get("logit_scale", torch.zeros([]))
    trained = scale.double().item() if scale.numel() == 1 else 0.0
    trained = trained if math.isfinite(trained) else 0.0
    return dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        model=dataclasses.replace(
            model, logit_scale_init=1.0, logit_scale_max=max(model.logit_scale_max, trained)
        ),
        efficiency=dataclasses.replace(preset.efficiency, precision="fp32"),
    )


def _faults(entries: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Reasons why entries do not fit the model, all names included; empty where all fit."""
    missing = [name for name in tensors if name not in entries]
    left_over = [name for name in entries if name not in tensors]
    shapes, not_finite, tables = [], [], []
    for name, tensor in tensors.items():
        entry = entries.get(name, tensor)  # missing ones are named already
        if entry.shape != tensor.shape:
            shapes.append(f"{name} {list(entry.shape)} instead of {list(tensor.shape)}")
        elif _TABLES.search(name):
            if not torch.equal(entry.to(tensor.dtype), tensor):
                tables.append(name)
        elif not (entry.is_floating_point() and bool(entry.isfinite().all())):
            not_finite.append(name)
    kinds = {
        "missing": missing,
        "left over": left_over,
        "of another shape": shapes,
        "not finite numbers": not_finite,
        "tables of other windows than 7 x 7 patches in images of 224 pixels": tables,
    }
    return [f"{kind}: {', '.join(names)} ({len(names)})" for kind, names in kinds.items() if names]


def read_official_file(path: Path) -> dict[str, Tensor]:
    """The entries of a checkpoint, `{"model": {name: tensor}}` or the names without the wrapper.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short, no checkpoint, or holds more than tensors.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(
            f"{path} {what}: expected a file of microsoft/UniCL, such as in1k.pth"
        )
    with path.open("rb") as file:
        is_zip = file.read(4) == _ZIP
    if is_zip and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is cut short ({path.stat().st_size:,} bytes, and the end of the archive is "
            "missing): copy or download it again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused in a sentence
            values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, EOFError, KeyError, RuntimeError, ...
        raise ValueError(_why_not(path, error)) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
            break
    if not isinstance(values, dict) or not values:
        if isinstance(values, Tensor):
            kind = f"one tensor of shape {list(values.shape)}"
        else:
            kind = "nothing" if values in ({}, None) else f"a {type(values).__name__}"
        raise ValueError(
            f"{path} holds {kind}: expected {{'model': {{name: tensor}}}}, as "
            "microsoft/UniCL's released files do"
        )
    others = [str(name) for name, value in values.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path} holds no weights at {', '.join(others)}: expected "
            "{'model': {name: tensor}}"
        )
    return {str(name): tensor for name, tensor in values.items()}


def write_official_file(path: Path, entries: Mapping[str, Tensor]) -> None:
    """Writes `{"model": entries}`, each tensor with memory of its own."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in entries.items()}
    torch.save({"model": copies}, path)


def _printable(name: str) -> str:
    """A name out of a file of somebody's, which the terminal must not obey."""
    return name.encode("unicode_escape").decode("ascii")[:200]


def _why_not(path: Path, error: Exception) -> str:
    text = str(error)
    foreign = _FOREIGN_OBJECT.search(text)
    if foreign is not None:
        return (
            f"{path} holds Python objects besides tensors ({_printable(foreign[1])}), which could "
            "run any code: it was not read. If it is a training checkpoint that you made yourself, "
            "save its weights alone where you made it: "
            'torch.save({"model": torch.load(FILE, weights_only=False)["model"]}, NEW)'
        )
    if _NEW_PROTOCOL in text or "TorchScript" in text:
        kind = "a TorchScript program" if "TorchScript" in text else "a pickle of protocol 4 or 5"
        return (
            f"{path} is {kind}, which torch reads only together with any code in it: it was not "
            'read. Save its weights alone where it was made: torch.save({"model": '
            "MODEL.state_dict()}, NEW)"
        )
    # torch advises to read the file all the same, code included: that is cut off
    reason = _TORCH_ADVICE.sub("", text).strip().split("\n")[0][:200] or type(error).__name__
    return (
        f"{path} is no checkpoint that torch can read, or is damaged: {reason}. Expected a "
        "file of torch.save with {'model': {name: tensor}}, such as microsoft/UniCL's in1k.pth; "
        "copy or download it again"
    )
