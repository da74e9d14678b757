"""Whether a converted model gives the features it should: asked of the files, not of the theory.

Both sides are given the same tensors, so that resizing, which each library does in its own way,
is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unicl_fast.models.unicl import UniCL
from unicl_fast.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
"""Largest difference of a coordinate of unit vectors that is let pass; fp32 leaves about 1e-6."""
_TEXTS = (
    "a photo of a dog",
    "",
    "two people and a horse in the snow, seen from far away",
    "an airplane, an automobile, a bird, a cat, a deer, a frog, a ship and a truck " * 5,
)


@dataclass(frozen=True, slots=True)
class Samples:
    """Inputs, and the features that our model makes of them."""

    images: Tensor
    """float32 [2 3 h w], normal."""
    tokens: Tensor
    """int64 [4 l]: short, empty, of usual length and cut."""
    image_features: Tensor
    text_features: Tensor


def images_for(model: UniCL) -> Tensor:
    """Images of the size that a model takes: float32 [2 3 h w], normal."""
    size = model.config.data.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def samples_of(model: UniCL) -> Samples:
    """Samples of the size that a model takes; the model in fp32 and evaluation mode, with texts."""
    images = images_for(model)
    tokens = Tokenizer(model.config.model.context_length)(_TEXTS)
    return Samples(images, tokens, model.encode_image(images), model.encode_text(tokens))


def require_equal(expected: Tensor, found: Tensor, *, what: str) -> float:
    """The largest difference of two sets of features after scaling them to unit norm.

    Args:
        expected: ours [n d].
        found: those of the converted model [n d].
        what: names it in the error.

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
