"""peft's own adapter folders, `adapter_config.json` and `adapter_model.safetensors`, out and in.

Out, for the model of transformers that a run with `optim.lora` began with. Ours have one layer for
queries, keys and values where transformers has three: A serves all three, and the rows of B and of
DoRA's magnitudes are divided, which changes nothing. Projections are stored whole, as
`modules_to_save`. In, adapters are merged into the weights of their base, without peft.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unicl_fast.checkpoints.transformers_names import of_version_5, to_transformers
from unicl_fast.conversion import hugging_face
from unicl_fast.conversion.open_clip import UnknownArchitectureError
from unicl_fast.conversion.output import (
    new_folder,
    require_equal,
    require_new,
    sample_images,
    sample_tokens,
    write_tensors,
)
from unicl_fast.models.adapters import ALPHA, is_adapted
from unicl_fast.models.freezing import encoder_is_frozen, merge
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.program import logging_at
from unicl_fast.system.untrusted_files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ROOT = "base_model.model."
_PROJECTIONS = {"siglip": ["text_model.head"]}
_TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")
_OF_CLIP = ["visual_projection", "text_projection"]
_HUB = "hf-hub:"
_READ = {
    *("peft_type", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path", "revision"),
    # decide which layers have adapters, as the file of weights shows
    *("r", "rank_pattern", "target_modules", "exclude_modules", "modules_to_save", "bias"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    # are for training, or for what is refused
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings of peft's with which adapters are what is read here, or that are checked."""
_LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights; with others, peft changes the base when it loads adapters."""


@torch.no_grad()
def write_adapter(model: UniCL, folder: Path, *, base: str) -> float:
    """Writes a model's adapters for `PeftModel.from_pretrained`, into a new folder.

    Args:
        model: in fp32, with adapters on its layers, which are merged into them.
        folder: must not exist, or be empty.
        base: a folder of transformers' or hf-hub:OWNER/NAME[@REVISION], without the adapters.

    Returns:
        The largest difference between coordinates of peft's features and ours.

    Raises:
        ValueError: peft cannot hold the model, transformers is not installed, or the folder exists.
        RuntimeError: peft gives other features.
    """
    import peft  # which the adapters need

    require_new(folder)
    adapters = model.config.optim.adapters
    assert adapters is not None
    for tower in _TOWERS:
        if tower not in adapters.ranks and not encoder_is_frozen(model, tower):
            raise ValueError(
                f"the {tower} encoder was trained whole, which is no adapter: unicl-convert hf "
                "writes the merged model"
            )
    layers = {path: module for path, module in model.named_modules() if is_adapted(module)}
    merge(model)
    layout = hugging_face.layout_of(model)
    if layout == "unicl" or not hugging_face.is_installed():
        raise ValueError(
            "transformers has no such model: unicl-convert open-clip and timm write it merged"
            if layout == "unicl"
            else "peft's adapters are for a model of transformers: pip install transformers"
        )
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for path, layer in layers.items():
        for name, kinds in _by_their_names(path, layer, layout).items():
            ranks[name] = len(kinds["lora_A.weight"])
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in kinds.items()}
    saved = _PROJECTIONS.get(layout, _OF_CLIP)
    for name, tensor in to_transformers(model.state_dict(), layout=layout).items():
        # the scale is no module; peft loads it since the base has it
        if name.rpartition(".")[0] in saved or name.startswith("logit_"):
            tensors[name] = tensor
    place, revision = base, ""
    if base.startswith(_HUB):
        place, _, revision = base.removeprefix(_HUB).partition("@")
    rank = max(ranks.values())
    config = peft.LoraConfig(
        base_model_name_or_path=place,
        revision=revision or None,
        r=rank,
        rank_pattern={layer: own for layer, own in ranks.items() if own != rank},
        lora_alpha=ALPHA,
        target_modules=sorted(ranks),
        modules_to_save=saved,
        use_dora=adapters.dora,
        use_rslora=adapters.rslora,
        inference_mode=True,
    )
    with new_folder(folder) as aside:
        config.save_pretrained(str(aside))
        write_tensors(aside / WEIGHTS_FILE, {_ROOT + name: one for name, one in tensors.items()})
        return _difference_in_peft(model, config, aside)


def _by_their_names(path: str, layer: Any, layout: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter, for each layer of transformers that ours is."""
    weight = f"{path}_weight" if path.endswith(".in_proj") else f"{path}.weight"
    rows = {"lora_B.weight": layer.lora_B.default.weight}
    if layer.lora_magnitude_vector:
        rows["lora_magnitude_vector"] = layer.lora_magnitude_vector.default.weight
    found: dict[str, dict[str, Tensor]] = {}
    for kind, values in rows.items():
        for name, part in to_transformers({weight: values}, layout=layout).items():
            name = of_version_5(name).removesuffix(".weight")
            own = found.setdefault(name, {"lora_A.weight": layer.lora_A.default.weight})
            own[kind] = part
    return found


