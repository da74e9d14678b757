"""Writes converted models, whole or not at all, after comparing their features with ours.

The same tensors are encoded, without preprocessing, since libraries resize differently.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from unicl_fast.checkpoints.files import save_tensors
from unicl_fast.models.unicl import UniCL
from unicl_fast.system.atomic_files import make_folder, temporary_folder
from unicl_fast.system.line import line
from unicl_fast.text.file_tokenizer import FileTokenizer
from unicl_fast.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest accepted difference of a coordinate of unit vectors; fp32 gives about 1e-6."""
_TEXTS = (
    "a photo of a dog",
    "",
    "two people and a horse in the snow, seen from far away",
    "an airplane, an automobile, a bird, a cat, a deer, a frog, a ship and a truck " * 5,
)


def require_new(path: Path) -> None:
    """Refuses (ValueError) a path that exists; an empty folder is accepted."""
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or (path.exists() and not is_empty_folder):
        raise ValueError(f"{path} is there already: name a new one, or remove it first")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that is renamed to `path`, which must be new, if the block raises nothing."""
    require_new(path)
    make_folder(path.parent)
    with (
        line(f"writing and checking {path}"),
        temporary_folder(f".{path.name}.partial-", root=path.parent) as folder,
    ):
        aside = folder / path.name
        aside.mkdir()
        yield aside
        if path.is_dir():
            path.rmdir()
        aside.rename(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes strict JSON; raises ValueError for infinity and NaN."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; raises OSError if that fails."""
    # copies, since safetensors refuses tensors that share memory
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_tensors(copies, path, metadata={"format": "pt"})  # required by transformers
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_own_tokenizer(model: UniCL, folder: Path) -> None:
    """Writes the files of a model's tokenizer, if it is not CLIP's and they can be found."""
    place = model.config.model.tokenizer
    if place and model.text_encoder is not None:
        with contextlib.suppress(FileNotFoundError):  # texts need them, weights do not
            FileTokenizer(place, model.config.model.context_length).write(folder)


def num_parameters(model: nn.Module) -> int:
    """Counts the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def sample_images(model: UniCL) -> Tensor:
    """Random images of a model's size: float32 [2 3 h w]."""
    size = model.config.data.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def sample_tokens(model: UniCL) -> Tensor:
    """Token rows of a short, an empty, a usual and a cut text: int64 [4 l]."""
    tokens = Tokenizer(model.config.model.context_length)(_TEXTS)
    return tokens.clamp_(max=model.config.model.vocab_size - 1)  # it can be smaller than CLIP's


def require_equal_features(model: UniCL, image_features: Tensor, text_features: Tensor) -> float:
    """As `require_equal`, of another library's features of `sample_images` and `sample_tokens`."""
    images = model.encode_image(sample_images(model))
    texts = model.encode_text(sample_tokens(model))
    return max(
        require_equal(images, image_features, name="image features"),
        require_equal(texts, text_features, name="text features"),
    )


def require_equal(expected: Tensor, found: Tensor, *, name: str) -> float:
    """Returns the largest difference between coordinates of ours and theirs [n d], of unit norm.

    Raises RuntimeError if shapes differ, or values by more than `TOLERANCE`.
    """
    if expected.shape != found.shape:
        raise RuntimeError(
            f"{name} of the converted model have shape {list(found.shape)}, ours have "
            f"{list(expected.shape)}: nothing was written; please report this"
        )
    difference = (F.normalize(expected, dim=-1) - F.normalize(found, dim=-1)).abs().max().item()
    if not difference <= TOLERANCE:  # also refuses NaN
        raise RuntimeError(
            f"{name} of the converted model differ from ours by {difference:.1e}, more than "
            f"{TOLERANCE:.0e}: nothing was written; please report this with the model's config and "
            "the versions of the libraries"
        )
    return difference
