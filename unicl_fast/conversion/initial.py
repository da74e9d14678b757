"""Loads a model from any source, or a run's initial weights: `model.init`, init_image, init_text.

Settings are compared first, and a difference is an error that names them: weights of another
activation or mask would load and give wrong features. Only tables of positions and windows can
differ in size. The log lists the weights that were loaded and, with reasons, those that were not.
"""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from timm.layers import AttentionPool2d, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.load import (
    build_model,
    load_weights,
    refuse_another_base,
    require_sizes,
)
from unicl_fast.config import INITIAL_WEIGHTS
from unicl_fast.conversion.libraries import fixed_size
from unicl_fast.conversion.sources import (
    IMAGE_SETTINGS,
    TEXT_SETTINGS,
    Source,
    find_source,
    initial_sources,
)
from unicl_fast.distributed.launch import refused_together
from unicl_fast.distributed.ranks import Ranks, rank_0_alone, tensors_from_rank_0
from unicl_fast.models.freezing import freeze, merge
from unicl_fast.models.precision import Precision
from unicl_fast.models.transformers_text import POSITIONS
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.wording import count_of

logger = logging.getLogger("unicl_fast")

_ALONE = Ranks()
_WINDOW_AND_SIZE = re.compile(r"(_window\d+)?(_\d+)?$")
_SHOWN = 6


@torch.no_grad()
def load_encoders(given: str | Path) -> UniCL:
    """Loads a model of any source (`sources`), in evaluation mode on the CPU; adapters are merged.

    It is the module in the `Model` that `unicl_fast.load_model` returns. Raises as `find_source`,
    and ValueError if the weights below adapters have changed.
    """
    source = find_source(str(given))
    if source.own is not None:
        model = _load_own(source)
        if source.own.optim.adapters is not None:
            merge(model)
        return model
    config, file = source.config(), source.file
    if file is not None:
        require_sizes(file, config, source.outline().values())
    model = build_model(config)
    if file is not None:
        loading = _Loading(model, source, "init", label=source.name)
        loading.take(image=True, text=source.has_text)
        model.load_state_dict(loading.tensors, strict=False)
    return model.eval()


@torch.no_grad()
def load_adapted(given: str | Path) -> UniCL:
    """As `load_encoders`, with a run's adapters on its layers; ValueError if it has none."""
    source = find_source(str(given))
    if source.own is None or source.own.optim.adapters is None:
        raise ValueError(f"{given} has no adapters: it is not a run with optim.lora")
    return _load_own(source)


def _load_own(source: Source) -> UniCL:
    """Loads a model of ours, and the weights below its adapters if its file leaves them out."""
    config, file = source.own, source.file
    assert config is not None
    assert file is not None
    model = build_model(config)
    model.to(Precision(config.efficiency.precision).weight_type)
    if config.optim.adapters is not None:
        if source.base:
            initialise(model)
        freeze(model)
        refuse_another_base(model, source.base, file)
    load_weights(model, file)
    return model.eval()


@torch.no_grad()
def initialise(model: UniCL, ranks: Ranks = _ALONE) -> None:
    """Loads the weights that the model's config names, in the run's type; all ranks call it.

    Rank 0 reads or downloads them, and sends them to the others. Raises SharedRefusal on all ranks
    if a source is missing, damaged, or for another model.
    """
    model.to(Precision(model.config.efficiency.precision).weight_type)
    tensors: dict[str, Tensor] = {}
    with refused_together(ranks), rank_0_alone(ranks):
        if ranks.is_main:
            tensors = _initial_tensors(model)
    model.load_state_dict(tensors_from_rank_0(tensors, ranks), strict=False)


def _initial_tensors(model: UniCL) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    given = {option: getattr(model.config.model, option) for option in INITIAL_WEIGHTS}
    for option, source, image, text in initial_sources(given):
        loading = _Loading(model, source, option, label=f"model.{option}={source.name}")
        loading.check_settings(image=image, text=text)
        if source.locate is not None:
            loading.take(image=image, text=text)
        tensors |= loading.tensors
    return tensors