def _difference_in_peft(model: UniCL, config: Any, folder: Path) -> float:
    """Loads the base by `AutoModel` and the adapters by peft, and compares features with ours."""
    import peft
    import transformers  # seconds to import

    transformers.utils.logging.disable_progress_bar()
    images, tokens = sample_images(model), sample_tokens(model)
    place = config.base_model_name_or_path
    with logging_at("transformers", logging.ERROR):
        try:
            plain = transformers.AutoModel.from_pretrained(place, revision=config.revision)
            theirs = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
            found = theirs(input_ids=tokens, pixel_values=images)
        except Exception as error:  # of any kind that a model of other sizes or versions causes
            raise RuntimeError(
                f"peft {peft.__version__} cannot put the adapters on {place}, loaded by "
                f"transformers {transformers.__version__}: {error!r}; nothing was written: name "
                "by --base what the run began with, of the same image size and context length; "
                "unicl-convert hf makes it of other models"
            ) from error
    pairs = {
        "image features": (model.encode_image(images), found.image_embeds),
        "text features": (model.encode_text(tokens), found.text_embeds),
    }
    return max(require_equal(*pair, what=what) for what, pair in pairs.items())


def base_of(folder: Path) -> str:
    """The source of the model that an adapter folder stands on; raises ValueError if it has none.

    A name that is no folder here is the hub's.
    """
    values = read_json(folder / CONFIG_FILE)
    place = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not place or not isinstance(place, str):
        raise ValueError(
            f"{folder / CONFIG_FILE} names no model: write the place of its base there as "
            "base_model_name_or_path"
        )
    if (Path(place).expanduser() / CONFIG_FILE).is_file():  # perhaps itself
        raise ValueError(
            f"{folder} is of another folder of adapters, {place}: merge those into their base by "
            "peft's merge_and_unload first"
        )
    if Path(place).expanduser().exists():
        return place
    return f"{_HUB}{place}" + (f"@{values['revision']}" if values.get("revision") else "")


def with_adapters(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Merges the tensors of an adapter folder into those of its base, both by their own names.

    Raises:
        UnknownArchitectureError: adapters of another kind than LoRA, rsLoRA and DoRA.
        KeyError: the base has no such layer.
    """
    values = read_json(folder / CONFIG_FILE)
    others = [name for name, value in values.items() if value and name not in _READ]
    if (init := values.get("init_lora_weights")) not in _LEAVE_THE_BASE:
        others.append(f"init_lora_weights={init}")
    if values["peft_type"] != "LORA" or others:
        raise UnknownArchitectureError(
            f"adapters with {' '.join(['peft_type', str(values['peft_type']), *others])} are not "
            "read: merge them by peft's merge_and_unload"
        )
    given = {of_version_5(name.removeprefix(_ROOT)): one for name, one in adapters.items()}
    weights = {of_version_5(name): tensor for name, tensor in weights.items()}
    merged = dict(weights)
    for name in [one for one in given if one.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        a, b = given.pop(name), given.pop(f"{layer}.lora_B.weight")
        weight = weights[f"{layer}.weight"]
        scale = values["lora_alpha"] / len(a) ** (0.5 if values.get("use_rslora") else 1.0)
        rows = weight.float().flatten(1) + scale * b.float().flatten(1) @ a.float().flatten(1)
        if values.get("use_dora"):
            length = given.pop(f"{layer}.lora_magnitude_vector").float().reshape(-1, 1)
            rows *= length / rows.norm(dim=1, keepdim=True)
        merged[f"{layer}.weight"] = rows.reshape(weight.shape)
    if unknown := [name for name in given if ".lora_" in name or name not in weights]:
        raise UnknownArchitectureError(f"adapters with {', '.join(unknown[:4])} are not read")
    return merged | given
