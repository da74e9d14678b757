"""Converted models on the disk: whole or not at all, checked; and our own format, the hub's.

Features are compared with those of the files as another library reads them. Both sides are given
the same tensors, so that resizing, which each library does in its own way, is left out.

A folder in the layout of the Hugging Face hub (weights, config, preprocessing, model card) is what
`load_model` takes (`unicl_fast.checkpoints.export` reads it), and `unicl-convert hf --push`
publishes it as it is: it names no path of the machine that it was trained on. Its card is
`unicl_fast.conversion.card`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from unicl_fast import __version__
from unicl_fast.checkpoints.export import (
    CONFIG_FILE,
    FORMAT_VERSION,
    LIBRARY,
    WEIGHTS_FILE,
    Preprocessing,
)
from unicl_fast.checkpoints.files import save_tensors
from unicl_fast.config import TrainConfig, config_to_dict
from unicl_fast.conversion.card import Facts, model_card
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.atomic_files import make_folder, temporary_folder
from unicl_fast.system.checksums import file_checksum
from unicl_fast.text.tokenizer import Tokenizer

_CARD_FILE = "README.md"
TOLERANCE = 1e-4
"""Largest difference of a coordinate of unit vectors that is accepted; fp32 leaves about 1e-6."""
_TEXTS = (
    "a photo of a dog",
    "",
    "two people and a horse in the snow, seen from far away",
    "an airplane, an automobile, a bird, a cat, a deer, a frog, a ship and a truck " * 5,
)


def num_parameters(model: UniCL) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_new(path: Path) -> None:
    """Refuses (ValueError) a path that exists; an empty folder is accepted."""
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or (path.exists() and not is_empty_folder):
        raise ValueError(f"{path} is there already: name a new one, or remove it first")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends without an error.

    Raises:
        ValueError: something is there already.
        OSError: it cannot be written.
    """
    require_new(path)
    make_folder(path.parent)
    with temporary_folder(f".{path.name}.partial-", root=path.parent) as folder:
        aside = folder / path.name
        yield aside
        if path.is_dir():
            path.rmdir()
        aside.rename(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, else as `new_file`."""
    with new_file(path) as aside:
        aside.mkdir()
        yield aside


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes strict JSON, which has no infinity."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file whose tensors share no memory; a full disk is an OSError."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_tensors(copies, path, metadata={"format": "pt"})  # the hub's readers ask for this word
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs, and the features that our model makes of them."""

    images: Tensor
    """float32 [2 3 h w], normal."""
    tokens: Tensor
    """int64 [4 l]: short, empty, of usual length and cut."""
    image_features: Tensor
    text_features: Tensor

    @classmethod
    def of(cls, model: UniCL) -> Samples:
        """Samples of the size that a model takes; it has texts, fp32 and evaluation mode."""
        images = images_for(model)
        tokens = Tokenizer(model.config.model.context_length)(_TEXTS)
        # a model of another tokenizer may have a smaller vocabulary
        tokens.clamp_(max=model.config.model.vocab_size - 1)
        return cls(images, tokens, model.encode_image(images), model.encode_text(tokens))


def images_for(model: UniCL) -> Tensor:
    """Images of the size that a model takes: float32 [2 3 h w], normal."""
    size = model.config.data.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def require_equal(expected: Tensor, found: Tensor, *, what: str) -> float:
    """The largest difference of two sets of features after scaling them to unit norm.

    `expected` are ours [n d], `found` those of the converted model; `what` names them in the error.

    Raises:
        RuntimeError: they differ by more than the tolerance.
    """
    if expected.shape != found.shape:
        raise RuntimeError(
            f"{what} of the converted model have shape {list(found.shape)}, ours "
            f"{list(expected.shape)}: nothing was written; please report this"
        )
    difference = (F.normalize(expected, dim=-1) - F.normalize(found, dim=-1)).abs().max().item()
    if not difference <= TOLERANCE:  # so that NaN is refused
        raise RuntimeError(
            f"{what} of the converted model differ from ours by {difference:.1e}, where "
            f"{TOLERANCE:.0e} is allowed: nothing was written; please report this with the "
            "model's config and the versions of the libraries"
        )
    return difference


def write_export(
    model: UniCL,
    folder: Path,
    *,
    facts: Facts = Facts(),  # noqa: B008  (it cannot change)
    name: str = "FOLDER",
    license: str = "",
) -> None:
    """Writes a model in fp32 without its run, into a new folder.

    Args:
        model: is written as it is.
        folder: a new one.
        facts: are kept in the config and stand on the card.
        name: by which users of the card will load the model.
        license: an identifier of the hub, for example apache-2.0; empty leaves it open.

    Raises:
        ValueError: the folder is there already.
        OSError: it cannot be written.
    """
    config = _publishable(model.config)
    with new_folder(folder) as aside:
        write_tensors(aside / WEIGHTS_FILE, model.state_dict())
        write_json(
            aside / CONFIG_FILE,
            {
                "library_name": LIBRARY,
                "library_version": __version__,
                "format_version": FORMAT_VERSION,
                "model_type": "unicl",
                "architectures": ["UniCL"],
                "num_parameters": num_parameters(model),
                **logits_of(model),
                "facts": facts._asdict(),
                "config": _finite(config_to_dict(config)),
                "checksums": {WEIGHTS_FILE: file_checksum(aside / WEIGHTS_FILE)},
            },
        )
        write_json(aside / "preprocessor_config.json", Preprocessing.of(config).for_transformers())
        card = model_card(model, facts, name=name, license=license)
        (aside / _CARD_FILE).write_text(card, encoding="utf-8")


def logits_of(model: UniCL) -> dict[str, Any]:
    """The logarithm of the scale of the logits, and their bias where the model has one.

    A scale for each kind of text is a list, in the order of `TEXT_KINDS`.
    """
    bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias.item()}
    return {"logit_scale": model.logit_scale.tolist(), **bias}


def _publishable(config: TrainConfig) -> TrainConfig:
    """A config without paths and names of data sets, for weights in fp32."""
    replace = dataclasses.replace
    precision = config.efficiency.precision
    return replace(
        config,
        data=replace(
            config.data,
            train=(),
            evaluate=(),
            fraction=(1.0,),
            augment=tuple(entry for entry in config.data.augment if ":" not in entry),
            balance_concepts="",
            cache_folder="",
        ),
        model=replace(config.model, init="", init_image="", init_text=""),
        efficiency=replace(
            config.efficiency,
            precision="fp32" if precision == "fp64" else precision,
            activation_checkpointing=False,
            compile="auto",
            image_features="",
        ),
        checkpoint=replace(config.checkpoint, best=""),
    )


def _finite(values: Any) -> Any:
    """A config's values with infinity, which JSON lacks, as a number that bounds nothing."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    return 1e300 if values == float("inf") else values
