"""Averages two models of one architecture, before and after fine-tuning for example (WiSE-FT).

Wortsman et al., arXiv 2109.01903: some averages are better than both models, on the data of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unicl_fast.models.unicl import TRAINING_ONLY, UniCL
from unicl_fast.system.wording import first_difference, shorten

_ARCHITECTURE = (
    "image_encoder", "text_width", "text_layers", "text_heads", "text_activation", "text_causal",
    "text_pool", "text_norm_eps", "embed_dim", "source_token", "projections", "context_length",
)  # fmt: skip
_PREPROCESSING = ("evaluation_resize", "image_size", "interpolation", "mean", "std")


def averaged_weights(first: UniCL, second: UniCL, alpha: float) -> dict[str, Tensor]:
    """Averages weights and buffers, (1 - alpha) first + alpha second, in fp32.

    Integers, and tensors that only training needs, are the first model's.

    Raises:
        ValueError: the models differ in architecture or preprocessing; names the difference.
    """
    refuse_another_architecture(first, second)
    others = second.state_dict()
    return {
        name: torch.lerp(one.float(), others[name].float(), alpha)
        if one.is_floating_point() and name not in TRAINING_ONLY
        else one
        for name, one in first.state_dict().items()
    }


def refuse_another_architecture(first: UniCL, second: UniCL) -> None:
    """Raises ValueError if two models differ in architecture or preprocessing."""
    ours, theirs = map(_describe, (first, second))
    differences = [
        f"{name} is {shorten(ours.get(name, 'not there'))} in the first and "
        f"{shorten(theirs.get(name, 'not there'))} in the second"
        for name in ours | theirs
        if ours.get(name) != theirs.get(name)
    ]
    if differences:
        raise ValueError(
            f"the models cannot be averaged: {first_difference(differences)}; take two of one "
            "architecture and preprocessing"
        )


def _describe(model: UniCL) -> dict[str, Any]:
    """The settings and shapes that two models must have in common."""
    settings = {name: getattr(model.config.model, name) for name in _ARCHITECTURE}
    settings |= {name: getattr(model.config.data, name) for name in _PREPROCESSING}
    tensors = model.state_dict().items()
    shapes = {
        f"tensor {name}": list(one.shape) for name, one in tensors if name not in TRAINING_ONLY
    }
    return settings | shapes
