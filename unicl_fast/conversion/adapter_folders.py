"""Writes and reads peft's adapter folders, `adapter_config.json` and `adapter_model.safetensors`.

A folder that is written fits the model of transformers from which a run with `optim.lora` started.
transformers has three layers for our one of queries, keys and values: all three get its A, and a
third each of the rows of B and of DoRA's magnitudes, which is equivalent. Projections are stored
whole, as `modules_to_save`. Reading merges adapters into the weights of their base, without peft.
"""

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
    require_equal_features,
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
from unicl_fast.system.wording import shorten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_ROOT = "base_model.model."
_TOWERS: tuple[Literal["image", "text"], ...] = ("image", "text")
_HUB = "hf-hub:"
_READ = {
    *("peft_type", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path", "revision"),
    # which layers have adapters: the file of weights shows it
    *("r", "rank_pattern", "target_modules", "exclude_modules", "modules_to_save", "bias"),
    *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    # only for training, or for kinds of adapters that are refused
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings of peft that are read or checked here, or do not change how adapters are merged."""
_LEAVE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights with which peft leaves the base as it is when it loads adapters."""


@torch.no_grad()
def write_adapter(model: UniCL, folder: Path, *, base: str) -> float:
    """Writes a model's adapters for `PeftModel.from_pretrained`, into a new folder.

    The model is in fp32; its adapters are merged into its layers. `base` is the model without them:
    a folder of transformers or hf-hub:OWNER/NAME[@REVISION]. Returns the largest difference between
    coordinates of peft's features and ours.

    Raises:
        ValueError: peft cannot hold the model, transformers is not installed, or the folder exists.
        RuntimeError: peft gives other features.
    """
    import peft  # installed if there are adapters

    require_new(folder)
    adapters = model.config.optim.adapters
    assert adapters is not None
    for tower in _TOWERS:
        if tower not in adapters.ranks and not encoder_is_frozen(model, tower):
            raise ValueError(
                f"the {tower} encoder was trained whole, and has no adapters: unicl-convert hf "
                "writes the merged model"
            )
    layers = {path: module for path, module in model.named_modules() if is_adapted(module)}
    merge(model)
    if (layout := hugging_face.layout_of(model)) == "unicl":
        text = "transformers has no such model: unicl-convert open-clip and timm write it merged"
        raise ValueError(text)
    if not hugging_face.is_installed():
        raise ValueError("peft's adapters need transformers: pip install transformers")
    tensors, ranks = dict[str, Tensor](), dict[str, int]()
    for path, layer in layers.items():
        for name, kinds in _by_their_names(path, layer, layout).items():
            ranks[name] = len(kinds["lora_A.weight"])
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in kinds.items()}
    projections = ["visual_projection", "text_projection"]
    saved = ["text_model.head"] if layout == "siglip" else projections
    for name, tensor in to_transformers(model.state_dict(), layout=layout).items():
        # the scale is not a module; peft loads it because the base has it
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
        inference_mode=True,
    )
    with new_folder(folder) as aside:
        config.save_pretrained(str(aside))
        write_tensors(aside / WEIGHTS_FILE, {_ROOT + name: one for name, one in tensors.items()})
        return _difference_in_peft(model, config, aside)