class _Loading:
    """Loads tensors of one source into a model."""

    def __init__(self, model: UniCL, source: Source, option: str, *, label: str) -> None:
        self._model, self._source, self._option, self._label = model, source, option, label
        self._own = model.state_dict()
        self.tensors: dict[str, Tensor] = {}
        self._taken, self._fresh, self._left_out = list[str](), list[str](), list[str]()

    def take(self, *, image: bool, text: bool) -> None:
        """Reads the encoders that are wanted, and logs which weights were loaded."""
        self._given = self._source.read()
        if image:
            self._take_image()
        if text:
            self._take_text()
        if self._option == "init":
            self._take_learnt()
        said = f"{self._label}: loaded {'; '.join(self._taken)}"
        for title, names in (("Fresh", self._fresh), ("Left out", self._left_out)):
            said += f". {title}: {'; '.join(names)}" if names else ""
        logger.info("%s", said)

    def check_settings(self, *, image: bool, text: bool) -> None:
        """Refuses a source that needs other settings, and names all of them.

        Only `init` must agree on the shared space: a source of one encoder can have another.
        """
        model, source = self._model, self._source
        has_text = text and model.text_encoder is not None
        if text and not has_text and self._option == "init_text":
            self._refuse(f"objective.name={model.config.objective.name} has no text encoder")
        is_whole = self._option == "init"
        names = [*(IMAGE_SETTINGS if image else ()), *(TEXT_SETTINGS if has_text else ())]
        space = ["embed_dim", "image_projection", "standardise"]
        names += space if is_whole and image and model.has_space else []
        names += ["text_projection"] if is_whole and has_text else []
        config, needed = model.config.model, source.settings
        pairs = {name: (getattr(config, name), needed[name]) for name in names if name in needed}
        wrong = {name: both for name, both in pairs.items() if not _are_alike(name, *both)}
        if wrong:
            found = "; ".join(
                f"model.{name} is {ours}, the source's is {theirs}"
                for name, (ours, theirs) in wrong.items()
            )
            flags = " ".join(f"--model.{name.replace('_', '-')}" for name in wrong)
            self._refuse(
                f"it is another model: {found}. Leave out {flags}: unicl-pretrain uses the "
                "architecture of the source"
            )

    def _take_image(self) -> None:
        """Takes the image encoder, and its projection if it fits."""
        encoder, source = self._model.image_encoder, self._source
        name = self._model.config.model.image_encoder
        if (pooling := _pooling_of(encoder)) and source.pooling not in ("", pooling):
            self._refuse(f"its image encoder pools by {source.pooling!r}, timm's by {pooling!r}")
        given = _after("image_encoder.", self._given)
        try:
            registered = timm.get_pretrained_cfg(name)
            layers = source.classifier or getattr(registered, "classifier", None) or ()
            layers = (layers,) if isinstance(layers, str) else layers
            found = _converted_by_timm(encoder, given, layers)
        except Exception as error:  # any kind, for unexpected names or shapes
            self._refuse(f"timm cannot read it as {name}: {error!r}")
        kind = f"image encoder {name}"
        size = self._model.config.data.image_size
        if source.data.get("image_size", size) != size and fixed_size(name):
            kind += f", its tables resized from {source.data['image_size']} pixels to {size}"
        self._take("image_encoder.", found, kind)
        if self._model.has_space:
            self._take_projection("image_projection")
        self._warn_of_other_images()

    def _take_text(self) -> None:
        """Takes the text encoder, and its projection if it fits, if the model has one."""
        encoder, source = self._model.text_encoder, self._source
        if encoder is None:
            return
        if not source.has_text:
            if self._option == "init_text":
                self._refuse("it has no text encoder")
            self._fresh.append("the text encoder and its projection, which the source lacks")
            return
        found = _after("text_encoder.", self._given)
        length, table = encoder.context_length, found.get("positional_embedding")
        kind = "text encoder"
        if table is not None and table.ndim == 2 and len(table) != length:
            causal = self._model.config.model.text_causal
            found["positional_embedding"] = resize_positions(table, length, causal=causal)
            kind += f", its positions resized from {len(table)} to {length}"
        if (table := found.get(POSITIONS)) is not None:  # features of texts that fit do not change
            found[POSITIONS] = table[: len(encoder.state_dict()[POSITIONS])]
        self._take("text_encoder.", found, kind)
        self._take_projection("text_projection")

    def _take_learnt(self) -> None:
        """Takes the parameters of the objective: the logit scale, rows for the same classes."""
        given, own = self._given, self._model.learnt
        for name, tensor in own.items():
            if name not in given:
                self._fresh.append(f"{name}, which the source lacks")
            elif given[name].shape != tensor.shape:
                self._fresh.append(f"{name}, since the source has {list(given[name].shape)}")
            else:
                self._take("", {name: given[name]}, name)
        self._left_out += [
            f"{name}, which objective.name={self._model.config.objective.name} does not learn"
            for name in ("logit_scale", "logit_bias", "class_rows")
            if name in given and name not in own
        ]
        if "logit_bias" in given and "logit_bias" not in own and "logit_scale" in own:
            logger.warning(
                "%s was trained by a sigmoid of each pair; objective.name=%s is a softmax over the "
                "batch, under which its probabilities change and its bias is lost: "
                "--objective.name siglip (pairs) or sigmoid (labels too) keeps both",
                self._label, self._model.config.objective.name,
            )  # fmt: skip

    def _take_projection(self, name: str) -> None:
        """Takes a projection, or keeps the fresh one if the source's has another shape."""
        head = re.compile(f"{name.partition('_')[0]}_(?!encoder[.])")
        names, given = list(filter(head.match, self._own)), self._given
        if name not in names:
            return
        fits = [one in given and given[one].shape == self._own[one].shape for one in names]
        if all(fits) and set(filter(head.match, given)) == set(names):
            self._take("", {one: given[one] for one in names}, name)
            return
        found = list(given[name].shape) if name in given else "none"
        wanted = list(self._own[name].shape)
        self._fresh.append(f"{name}, since the source has {found} and {wanted} is needed")

    def _take(self, prefix: str, found: Mapping[str, Tensor], kind: str) -> None:
        """Takes all tensors of a part, or refuses them if a name, shape or value is wrong."""
        own = _after(prefix, self._own) if prefix else {name: self._own[name] for name in found}
        if faults := _misfits(own, found):
            self._refuse(f"its {kind} does not fit: {'; '.join(faults)}")
        for name, tensor in found.items():
            self.tensors[prefix + name] = tensor.to(own[name].dtype).contiguous()
        size = f" ({count_of(len(found), 'tensor')})" if len(found) > 1 else ""
        self._taken.append(kind + size)

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self._label}: {reason}")

    def _warn_of_other_images(self) -> None:
        theirs, ours = self._source.data, self._model.config.data
        # a run that trains on whole images is evaluated on them, whatever the source was
        shows_all = not ours.drawn and ours.evaluation_resize == ours.image_size
        for name in ("mean", "std", "interpolation", *["evaluation_resize"] * (not shows_all)):
            known, present = theirs.get(name), getattr(ours, name)
            if isinstance(known, int) and isinstance(present, int):
                # the number of pixels depends on the image size
                known = known if theirs["image_size"] == ours.image_size else present
            if known is not None and _shown(known) != _shown(present):
                logger.warning(
                    "%s was trained on images of another %s: add --data.%s %s",
                    self._label, name, name.replace("_", "-"),
                    known if isinstance(known, str | int) else " ".join(map(str, known)),
                )  # fmt: skip


def _misfits(needed: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Lists how tensors differ from the needed ones, with the first names of each kind."""
    fits = {name: found[name].shape == needed[name].shape for name in needed if name in found}
    kinds = {
        "missing": [name for name in needed if name not in found],
        "left over": [name for name in found if name not in needed],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(needed[name].shape)}"
            for name, has_its_shape in fits.items()
            if not has_its_shape
        ],
        "not finite numbers": [
            name
            for name, has_its_shape in fits.items()
            if has_its_shape and not _has_finite_numbers(found[name], like=needed[name])
        ],
    }
    return [
        f"{kind}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)} ({len(names)})"
        for kind, names in kinds.items()
        if names
    ]


def _has_finite_numbers(tensor: Tensor, *, like: Tensor) -> bool:
    if like.is_floating_point():
        if not tensor.is_floating_point():
            return False
        tensor = tensor.to(like.dtype)  # it can overflow; torch cannot check one-byte types
    return bool(tensor.isfinite().all())


def _shown(value: Any) -> Any:
    """Rounds statistics: libraries store different numbers of digits."""
    return value if isinstance(value, str | int) else [round(number, 3) for number in value]


def resize_positions(table: Tensor, length: int, *, causal: bool) -> Tensor:
    """Resizes a table of positions [l w] for another context length, to [length w].

    For a shorter context a causal encoder's table is cut, which does not change texts that fit; any
    other table is interpolated, as in open_clip.
    """
    if causal and length <= len(table):
        return table[:length]
    rows = F.interpolate(table.T[None].float(), size=length, mode="linear", align_corners=False)
    return rows[0].T.to(table.dtype)


def _converted_by_timm(
    encoder: nn.Module, given: Mapping[str, Tensor], classifier: Iterable[str]
) -> dict[str, Tensor]:
    """Renames and resizes an image encoder's tensors for timm's present code and our image size."""
    module = sys.modules[type(encoder).__module__]  # timm has a function for each architecture
    convert: Callable[..., dict[str, Tensor]] | None = getattr(module, "checkpoint_filter_fn", None)
    found = dict(given)
    if convert is not None:
        takes_model = len(inspect.signature(convert).parameters) > 1
        found = dict(convert(found, encoder) if takes_model else convert(found))
    head = getattr(encoder, "head", None)
    table = found.get("head.pos_embed")
    if isinstance(head, AttentionPool2d) and table is not None and table.ndim == 2:
        found["head.pos_embed"] = resample_abs_pos_embed(table[None], list(head.feat_size))[0]
    own, layers = encoder.state_dict(), tuple(f"{name}." for name in classifier)
    return {name: one for name, one in found.items() if name in own or not name.startswith(layers)}


def _pooling_of(encoder: nn.Module) -> str:
    """Timm's name for the pooling of an image encoder; empty if it is not known."""
    for holder in (encoder, getattr(encoder, "head", None)):
        found = getattr(holder, "global_pool", "")
        found = getattr(found, "pool_type", found)  # if it is a module
        if isinstance(found, str) and found:
            return found
    return ""


def _after(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: one for name, one in tensors.items() if name.startswith(prefix)}


def _are_alike(name: str, ours: Any, theirs: Any) -> bool:
    """Whether a setting needs no change; an encoder can have names for several image sizes."""
    if name == "image_encoder":
        ours, theirs = (_WINDOW_AND_SIZE.sub("", one.split(".")[0]) for one in (ours, theirs))
    return bool(ours == theirs)