def _by_their_names(path: str, layer: Any, layout: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter, by the layers of transformers that our layer corresponds to."""
    weight = f"{path}_weight" if path.endswith(".in_proj") else f"{path}.weight"
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in to_transformers({weight: layer.lora_B.default.weight}, layout=layout).items():
        name = of_version_5(name).removesuffix(".weight")
        found[name] = {"lora_A.weight": layer.lora_A.default.weight, "lora_B.weight": part}
    return found


def _difference_in_peft(model: UniCL, config: Any, folder: Path) -> float:
    """Loads the base by `AutoModel` and the adapters by peft, and compares features with ours."""
    import peft
    import transformers  # seconds to import

    transformers.utils.logging.disable_progress_bar()
    place = config.base_model_name_or_path
    with logging_at("transformers", logging.ERROR):
        try:
            plain = transformers.AutoModel.from_pretrained(place, revision=config.revision)
            theirs = peft.PeftModel.from_pretrained(plain, str(folder)).eval()
            found = theirs(input_ids=sample_tokens(model), pixel_values=sample_images(model))
        except Exception as error:  # any kind, for a model of other sizes or versions
            raise RuntimeError(
                f"peft {peft.__version__} cannot put the adapters on {place}, loaded by "
                f"transformers {transformers.__version__}: {error!r}; nothing was written: give as "
                "--base the model that the run started from, with the same image size and context "
                "length; unicl-convert hf converts models of other libraries to it"
            ) from error
    return require_equal_features(model, found.image_embeds, found.text_embeds)


def base_of(folder: Path) -> str:
    """The source of an adapter folder's base: a folder here, or a name on the hub.

    Raises ValueError if it names none, or other adapters.
    """
    values = read_json(folder / CONFIG_FILE)
    place = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not place or not isinstance(place, str):
        raise ValueError(
            f"{folder / CONFIG_FILE} names no model: set base_model_name_or_path in it to the path "
            "of its base"
        )
    if (Path(place).expanduser() / CONFIG_FILE).is_file():  # perhaps itself
        raise ValueError(
            f"{folder} is for another folder of adapters, {place}: first merge those into their "
            "base by peft's merge_and_unload"
        )
    if Path(place).expanduser().exists():
        return place
    return f"{_HUB}{place}" + (f"@{values['revision']}" if values.get("revision") else "")


def _require_fitting(
    layer: str, weight: Tensor, a: Tensor, b: Tensor, length: Tensor | None, *, ranks: set[int]
) -> None:
    """Raises ValueError unless an adapter's shapes are those of its layer and of a rank."""
    rank = a.shape[0] if a.ndim else 0
    expected = [[rank, *weight.shape[1:]], [weight.shape[0], rank, *[1] * (weight.ndim - 2)]]
    found = [list(a.shape), list(b.shape)]
    if length is not None:  # peft's of convolutions has more axes
        expected, found = [*expected, [weight.shape[0]]], [*found, [length.numel()]]
    if weight.ndim < 2 or found != expected or rank not in ranks:
        raise ValueError(
            f"the adapter of {layer} has A, B and perhaps magnitudes of shapes {shorten(found)}; a "
            f"layer of {list(weight.shape)} needs {shorten(expected)}, and the configuration has "
            f"rank {shorten(sorted(ranks))}: copy the adapter again, or name its own base"
        )


def with_adapters(
    weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Merges the tensors of an adapter folder into its base's, both by their names in the files.

    Raises UnknownArchitectureError for adapters other than LoRA, rsLoRA and DoRA, KeyError if the
    base lacks a layer.
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
    r, alpha, patterns = (values.get(name) for name in ("r", "lora_alpha", "rank_pattern"))
    patterns = {} if patterns is None else patterns
    numbers = [r, alpha, *patterns.values()] if isinstance(patterns, dict) else [None]
    if not all(isinstance(one, int | float) and 0 < one < 1 << 20 for one in numbers):
        text = shorten({"r": r, "lora_alpha": alpha, "rank_pattern": patterns})
        raise ValueError(f"{folder / CONFIG_FILE} must have positive numbers in {text}")
    given = {of_version_5(name.removeprefix(_ROOT)): one for name, one in adapters.items()}
    weights = {of_version_5(name): tensor for name, tensor in weights.items()}
    merged = dict(weights)
    for name in [one for one in given if one.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        a, b = given.pop(name), given.pop(f"{layer}.lora_B.weight")
        weight = weights[f"{layer}.weight"]
        length = given.pop(f"{layer}.lora_magnitude_vector") if values.get("use_dora") else None
        # before any product: B of a few rows would be broadcast, of very many not fit in memory
        _require_fitting(layer, weight, a, b, length, ranks={r, *patterns.values()})
        scale = alpha / len(a) ** (0.5 if values.get("use_rslora") else 1.0)
        rows = weight.float().flatten(1) + scale * b.float().flatten(1) @ a.float().flatten(1)
        if length is not None:
            rows *= length.float().reshape(-1, 1) / rows.norm(dim=1, keepdim=True)
        merged[f"{layer}.weight"] = rows.reshape(weight.shape)
    if unknown := [name for name in given if ".lora_" in name or name not in weights]:
        raise UnknownArchitectureError(f"adapters with {', '.join(unknown[:4])} are not read")
    return merged | given
